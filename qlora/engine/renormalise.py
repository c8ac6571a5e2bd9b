"""Norms of which only the input is kept for the backward pass, and inputs of fused layers that are norms' outputs.

An RMSNorm of transformers leaves about four vectors a token behind (it computes in fp32), and its output is kept once more by
the layers that read it. All of it follows from the norm's input, which is kept anyway. The backward pass runs the norm's own
forward again, so whatever it does, (1 + w) or w, before or after rounding, its results and gradients stay the same to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_AT_ONCE = 2**21  # numbers that go through a norm at once; about seven fp32 copies of them are made in a backward pass


class Origin:
    """How a tensor came about: `norm(inputs)`. It hangs on the tensor, as an attribute, for the layers that read it."""

    def __init__(self, norm: torch.nn.Module, inputs: torch.Tensor):
        self.inputs = inputs
        self.again = _Again(norm)


class _Again:
    """A norm's output, computed anew by the first of its readers' backward passes and kept until the last of them.

    It holds no activations in between: readers save the norm's input each on their own, so that checkpointing sees to it.
    """

    def __init__(self, norm: torch.nn.Module):
        self.norm, self.num_readers, self.num_left = norm, 0, 0
        self.value: torch.Tensor | None = None

    def compute(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.value is None:
            self.value = normalised(self.norm, inputs)
            self.num_left = self.num_readers
        value, self.num_left = self.value, self.num_left - 1
        if self.num_left <= 0:
            self.value = None
        return value


def keep(ctx: Any, x: torch.Tensor, *others: torch.Tensor) -> None:
    """`ctx.save_for_backward(x, *others)`, but instead of a norm's output its input is saved."""
    origin = getattr(x, "_origin", None)
    if origin is not None and x._version != 0:
        origin = None  # somebody has written to it, so it is no more what the norm gave
    ctx.again = None if origin is None else origin.again
    if origin is not None:
        origin.again.num_readers += 1
    ctx.save_for_backward(x if origin is None else origin.inputs, *others)


def kept(ctx: Any) -> tuple[torch.Tensor, ...]:
    """What `keep` was given; `ctx.saved_tensors`, of which the first may have to be computed anew."""
    x, *others = ctx.saved_tensors
    return (x if ctx.again is None else ctx.again.compute(x), *others)


class NormForward:
    """What stands in for a norm's forward."""

    def __init__(self, norm: torch.nn.Module):
        self._norm = norm

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not torch.is_grad_enabled():
            return plain_forward(self._norm, x, *args, **kwargs)
        y = _Norm.apply(x, self._norm)
        y._origin = Origin(self._norm, x.detach())
        return y


class _Norm(torch.autograd.Function):
    """A norm, of which the input is kept and nothing else. It runs on some rows at a time, for inside it computes in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return normalised(norm, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors

        def slope(part: torch.Tensor, of_part: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                y = plain_forward(ctx.norm, part)
            return torch.autograd.grad(y, part, of_part)[0]

        return _in_parts(slope, x, gradient), None


def normalised(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the norm's class gives, without a graph."""
    with torch.no_grad():
        return _in_parts(lambda part: plain_forward(norm, part), x)


def _in_parts(compute: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """What is computed for each row of the last dimension, some rows at a time; at once where the tensors are small. On meta two
    parts are made, because one takes what the next one takes.
    """
    shape = tensors[0].shape
    if tensors[0].numel() <= _AT_ONCE:
        return compute(*tensors)
    rows = max(1, _AT_ONCE // shape[-1])
    parts = zip(*(tensor.reshape(-1, shape[-1]).split(rows) for tensor in tensors), strict=True)
    whole = None
    for i, part in enumerate(islice(parts, 2) if tensors[0].is_meta else parts):
        made = compute(*part)
        if whole is None:
            whole = made.new_empty((shape.numel() // shape[-1], shape[-1]))
        whole[i * rows : i * rows + len(made)] = made
    return whole.view(shape)


def plain_forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's class does, whatever stands in for it."""
    return type(module).forward(module, *args, **kwargs)


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module normalises the last dimension of its input and does nothing else that matters here.

    Told by what it holds, a frozen vector, and by what its code does with a few numbers on the CPU, in a copy with small weights;
    the module itself may be on meta or have its weights elsewhere. LayerNorm is none: torch's own keeps little already, and what
    type it gives depends on autocast.
    """
    parameters = dict(module.named_parameters())
    if list(module.children()) or list(module.buffers()) or isinstance(module, (torch.nn.LayerNorm, torch.nn.Linear)):
        return False
    if "weight" not in parameters or any(p.requires_grad for p in parameters.values()):
        return False
    if len({p.shape for p in parameters.values()}) != 1 or parameters["weight"].ndim != 1:
        return False
    return _normalises(module, list(parameters), parameters["weight"].numel())


def _normalises(module: torch.nn.Module, names: list[str], width: int) -> bool:
    """f(100 x) = f(x) for rows whose size leaves no room for epsilon, each row by itself."""
    width = width or 8  # a layer that is streamed holds empty tensors in between
    generator = torch.Generator().manual_seed(0)
    probe = copy.copy(module)
    probe._parameters = {name: torch.nn.Parameter(torch.rand(width, generator=generator), requires_grad=False) for name in names}
    x = torch.randn(2, 3, width, generator=generator)
    with torch.no_grad():
        try:
            y, larger, rows = (plain_forward(probe, part) for part in (x * 10, x * 1000, x.view(-1, width)[1:4] * 10))
        except (TypeError, ValueError, RuntimeError, AttributeError):  # its forward takes something else
            return False
    if not isinstance(y, torch.Tensor) or y.shape != x.shape or not torch.allclose(y.view(-1, width)[1:4], rows, rtol=1e-4):
        return False
    return torch.allclose(y, larger, rtol=1e-3, atol=1e-5) and not torch.allclose(y, x * 10)
