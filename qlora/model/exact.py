"""Adapter gradients that do not depend, to the last bit, on how many rows go through the model at once.

On a CPU in fp32 a row's activations and their gradients are the same whatever rows are beside it: matrix products sum along
the hidden width, attention along the row. Only the gradients of the weights sum over all tokens of a micro-batch, and such a sum
is rounded differently when it is made in parts. Here it is always made in the same parts, row after row, each added to what is
there. So a micro-batch of four rows, two of two, and four of one come to the same adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from peft import PeftModel


class _RowwiseProduct(torch.autograd.Function):
    """x Wᵀ for x of shape (rows, tokens, in) or (tokens, in), and W of shape (out, in)."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        return torch.nn.functional.linear(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            _add_rows(weight, gradient, inputs)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None


def _add_rows(weight: torch.Tensor, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add the rows' gradients to `weight.grad`, in order. Autograd is given none: it would add their sum, in one piece."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    if inputs.ndim == 2:
        gradient, inputs = gradient[None], inputs[None]
    for row_gradient, row in zip(gradient, inputs, strict=True):
        weight.grad.addmm_(row_gradient.flatten(0, -2).T, row.flatten(0, -2))


class RowwiseLinear(torch.nn.Linear):
    """A linear layer whose backward pass takes one row of the batch at a time, and adds straight to `weight.grad`.

    Hooks on the weight's gradient are not called, and `torch.autograd.grad` does not see it; `loss.backward()` is what it is for.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _RowwiseProduct.apply(input, self.weight)


def make_exact(model: PeftModel) -> None:
    """Put a `RowwiseLinear` in the place of every A and B of a model's LoRA adapters; weights and their names stay the same."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for half in (layer.lora_A, layer.lora_B):
                for name, linear in half.items():
                    half[name] = _rowwise(linear)


def _rowwise(linear: torch.nn.Linear) -> RowwiseLinear:
    assert linear.bias is None, "adapters have no bias"
    made = RowwiseLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight = linear.weight
    return made.train(linear.training)
