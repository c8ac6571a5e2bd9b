"""Automatic mixed precision on meta tensors, which torch's own autocast does not know.

Only for what decides memory: which products run in 16 bits, what is turned into fp32, and that an fp32 weight is converted once
in a region and kept. Source: torch's documentation of amp, "CUDA Ops that can autocast to float16" and "to float32", and
aten/src/ATen/autocast_mode.cpp, cached_cast (leaves that are trained are cached until the region ends).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_TO_HALF = {
    torch.mm, torch.matmul, torch.bmm, torch.addmm, torch.baddbmm, torch.mv, torch.addbmm, torch.einsum, F.linear,
    torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.addmm, torch.Tensor.baddbmm, torch.Tensor.__matmul__,
    torch.conv1d, torch.conv2d, F.conv1d, F.conv2d,
}
_TO_FLOAT = {
    F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax, torch.log_softmax, F.layer_norm, F.group_norm, F.cross_entropy,
    F.nll_loss, F.softplus, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.cumsum, torch.prod, torch.sum, torch.norm,
    torch.Tensor.exp, torch.Tensor.log, torch.Tensor.pow, torch.Tensor.__pow__, torch.Tensor.rsqrt, torch.Tensor.cumsum,
    torch.Tensor.prod, torch.Tensor.sum, torch.Tensor.norm,
}
_HALVES = (torch.float16, torch.bfloat16)


class AutocastOnMeta(TorchFunctionMode):
    """Enter it around a forward pass. Converted weights are kept until it is left."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self._converted: dict[int, torch.Tensor] = {}

    def __exit__(self, *exception: Any) -> None:
        self._converted.clear()
        super().__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TO_HALF:
            args = [self._half(value) for value in args]
            kwargs = {name: self._half(value) for name, value in kwargs.items()}
        elif func in _TO_FLOAT and kwargs.get("dtype") is None:
            args = [_float(value) for value in args]
        return func(*args, **kwargs)

    def _half(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_meta or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self._converted:
            self._converted[id(value)] = value.to(self.dtype)
        return self._converted[id(value)]


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_meta and value.dtype in _HALVES else value
