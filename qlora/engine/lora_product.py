"""y = x Wᵀ + b + s (x Aᵀ) Bᵀ of an adapted 4-bit layer, and its derivatives, written out. Nothing here makes a graph.

Every product and sum is rounded where PEFT rounds it, so that in bf16 results are PEFT's to the last bit.

Shapes: x (..., in), y (..., out), W (out, in), A (r, in), B (out, r); "narrow" is what lies between A and B, (tokens, r).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora.engine.dense import computes_plainly, dense_weight, frozen_product
from qlora.model.exact import RowwiseLinear, _add_rows

if TYPE_CHECKING:
    import bitsandbytes as bnb


_AT_ONCE = 2**22  # numbers of the adapter's part of a result; each part costs two launches of a kernel


@dataclass(frozen=True)
class LoraProduct:
    """An adapted layer as it is at one call.

    Attributes:
        base: the 4-bit layer; its weight is looked up at each use, for it may be elsewhere by the backward pass.
        a, b: the halves of the adapter that is active; so are their weights.
        scale: s.
        dtype: what the adapter's part is computed in, as PEFT does: the adapter's own type, or that of autocast.
    """

    base: bnb.nn.Linear4bit
    a: torch.nn.Linear
    b: torch.nn.Linear
    scale: float
    dtype: torch.dtype

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, the trained parameters."""
        return self.a.weight, self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, in the type of x."""
        a, b = self._halves()
        y = frozen_product(x.to(self.base.compute_dtype), self.base)
        narrow = self._into(x) @ a.T
        for rows, part in _in_parts(y):
            part.add_(self._scaled(narrow[rows] @ b.T).to(y.dtype))
        return y.to(x.dtype)

    def narrow(self, gradient: torch.Tensor) -> torch.Tensor:
        """s dy B, which both of the following need."""
        b = self._halves()[1]
        return self._scaled(self._into(gradient) @ b) if self._scales_exactly else self._scaled_gradient(gradient) @ b

    def input_terms(self, gradient: torch.Tensor, narrow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two that dL/dx is the sum of, the adapter's first, as autograd comes to them."""
        weight = dense_weight(self.base)
        adapted = (narrow @ self._halves()[0]).to(weight.dtype)
        return adapted.view(*gradient.shape[:-1], -1), torch.matmul(gradient.to(weight.dtype), weight)

    def input_gradient(self, gradient: torch.Tensor, narrow: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """dL/dx from dy; with `into`, a contiguous tensor of the compute type, that is added to and given back."""
        weight, a = dense_weight(self.base), self._halves()[0]
        # The order is that of autograd: the adapter's term, then the base's. Where there is nothing before, it does not matter.
        total = torch.matmul(gradient.to(weight.dtype), weight) if into is None else into
        for rows, part in _in_parts(total):
            part.add_((narrow[rows] @ a).to(weight.dtype))
        return total if into is None else total.add_(torch.matmul(gradient.to(weight.dtype), weight))

    def weight_gradients(
        self, gradient: torch.Tensor, narrow: torch.Tensor, x: torch.Tensor, wanted: tuple[bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """dL/dA and dL/dB, where wanted. Halves that sum row by row add to `weight.grad` themselves, and None is given back."""
        of_a = of_b = None
        if wanted[0]:
            of_a = _weight_gradient(self.a, narrow, self._into(x), x.shape)
        if wanted[1]:
            narrow_x = self._into(x) @ self._halves()[0].T
            if self._scales_exactly:
                of_b = _weight_gradient(self.b, self._into(gradient), self._scaled(narrow_x), x.shape)
            else:
                of_b = _weight_gradient(self.b, self._scaled_gradient(gradient), narrow_x, x.shape)
        return of_a, of_b

    @property
    def _scales_exactly(self) -> bool:
        """s is a power of two, so it does not matter what it is multiplied with, and the narrow matrices take least."""
        return abs(math.frexp(self.scale)[0]) == 0.5

    def _scaled_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._into(gradient) * self.scale

    def _scaled(self, product: torch.Tensor) -> torch.Tensor:
        """s times a product, in its place."""
        return product if self.scale == 1 else product.mul_(self.scale)

    def _halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights in the type that is computed in, without what autograd knows of them."""
        return self.a.weight.detach().to(self.dtype), self.b.weight.detach().to(self.dtype)

    def _into(self, x: torch.Tensor) -> torch.Tensor:
        """As a matrix of the type that is computed in."""
        return _flat(x).to(self.dtype)


def product_of(layer: torch.nn.Module, device: torch.device) -> LoraProduct | None:
    """What a LoRA layer of PEFT computes for inputs on a device as things stand, or None where that is something else.

    Else are: adapters that are off or merged, several at once, with a bias or dropout of their own, and anything but plain LoRA.
    """
    if why_not(layer) or layer.disable_adapters or layer.merged:
        return None
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name], layer.lora_B[name]
    return LoraProduct(layer.get_base_layer(), a, b, layer.scaling[name], autocast_dtype(device) or a.weight.dtype)


def why_not(layer: Any, names: Sequence[str] | None = None) -> str:
    """Why a LoRA layer on a 4-bit one is left to PEFT; "" where it is not.

    Args:
        names: adapters that are taken to be active; None takes those that are.
    """
    names = layer.active_adapters if names is None else names
    if len(names) != 1 or names[0] not in layer.lora_A:
        return "it has not one active adapter"
    if names[0] in layer.lora_variant:  # DoRA and others
        return "its adapter is not plain LoRA"
    if layer.lora_bias.get(names[0]):
        return "its adapter has a bias"
    if getattr(layer.lora_dropout[names[0]], "p", 0.0) > 0:
        return "its adapter has dropout"
    if not computes_plainly(layer.get_base_layer()):
        return "it computes in another type than its weight had"
    return ""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast turns products on a device into; None where it is off."""
    # meta has no autocast of its own, and asking for it by name is an error.
    on = torch.is_autocast_enabled() if device.type == "meta" else torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def _weight_gradient(
    half: torch.nn.Linear, gradient: torch.Tensor, inputs: torch.Tensor, shape: torch.Size
) -> torch.Tensor | None:
    """gradientᵀ inputs, for matrices; `shape`, (..., tokens, width), says what a row of the batch is."""
    if isinstance(half, RowwiseLinear):
        _add_rows(half.weight, gradient.view(*shape[:-1], -1), inputs.view(*shape[:-1], -1))
        return None
    return (gradient.T @ inputs).to(half.weight.dtype)


def _in_parts(total: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a contiguous tensor as a matrix, and views of these, so that what is added to it need never be there at once."""
    matrix = total.view(-1, total.shape[-1])
    step = max(1, _AT_ONCE // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step), matrix[start : start + step]


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(tokens, width); a view where that is possible."""
    return x.reshape(-1, x.shape[-1])
