"""Attention that stores its scores, without keeping them: for models that have no other (Gemma-2, gpt-oss).

Several numbers for each pair of tokens are kept for the backward pass by attention that is composed of plain operators. Here
queries, keys and values are, and the same operators run again in the backward pass; results and gradients stay the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "eager_lean"


def keep_no_scores(model: PreTrainedModel) -> None:
    """Give it to a model whose attention is "eager"; others stay as they are."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if model.config._attn_implementation == "eager":
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, eager_mask)
        model.set_attn_implementation(_NAME)


def keep_scores(model: PreTrainedModel) -> None:
    """Undo that."""
    if model.config._attn_implementation == _NAME:
        model.set_attn_implementation("eager")


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The family's own eager attention. In training the scores, which come second, are not given back."""
    # Every modeling file of transformers has it under this name, and its layers take it where no other attention is set.
    eager = getattr(inspect.getmodule(type(module)), "eager_attention_forward")
    random = options.get("dropout") or any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.children())
    if not torch.is_grad_enabled() or (module.training and random):  # other numbers would be drawn the second time
        return eager(module, query, key, value, attention_mask, **options)

    def attend(*states: torch.Tensor) -> torch.Tensor:
        return eager(module, *states, attention_mask, **options)[0]

    return _Again.apply(attend, query, key, value), None


class _Again(torch.autograd.Function):
    """A function of tensors, of which these are kept and nothing else. What it reads beside them takes no gradient."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            made = ctx.function(*tensors)
        return None, *torch.autograd.grad(made, tensors, gradient)
