"""down(act(gate(x)) * up(x)) of adapted 4-bit layers, and its derivatives, written out.

What comes out of gate and up, e and g, is kept or made anew; all else of the inner width lives for moments, in the backward pass
at most two at once where gate and up are two projections.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from qlora.engine.lora_product import LoraProduct, product_of
from qlora.engine.mlp_forms import MlpForm
from qlora.engine.renormalise import keep, kept, plain_forward

# With fewer tokens and no graph, as when an answer is generated word by word, bitsandbytes multiplies without dequantising the
# whole weight, which is then most of the time; such calls are left to it.
_FEW_TOKENS = 64

Gradients = tuple[torch.Tensor | None, ...]


def left_to_kernels(module: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether a call is one for bitsandbytes' kernels for few tokens."""
    return not module.training and not torch.is_grad_enabled() and x.numel() < _FEW_TOKENS * x.shape[-1]


class Mlp(NamedTuple):
    """An MLP as it is at one call.

    Attributes:
        gate: both gate and up where the two are joined.
        up: None where they are, and where there is none.
    """

    gate: LoraProduct
    up: LoraProduct | None
    down: LoraProduct
    act: torch.nn.Module
    form: MlpForm

    @property
    def weights(self) -> list[torch.Tensor]:
        """The trained parameters: A and B of gate, up and down."""
        return [weight for product in (self.gate, self.up, self.down) if product for weight in product.weights]

    def inner(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What gate and up give: e and g, both in one tensor, or e alone."""
        return [product.forward(x) for product in (self.gate, self.up) if product]

    def outer(self, inner: list[torch.Tensor]) -> torch.Tensor:
        """y from that. The list is emptied, so that what is not kept is gone when down begins."""
        e, g = self._e_and_g(inner)
        inner.clear()
        h = self.act(e)
        if g is not None:
            h = h * g if h is e else h.mul_(g)
        del e, g
        return self.down.forward(h)

    def gradients(
        self, x: torch.Tensor, inner: list[torch.Tensor], gradient: torch.Tensor, for_x: bool, wanted: list[bool]
    ) -> Gradients:
        """dL/dx and those of `weights`, where wanted; nothing that is given is written to."""
        e, g = self._e_and_g(inner)
        act, narrow = self.act(e), self.down.narrow(gradient)
        of_down = self.down.weight_gradients(gradient, narrow, act if g is None else act * g, (wanted[-2], wanted[-1]))
        dh = self.down.input_gradient(gradient, narrow).to(e.dtype)
        if self.form.joined:
            both = torch.empty_like(inner[0])
            de, dg = self.form.halves(both)
            torch.mul(dh, act, out=dg)
            del act
            de.copy_(_through_act(self.act, e, dh.mul_(g)))
            del dh
            return *_through(self.gate, both, x, None, for_x, wanted[:2]), *of_down
        dx, of_up = None, ()
        if self.up:
            dg = act * dh if act is e else act.mul_(dh)
            dx, *of_up = _through(self.up, dg, x, None, for_x, wanted[2:4])
            del dg
            dh.mul_(g)
        del act
        de = _through_act(self.act, e, dh)
        del dh
        return *_through(self.gate, de, x, dx, for_x, wanted[:2]), *of_up, *of_down

    def _e_and_g(self, inner: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.form.joined:
            return self.form.halves(inner[0])
        return inner[0], inner[1] if self.up else None


def _through_act(act: torch.nn.Module, e: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """dL/de. The activation runs once more, which is cheaper than keeping what it gave; only how that came about is needed."""
    with torch.enable_grad():
        e = e.detach().requires_grad_()
        edge = torch.autograd.graph.get_gradient_edge(act(e))
    return torch.autograd.grad(edge, e, gradient)[0]


def _through(
    product: LoraProduct, gradient: torch.Tensor, x: torch.Tensor, into: torch.Tensor | None, for_x: bool, wanted: list[bool]
) -> Gradients:
    """dL/dx, added to `into`, dL/dA and dL/dB of one projection."""
    narrow = product.narrow(gradient)
    of_weights = product.weight_gradients(gradient, narrow, x, (wanted[0], wanted[1]))
    return product.input_gradient(gradient, narrow, into) if for_x else None, *of_weights


class MlpForward:
    """What stands in for the forward of an MLP."""

    def __init__(self, module: torch.nn.Module, form: MlpForm):
        self.module, self._form = module, form
        self._act = module.get_submodule(form.act)
        self._layers = form.projections(module)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        mlp = self.now(x)
        if mlp is None:
            return plain_forward(self.module, x)
        return self.finish(_FusedMlp.apply(x, mlp, torch.is_grad_enabled(), *mlp.weights))

    def now(self, x: torch.Tensor) -> Mlp | None:
        """What is to be computed as things stand; None where that is left to the module's own forward."""
        products = [] if left_to_kernels(self.module, x) else [product_of(layer, x.device) for layer in self._layers]
        if not products or None in products:
            return None
        gate, *up, down = products
        return Mlp(gate, up[0] if up else None, down, self._act, self._form)

    def finish(self, y: torch.Tensor) -> torch.Tensor:
        """The dropout of some families, in its own way."""
        return self.module.get_submodule(self._form.dropout)(y) if self._form.dropout else y


class _FusedMlp(torch.autograd.Function):
    """An MLP, of which x, e and g are kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mlp: Mlp, keeps: bool, *weights: torch.Tensor) -> torch.Tensor:
        ctx.mlp, inner = mlp, mlp.inner(x)
        if keeps:
            keep(ctx, x, *inner)
        return mlp.outer(inner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        x, *inner = kept(ctx)
        for_x, _, _, *wanted = ctx.needs_input_grad
        dx, *of_weights = ctx.mlp.gradients(x, inner, gradient, for_x, wanted)
        return dx, None, None, *of_weights
