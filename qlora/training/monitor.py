"""Looks at a run while it trains: gradients, adapters against the weights they change, and what the rules of guidance make of it.

A look costs little and changes nothing. It rides on a step that runs anyway: no pass of its own through the model, no random
number drawn, no tensor written to, so a run that is looked at equals one that is not, to the last bit. Its tensors are small
(some token vectors, one number a module), but for one dequantised weight at a time, which the step itself makes right afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from qlora.engine.dense import dense_weight
from qlora.engine.mlp_forms import mlp_form
from qlora.training.advice import Advice, Situation, advise

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from qlora.architecture import TargetSelection
    from qlora.training.trainer import AdapterTrainer

_NUM_TOKENS = 32  # of a step, whose way through a module is measured
_NUM_DIGITS = 6  # of a figure in metrics.jsonl


@dataclass(frozen=True)
class Adapted:
    """A module with an adapter. `number` is that of its layer, None outside of the layers."""

    path: str
    layer: LoraLayer
    number: int | None

    @property
    def halves(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """A of shape (r, in), B of shape (out, r)."""
        name = self.layer.active_adapters[0]
        return self.layer.lora_A[name].weight, self.layer.lora_B[name].weight

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.layer.scaling[self.layer.active_adapters[0]]


Groups = Mapping[str, Sequence[Adapted]]


def find_groups(model: PeftModel, selection: TargetSelection) -> Groups:
    """The adapted modules by kind and third of the layers, at most six groups: "attention 0-9", "mlp 20-29". What lies outside of
    the layers, or is of neither kind, is "other".
    """
    architecture, base = selection.architecture, model.get_base_model()
    num_layers, prefix = architecture.num_layers, f"{architecture.layers_path}."
    groups: dict[str, list[Adapted]] = {}
    for projection in selection.projections:
        for path in projection.paths:
            inside = path.startswith(prefix)
            number = int(path.removeprefix(prefix).partition(".")[0]) if inside else None
            name = f"{projection.kind} {_layers(number, num_layers)}" if inside and projection.kind != "other" else "other"
            groups.setdefault(name, []).append(Adapted(path, base.get_submodule(path), number))
    order = sorted(groups, key=lambda name: (name == "other", name.partition(" ")[0], groups[name][0].number or 0))
    return {name: sorted(groups[name], key=lambda each: each.number or 0) for name in order}


def _layers(number: int, num_layers: int) -> str:
    """The numbers of the layers in the same third: "0-9"; one number where there is one, as in models of up to three layers."""
    parts = min(3, num_layers)
    same = [other for other in range(num_layers) if other * parts // num_layers == number * parts // num_layers]
    return f"{same[0]}-{same[-1]}" if len(same) > 1 else str(same[0])


class FrozenNorms:
    """The Frobenius norm of the frozen weights of each group, taken once a run, while another walk over the layers has them in
    place: streamed layers are there for moments only.

    The weights are those that training computes with: dequantised, one module at a time.
    """

    def __init__(self, groups: Groups):
        self.groups = groups
        self._squares: dict[str, dict[str, float]] = {name: {} for name in groups}

    def beside(self, walk: Iterable[Any]) -> Iterator[Any]:
        """Go along with a walk over the numbers of layers, each of which is in place while it is the one yielded last."""
        for number in walk:
            for name, modules in self.groups.items():
                for each in modules:
                    if each.path not in self._squares[name] and each.number in (number, None):
                        self._squares[name][each.path] = _norm(_frozen_weight(each.layer)).item() ** 2
            yield number

    def of(self, name: str) -> float:
        """The norm of a group's weights, as one long vector."""
        return math.sqrt(sum(self._squares[name].values()))


class Monitor(TrainerCallback):
    """Looks at every `every`-th step, and has the trainer's row writer ask it for its part of each row of metrics.jsonl.

    All figures are of the step as it was run, before it changed the adapters; norms are L2 of the group's numbers as one vector:

    - `grad_a`, `grad_b`: of dL/dA and dL/dB before clipping; all groups together are the row's `grad_norm`.
    - `update_ratio`: of (alpha / r) B A, against that of the frozen weights.
    - `path_ratio`: of what the adapter adds to a module's output against the base's, (alpha / r) B A x against W x, for up to
      32 tokens x of the step, in one module of the group. Left out where x is not in rows of tokens, as in some experts.

    Args:
        norms: of the frozen weights.
        rows: every row of metrics.jsonl so far, those of earlier sessions included.
        note: told one line when a rule fires.

    Attributes:
        seconds: what all looks took, by `clock`; on a GPU what it took to ask for them.
    """

    def __init__(
        self, trainer: AdapterTrainer, norms: FrozenNorms, situation: Situation, *, every: int,
        rows: Sequence[Mapping[str, Any]], note: Callable[[str], None],
    ):
        self.trainer, self.groups, self.norms, self.situation = trainer, norms.groups, norms, situation
        self.every, self.rows, self.note = every, rows, note
        self.seconds, self.clock = 0.0, time.perf_counter
        self._entrances = _entrances(trainer.model, norms.groups)
        self._hooks: list[Any] = []
        self._tokens: list[int] = []
        self._paths: dict[str, torch.Tensor] = {}
        self._found: list[tuple[str, str]] = []
        self._values: torch.Tensor | None = None
        trainer.row_writer.monitor = self

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._leave()
        if (state.global_step + 1) % self.every:
            return
        started = self.clock()
        self._tokens = spread_tokens(self.trainer.fetched[0])
        for name, (module, layer) in self._entrances.items():
            self._hooks.append(module.register_forward_pre_hook(self._entered(name, layer)))
        self.seconds += self.clock() - started

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._hooks:
            return
        started = self.clock()
        found = {(name, kind): value for name, modules in self.groups.items() for kind, value in figures(modules).items()}
        found |= {(name, "path_ratio"): value for name, value in self._paths.items()}
        self._leave()
        self._found, self._values = list(found), torch.stack([value.cpu() for value in found.values()]) if found else None
        self.seconds += self.clock() - started

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._leave()

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a row gets: `monitor` with the figures by group where its step was looked at, and `advice` where a rule fires,
        each of them once.
        """
        started, fields = self.clock(), {}
        if self._values is not None and "loss" in row:
            fields["monitor"] = self._by_group(row.get("grad_norm"))
            self._values = None
        if "monitor" in fields or "eval_loss" in row:
            advice = advise([*self.rows, {**row, **fields}], self.situation)
            if advice is not None:
                fields["advice"] = advice.to_row()
                self.note(told(row["step"], advice))
        self.seconds += self.clock() - started
        return fields

    def _entered(self, name: str, layer: LoraLayer) -> Callable[..., None]:
        """A hook before a module: the first micro-batch of the step, or its first part, is the one that is measured."""
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            if name in self._paths or not args:
                return
            started = self.clock()
            ratio = path_ratio(layer, args[0], self._tokens)
            if ratio is not None:
                self._paths[name] = ratio
            self.seconds += self.clock() - started

        return hook

    def _by_group(self, grad_norm: float | None) -> dict[str, dict[str, float]]:
        values = dict(zip(self._found, self._values.tolist(), strict=True))
        clipped = math.hypot(*(value for (_, kind), value in values.items() if kind.startswith("grad_")))
        # The trainer has scaled all gradients down by one factor, which follows from the norm before.
        factor = grad_norm / clipped if grad_norm and clipped else 1.0
        shown: dict[str, dict[str, float]] = {name: {} for name in self.groups}
        for (name, kind), value in values.items():
            if kind == "update":
                kind, value = "update_ratio", value / self.norms.of(name) if self.norms.of(name) else math.nan
            value = value * factor if kind.startswith("grad_") else value
            if math.isfinite(value):
                shown[name][kind] = float(f"{value:.{_NUM_DIGITS}g}")
        return shown

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._paths = [], {}


def told(step: int, advice: Advice) -> str:
    """A piece of advice as one line for a person."""
    return f"Advice at step {step:,}, rule {advice.rule}: {advice.text} Try: {advice.override}"


# --- figures -----------------------------------------------------------------------------------------------------------


def product_norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm of B A, for A (r, in) and B (out, r), from two r x r matrices: ||BA||^2 = tr(A A^T B^T B)."""
    a, b = a.detach().float(), b.detach().float()
    return ((a @ a.T) * (b.T @ b)).sum().clamp(min=0).sqrt()  # both are symmetric


def path_ratio(layer: LoraLayer, x: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor | None:
    """||(alpha / r) B A x|| / ||W x||, a number, for some tokens of the first row; of x, (rows, tokens, in), nothing is kept.

    None where x is not in rows of tokens. Dropout and bias play no part.
    """
    each = Adapted("", layer, None)
    if x.ndim != 3 or not tokens or x.shape[1] <= max(tokens) or not hasattr(layer.get_base_layer().weight, "quant_state"):
        return None
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        some = x[0, tokens].detach()
        weight, (a, b) = dense_weight(layer.get_base_layer()), each.halves
        base = _norm(some.to(weight.dtype) @ weight.T)
        adapter = _norm(some.float() @ a.float().T @ b.float().T) * each.scale
        return adapter / base


def spread_tokens(inputs: Mapping[str, Any]) -> list[int]:
    """Places of up to 32 tokens of a batch's first row, spread over it; none of them is padding, or of another row in a pack.

    The first row is the first one however a batch is split.
    """
    num_tokens = inputs["input_ids"].shape[1]
    places = list(range(num_tokens))
    if inputs.get("attention_mask") is not None:
        places = inputs["attention_mask"][0].nonzero().flatten().tolist()
    elif inputs.get("position_ids") is not None:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        places = places[: starts[1]] if len(starts) > 1 else places
    count = min(_NUM_TOKENS, len(places))
    return [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]


def figures(modules: Sequence[Adapted]) -> dict[str, torch.Tensor]:
    """Norms of a group's gradients, as they are now, and of its update, on the device."""
    found = {}
    with torch.no_grad():
        for half, kind in enumerate(("grad_a", "grad_b")):
            gradients = [each.halves[half].grad for each in modules if each.halves[half].grad is not None]
            found[kind] = _together([_norm(gradient) for gradient in gradients]) if gradients else torch.zeros(())
        found["update"] = _together([product_norm(*each.halves) * each.scale for each in modules])
    return found


def _together(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(norms))


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32)


def _frozen_weight(layer: LoraLayer) -> torch.Tensor:
    base = layer.get_base_layer()
    return dense_weight(base) if hasattr(base.weight, "quant_state") else base.weight.detach()


def _entrances(model: PeftModel, groups: Groups) -> dict[str, tuple[torch.nn.Module, LoraLayer]]:
    """For each group the adapted layer that is measured, in the middle of it, and the module whose input is the layer's.

    A hand-written MLP computes without calling its projections, so there it is the MLP itself, whose input gate and up read.
    """
    base, found = model.get_base_model(), {}
    for name, modules in groups.items():
        numbers = sorted({each.number or 0 for each in modules})
        middle = [each for each in modules if (each.number or 0) == numbers[len(numbers) // 2]]
        parent = base.get_submodule(middle[0].path.rpartition(".")[0])
        with torch.random.fork_rng(devices=[]):  # it makes small layers to try the MLP with
            form = mlp_form(parent)
        inward = form and [each for each in middle if each.path.rpartition(".")[2] in (form.gate, form.up)]
        found[name] = (parent, inward[0].layer) if inward else (middle[0].layer, middle[0].layer)
    return found
