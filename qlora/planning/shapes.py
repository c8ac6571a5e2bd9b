"""Shapes of operators' outputs on meta, remembered. Layers of a model ask for the same ones again and again, and torch
works most of them out in Python.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class ShapeCache:
    """Calls operators on meta tensors; a repeated call makes its outputs from what was seen the first time."""

    def __init__(self) -> None:
        self._seen: dict[Any, Any] = {}
        self._fresh: dict[Any, bool] = {}

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of `func(*args, **kwargs)`, with storages of its own."""
        if not self._makes_new_tensors(func):
            return func(*args, **kwargs)
        try:
            key = func, _signature(args), _signature(tuple(kwargs.items()))
            known = self._seen.get(key)
        except _NotAlike:
            return func(*args, **kwargs)
        if known is not None:
            made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in known]
            return made[0] if len(made) == 1 else tuple(made)
        out = func(*args, **kwargs)
        outputs = (out,) if isinstance(out, torch.Tensor) else out
        taken = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if isinstance(outputs, tuple) and all(_is_plain(value, taken) for value in outputs):
            self._seen[key] = [(value.shape, value.stride(), value.dtype) for value in outputs]
        return out

    def _makes_new_tensors(self, func: Any) -> bool:
        """Whether no output shares memory with an argument, and no argument is written to."""
        if func not in self._fresh:
            schema = func._schema
            named = (*schema.arguments, *schema.returns)
            self._fresh[func] = bool(schema.returns) and all(each.alias_info is None for each in named)
        return self._fresh[func]


class _NotAlike(Exception):
    """An argument that two calls cannot be compared by."""


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise _NotAlike
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_signature(part) for part in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return type(value), value
    raise _NotAlike


def _is_plain(value: Any, taken: set[int]) -> bool:
    """A tensor on meta that fills a storage of its own; `_unsafe_view` shares one without its schema saying so."""
    if not isinstance(value, torch.Tensor) or not value.is_meta or value.storage_offset():
        return False
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride())) if value.numel() else 0
    storage = value.untyped_storage()
    return storage._cdata not in taken and storage.nbytes() == extent * value.element_size()
