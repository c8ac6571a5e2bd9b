"""A base and adapters on it, ready to write and to be measured: the base in NF4 as in training, the adapters by PEFT.

One base may carry several adapters. One answers at a time, and which one is changed in a moment: nothing is loaded or copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import _compat
from qlora.adapted.base import base_explained, find_architecture
from qlora.adapted.loading import put_on
from qlora.adapted.tokenizer import about_vocabulary, find_tokenizer, find_tokenizers
from qlora.errors import HardwareError, ModelError
from qlora.hardware import Device, find_device
from qlora.hub.adapter import Adapter
from qlora.precision import Precision, choose_precision
from qlora.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora.engine.install import Engine
    from qlora.training.evaluating import EvaluationPlan

__all__ = ["Adapted", "base_explained", "find_architecture", "find_precision", "find_tokenizer", "find_tokenizers",
           "load_adapted", "refuse_other_bases", "short_names"]


@dataclass
class Adapted:
    """A base with its adapters, in evaluation mode.

    Attributes:
        model: with the adapter `active` switched on.
        adapters: by a short name, in the order in which they were given. The name is that of the run or repository.
        active: the adapter that answers; None is the bare base.
        engine: what the memory engine has put into the model; its loss, where it has one.
        plan: where the parts of the model live, and how much goes through it at once.
        notes: what somebody who uses it should know, one line each.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: Device
    precision: Precision
    adapters: Mapping[str, Adapter]
    engine: Engine
    plan: EvaluationPlan
    notes: tuple[str, ...] = ()
    active: str | None = None
    _tokenizers: Mapping[str, PreTrainedTokenizerBase] = field(default_factory=dict, repr=False)
    _names_in_peft: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def adapter(self) -> Adapter:
        """The first one."""
        return next(iter(self.adapters.values()))

    def tokenizer_of(self, name: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer of an adapter, with the chat template of its training; the bare base gets that of the first one."""
        return self._tokenizers.get(name, self.tokenizer)

    def use(self, name: str | None) -> None:
        """Let an adapter answer from now on, or, with None, the bare base.

        Raises:
            ModelError: there is no such adapter.
        """
        if name is None:
            self.model.base_model.disable_adapter_layers()
        elif name in self.adapters:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self._names_in_peft[name], inference_mode=True)
        else:
            raise ModelError(f"No adapter is called {name!r}.", f"There is: {', '.join(self.adapters)}.")
        self.active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """`use`, inside of it; afterwards it is as it was before.

        Raises:
            ModelError: there is no such adapter.
        """
        before = self.active
        self.use(name)
        try:
            yield
        finally:
            self.use(before)

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside, the model is the bare base."""
        return self.using(None)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """How the model must be run: without gradients, and under autocast where adapters are of another type than the rest."""
        import torch

        with torch.no_grad(), self.autocast():
            yield

    def autocast(self) -> AbstractContextManager:
        """Autocast where adapters are of another type than the rest."""
        import torch

        from qlora.precision import torch_dtype

        if not self.precision.autocast:
            return nullcontext()
        return torch.autocast(self.device.kind, dtype=torch_dtype(self.precision.compute))

    def close(self) -> None:
        """Let go of threads and files that streamed layers come through."""
        self.engine.close()


def load_adapted(
    adapters: Adapter | Sequence[Adapter], *, device: str = "auto", dtype: str = "auto",
    tokenizer: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase] | None = None, progress: Progress | None = None,
    plan: EvaluationPlan | None = None,
) -> Adapted:
    """Load the base in 4 bits, once, and put the adapters on it; the first one answers. No code that comes with any of them is
    run; weights are safetensors alone.

    Args:
        adapters: one, or several of the same base.
        device: auto, cpu or cuda.
        dtype: of computation: auto, bf16, fp16 or fp32. auto takes what the first adapter's run was given, where this device
            has it.
        tokenizer: of the adapter, or of all of them, where they were needed before; see `find_tokenizer`.
        plan: where its parts go; None makes one for talking.

    Raises:
        HardwareError: no such device or type, or too little memory.
        ModelError: the base or its tokenizer cannot be had, an adapter does not fit it, or they have different bases.
    """
    from qlora.training.evaluating import plan_talk
    from qlora.training.recovery import is_out_of_memory

    adapters = (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    progress = progress or Progress()
    refuse_other_bases(adapters)
    found, precision = find_precision(adapters[0], device, dtype)
    named, first = dict(zip(short_names(adapters), adapters, strict=True)), adapters[0]
    known = list(tokenizer) if isinstance(tokenizer, Sequence) else [] if tokenizer is None else [tokenizer]
    tokenizers = dict(zip(named, [*known, *find_tokenizers(adapters[len(known):], progress)], strict=True))
    with base_explained(first):
        plan = plan or plan_talk(adapters, found, precision, progress)
    try:
        model, engine, names = _assemble(named, found, precision, plan, progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise HardwareError(f"{found.name} has too little memory for {first.base} in 4 bits.",
                            "Free some, or use --device cpu, which takes RAM instead.") from error
    notes = tuple(dict.fromkeys(note for each in tokenizers.values() for note in about_vocabulary(model, each)))
    for note in notes:
        progress.note(note)
    adapted = Adapted(model, next(iter(tokenizers.values())), found, precision, named, engine, plan, notes,
                      _tokenizers=tokenizers, _names_in_peft=names)
    adapted.use(next(iter(named)))
    if engine.schedule is not None:
        engine.schedule.autocast = adapted.autocast
    return adapted


def find_precision(adapter: Adapter, device: str = "auto", dtype: str = "auto") -> tuple[Device, Precision]:
    """The device, and the type of numbers there.

    Raises:
        HardwareError: no such device, or it has no such type.
    """
    try:
        found = find_device(device)
    except HardwareError as error:  # it speaks of a recipe's setting
        raise HardwareError(error.problem.replace("memory.device is", "--device is"), "Use --device cpu.") from error
    return found, choose_precision(_dtype_of(adapter, found) if dtype == "auto" else dtype, found)


# --- several at once ---------------------------------------------------------------------------------------------------


def short_names(adapters: Sequence[Adapter]) -> list[str]:
    """A name for each, which a person can type: that of the run or repository, with -2 and so on where two have the same one."""
    from qlora.results.facts import printable

    names: list[str] = []
    for adapter in adapters:
        path = Path(adapter.name.partition("@")[0])
        if adapter.revision is None:  # a folder
            path = adapter.folder.resolve()
            path = path.parent if path.name == "adapter" else path
        name, number = printable(path.name.replace(" ", "-")) or "adapter", 2
        unique = name
        while unique in (*names, "base"):  # which is what the base is called beside them
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return names


def refuse_other_bases(adapters: Sequence[Adapter]) -> None:
    """
    Raises:
        ModelError: two of them have different bases.
    """
    def place(base: str) -> str:
        folder = Path(base).expanduser()
        return str(folder.resolve()) if folder.is_dir() else base

    first = adapters[0]
    for other in adapters[1:]:
        revisions = {first.base_revision, other.base_revision} - {None}
        if place(first.base) == place(other.base) and len(revisions) < 2:
            continue
        ours, theirs = (f"{each.base}{f' at {each.base_revision[:12]}' if each.base_revision and len(revisions) > 1 else ''}"
                        for each in (first, other))
        raise ModelError(f"{first.name} was trained on {ours}, and {other.name} on {theirs}; one base is loaded for all of them.",
                         "Name adapters of one base, or, if these are copies of the same, say where it is: --base MODEL")


# --- the base ----------------------------------------------------------------------------------------------------------


def _dtype_of(adapter: Adapter, device: Device) -> str:
    """What the run was given; what another device chose by itself says nothing about this one."""
    given = adapter.run.setting("model.dtype") if adapter.run else None
    return given if given == "fp32" or (given == "bf16" and device.has_bf16) else "auto"


def _assemble(
    adapters: Mapping[str, Adapter], device: Device, precision: Precision, plan: EvaluationPlan, progress: Progress
) -> tuple[PeftModel, Engine, dict[str, str]]:
    """Base, adapters and what the plan's placement does to both; and what PEFT calls the adapters."""
    from qlora.engine.install import install
    from qlora.hardware import limit_memory
    from qlora.training.building import find_base
    from qlora.training.evaluating import order_base

    first = next(iter(adapters.values()))
    if first.run and first.run.setting("model.weights") == "random":
        raise ModelError(f"{first.name} was trained on random weights (model.weights: random), to show memory and speed; it "
                         "has nothing to say.", "Train it on the model itself.")
    _compat.hide_loading_bars()
    if plan.budget_bytes is not None:
        limit_memory(device, plan.budget_bytes - plan.context_bytes)
    with base_explained(first):
        order = order_base(list(adapters.values()), device, precision, plan, progress)
        base = find_base(order, progress)
    # PEFT looks for an adapter's name anywhere in that of a weight, so none may be part of another.
    names = {name: "default" if number == 0 else f"adapter_{number:02}" for number, name in enumerate(adapters)}
    model: Any = base.model
    for name, adapter in adapters.items():
        model = put_on(model, adapter, names[name], device, precision, progress)
    engine = install(model, plan.placement, layers_path=order.layers_path, device=device.torch_name, stream=base.stream,
                     store=base.store)
    return model, engine, names
