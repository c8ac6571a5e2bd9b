"""The 16-bit form of 4-bit weights: made where it is needed, or once for a whole visit to a layer.

A layer that is visited for many micro-batches would dequantise its weights anew for each of them, forward and backward. In a
visit they are dequantised at their first use and kept until it ends; results are those of bitsandbytes' own path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    import bitsandbytes as bnb


def dense_weight(module: bnb.nn.Linear4bit) -> torch.Tensor:
    """The dequantised weight, of shape (out, in) and of the type it had before it was quantised; inside a `DenseVisit` always the
    same tensor. Not to be written to, nor to be saved for a backward pass: ask again there, weights may have moved by then.
    """
    if "_dense" not in module.__dict__:
        return _dequantised(module)
    if module._dense is None:
        module._dense = _dequantised(module)
    return module._dense


class DenseVisit:
    """While it is entered, the 4-bit modules of a layer compute with dense weights, each dequantised at its first use.

    On a CPU, results are equal to the last bit to those without it. On CUDA they are where bitsandbytes takes the same path, as
    it does for more than 1536 tokens at once; for fewer it has kernels that read 4-bit weights (0.50, backends/cuda/ops.py).

    The layer's weights must be in place when it is entered and stay until it is left; it can be entered again, with others. What
    a forward pass inside leaves behind for its backward pass does not hold the dense weights, so that may come later.

    Args:
        layer: its modules are looked for once, here. Modules that compute in another type than their weight had are left alone.

    Raises:
        AssertionError: the layer is being visited already.
    """

    def __init__(self, layer: torch.nn.Module):
        import bitsandbytes as bnb

        quantised = (module for module in layer.modules() if isinstance(module, bnb.nn.Linear4bit))
        self._modules = [module for module in quantised if computes_plainly(module)]
        self._before: list[Any] = []

    def __enter__(self) -> DenseVisit:
        for module in self._modules:
            assert "_dense" not in module.__dict__, "a visit to this layer has not ended"
            module._dense = None
            self._before.append(module.__dict__.get("forward"))
            module.forward = _DenseForward(module)
        return self

    def __exit__(self, *exception: object) -> None:
        for module, before in zip(self._modules, self._before, strict=True):
            del module._dense, module.forward
            if before is not None:
                module.forward = before
        self._before.clear()


def computes_plainly(module: bnb.nn.Linear4bit) -> bool:
    """Whether a module computes in the type that its weight had, so that one dense weight serves forward and backward pass."""
    state = module.weight.quant_state
    return state is not None and module.compute_dtype == state.dtype


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b, of which nothing is saved: the weight is asked for again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, module: bnb.nn.Linear4bit) -> torch.Tensor:
        ctx.module = module
        return frozen_product(inputs, module)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.matmul(gradient, dense_weight(ctx.module)), None


def frozen_product(inputs: torch.Tensor, module: bnb.nn.Linear4bit) -> torch.Tensor:
    """x Wᵀ + b for inputs of the module's compute type, without a graph."""
    bias = None if module.bias is None else module.bias.to(inputs.dtype)
    return torch.nn.functional.linear(inputs, dense_weight(module), bias)


class _DenseForward:
    """Stands in for a module's forward during a visit; types are handled as by `Linear4bit.forward` (bitsandbytes 0.50)."""

    def __init__(self, module: bnb.nn.Linear4bit):
        self._module = module

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return FrozenProduct.apply(inputs.to(self._module.compute_dtype), self._module).to(inputs.dtype)


def _dequantised(module: bnb.nn.Linear4bit) -> torch.Tensor:
    import bitsandbytes as bnb

    weight = module.weight
    assert not getattr(weight.quant_state, "packing_format_for_cpu", False), "the weight was repacked for evaluation"
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
