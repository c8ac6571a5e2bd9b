"""Backward passes of adapted layers, written by hand, so that less has to be kept for them.

Autograd keeps every input and output of the small products that LoRA consists of, and what activation and norms are made of:
about 22 vectors of the hidden width a token in a Llama layer. Here a projection keeps its input, an MLP its input and what comes
out of gate and up, a norm its input; what a norm gives to others is computed anew from that. That is 11.6. Attention that stores
its scores for each pair of tokens keeps queries, keys and values instead.

The adapters stay those of PEFT: same modules, names and state dict; only the `forward` of modules in the model is replaced.
Weights, frozen or trained, are never saved but looked up through their modules in the backward pass, so they may be elsewhere in
between. Results and gradients are rounded where PEFT rounds them: in bf16 they are equal to the last bit (measured on CPUs, where
both take the same products of matrices), in fp32 up to the order in which a norm's terms are added.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from qlora.engine.fused_mlp import MlpForward, left_to_kernels
from qlora.engine.lean_attention import keep_no_scores, keep_scores
from qlora.engine.lora_product import LoraProduct, product_of, why_not
from qlora.engine.mlp_forms import mlp_form
from qlora.engine.renormalise import NormForward, is_norm, keep, kept, plain_forward

if TYPE_CHECKING:
    from peft import PeftModel


def install_fused(model: PeftModel, *, projections_alone: bool = False) -> list[str]:
    """Give a model's adapted 4-bit layers, their MLPs and its norms the backward passes of this file.

    Args:
        projections_alone: MLPs and norms stay as they are, so that nothing of size is computed anew; for where there is room to keep
            what these consist of.

    Returns:
        What was left to PEFT and why, a line for each reason.

    Raises:
        AssertionError: something of the engine stands in for these modules already.
    """
    from peft.tuners.lora.bnb import Linear4bit

    left: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            reasons = [why_not(module, [name]) for name in module.lora_A]  # which one is active is asked at each call
            if all(reasons):
                left[reasons[0]] += 1
            else:
                replace_forward(module, _LoraForward(module))
    reported = [f"{count} adapted layers are left to PEFT: {reason}." for reason, count in left.items()]
    if projections_alone:
        return reported
    norms: dict[tuple[type, int], bool] = {}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            continue
        kind = (type(module), sum(p.numel() for p in module.parameters(recurse=False)))
        if kind not in norms or norms[kind]:  # a class that is none needs no second look
            norms[kind] = is_norm(module)
        if norms[kind]:
            replace_forward(module, NormForward(module))
        elif (form := mlp_form(module)) and all(map(is_fused, form.projections(module))):
            replace_forward(module, MlpForward(module, form))
    keep_no_scores(model.get_base_model())
    return reported


def remove_fused(model: PeftModel) -> None:
    """Take away all that stands in for forwards, tiles of MLPs too."""
    keep_scores(model.get_base_model())
    for module in model.modules():
        while _BEFORE in module.__dict__ and module.__dict__[_BEFORE]:
            restore_forward(module)


_BEFORE = "_forwards_before"


def replace_forward(module: torch.nn.Module, forward: Any) -> None:
    """Let something stand in for a module's forward, until `restore_forward`."""
    assert not isinstance(module.__dict__.get("forward"), type(forward)), f"{type(module).__name__} has such a forward already"
    module.__dict__.setdefault(_BEFORE, []).append(module.__dict__.get("forward"))
    module.forward = forward


def restore_forward(module: torch.nn.Module) -> None:
    """Undo the latest `replace_forward`."""
    before = module.__dict__[_BEFORE].pop()
    del module.forward
    if before is not None:
        module.forward = before
    if not module.__dict__[_BEFORE]:
        del module.__dict__[_BEFORE]


def is_fused(module: torch.nn.Module) -> bool:
    """Whether a LoRA layer has been given a backward pass of this file."""
    return isinstance(module.__dict__.get("forward"), _LoraForward)


# --- one projection ----------------------------------------------------------------------------------------------------


class _LoraForward:
    """What stands in for the forward of a LoRA layer."""

    def __init__(self, layer: torch.nn.Module):
        self._layer = layer

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        product = None if args or kwargs or left_to_kernels(self._layer, x) else product_of(self._layer, x.device)
        if product is None:
            return plain_forward(self._layer, x, *args, **kwargs)
        return _Lora.apply(x, x, product, *product.weights)


class _Lora(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ, of which x is kept. It is given twice, so that autograd adds up the two terms of dL/dx, and
    those of other layers that read x, in the order in which it does for PEFT's layers: sums of 16-bit numbers depend on it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, same: torch.Tensor, product: LoraProduct, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        ctx.product = product
        keep(ctx, x)
        return product.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        product, (x,) = ctx.product, kept(ctx)
        for_x, _, _, *for_weights = ctx.needs_input_grad
        narrow = product.narrow(gradient)
        of_weights = product.weight_gradients(gradient, narrow, x, for_weights)
        terms = product.input_terms(gradient, narrow) if for_x else (None, None)
        return *terms, None, *of_weights
