"""Find a model's MLPs by what they compute: down(act(gate(x)) * up(x)), or down(act(up(x))).

Names and classes differ from family to family, so a module's own code is run, on a few numbers, with small layers in the place of
its projections, and compared with these formulas. What matches none of them is no MLP.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qlora.engine.renormalise import plain_forward

_WIDTH, _INNER = 8, 12  # of the small layers


@dataclass(frozen=True)
class MlpForm:
    """How an MLP is made; names are those of the module's children.

    Attributes:
        gate: what goes through the activation.
        up: what that is multiplied by; None where nothing is.
        joined: the two are halves of one projection, both of whose names are the same: "gate" or "up" is the first half.
        dropout: what the result goes through; None where there is none.
    """

    gate: str
    up: str | None
    down: str
    act: str
    joined: str | None = None
    dropout: str | None = None

    def projections(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """Gate, up where it is one of its own, and down."""
        names = [self.gate, *([] if self.joined or not self.up else [self.up]), self.down]
        return [module.get_submodule(name) for name in names]

    def halves(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up as views of what a joined projection gives."""
        first, second = both.chunk(2, dim=-1)
        return (first, second) if self.joined == "gate" else (second, first)


def mlp_form(module: torch.nn.Module) -> MlpForm | None:
    """The form of a module, or None where it is no MLP that is known. The module may be on meta, or its weights elsewhere."""
    children = dict(module.named_children())
    linear = {name: sizes for name, child in children.items() if (sizes := _sizes(child))}
    dropouts = [name for name, child in children.items() if isinstance(child, (torch.nn.Dropout, torch.nn.Identity))]
    others = [name for name in children if name not in linear and name not in dropouts]
    if len(linear) not in (2, 3) or len(others) != 1 or len(dropouts) > 1 or not _is_function(children[others[0]]):
        return None
    return next((form for form in _candidates(linear, others[0], dropouts[0] if dropouts else None)
                 if _computes(module, linear, form)), None)


def _sizes(child: torch.nn.Module) -> tuple[int, int] | None:
    """(in, out) of a projection, adapted or not."""
    base = child.get_base_layer() if hasattr(child, "get_base_layer") else child
    return (base.in_features, base.out_features) if isinstance(base, torch.nn.Linear) else None


def _is_function(child: torch.nn.Module) -> bool:
    """An activation: nothing is kept or trained in it."""
    return not list(child.parameters()) and not list(child.buffers())


def _candidates(linear: dict[str, tuple[int, int]], act: str, dropout: str | None) -> Iterator[MlpForm]:
    """What the sizes allow."""
    for down, (inner, width) in linear.items():
        rest = [name for name in linear if name != down]
        sizes = {linear[name] for name in rest}
        if sizes == {(width, inner)} and len(rest) == 2:
            yield MlpForm(rest[0], rest[1], down, act, None, dropout)
            yield MlpForm(rest[1], rest[0], down, act, None, dropout)
        elif sizes == {(width, inner)}:
            yield MlpForm(rest[0], None, down, act, None, dropout)
        elif sizes == {(width, 2 * inner)} and len(rest) == 1:
            yield MlpForm(rest[0], rest[0], down, act, "gate", dropout)
            yield MlpForm(rest[0], rest[0], down, act, "up", dropout)


def _computes(module: torch.nn.Module, linear: dict[str, tuple[int, int]], form: MlpForm) -> bool:
    """Whether the module's own forward, in training mode, is the formula."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    if sum(p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters) != 2:  # self and x
        return False
    generator = torch.Generator().manual_seed(0)
    small = {name: _small(_INNER, _WIDTH) if name == form.down else _small(_WIDTH, _INNER * (2 if form.joined else 1))
             for name in linear}
    for layer in small.values():
        layer.weight.data.normal_(generator=generator)
    act = module.get_submodule(form.act)
    probe = copy.copy(module)
    probe.training = True
    probe._modules = {**module._modules, **small, **({form.dropout: torch.nn.Identity()} if form.dropout else {})}
    x = torch.randn(2, 3, _WIDTH, generator=generator)
    with torch.no_grad():
        gate, up = small[form.gate](x), None
        if form.joined:
            gate, up = form.halves(gate)
        elif form.up:
            up = small[form.up](x)
        expected = small[form.down](act(gate) if up is None else act(gate) * up)
        try:
            found = plain_forward(probe, x)
        except (TypeError, ValueError, RuntimeError, AttributeError):  # it wants more than such layers have
            return False
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5)


def _small(inputs: int, outputs: int) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, bias=False, device="cpu")
