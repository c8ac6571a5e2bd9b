"""A base and an adapter on it, ready to write and to be measured: the base in NF4 as in training, the adapter by PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora import _compat
from qlora.errors import HardwareError, ModelError
from qlora.hardware import Device, find_device
from qlora.hub.adapter import Adapter
from qlora.precision import Precision, choose_precision
from qlora.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora.architecture import Architecture

_ANOTHER_BASE = "Name the base that it was trained on: --base MODEL"


@dataclass(frozen=True)
class Adapted:
    """`model` is in evaluation mode, with the adapter on. `notes` are what somebody who uses it should know, one line each."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: Device
    precision: Precision
    adapter: Adapter
    notes: tuple[str, ...] = ()

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside, the model is the bare base."""
        return self.model.disable_adapter()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """How the model must be run: without gradients, and under autocast where adapters are of another type than the rest."""
        import torch

        from qlora.precision import torch_dtype

        kind, dtype = self.device.kind, torch_dtype(self.precision.compute)
        with torch.no_grad(), torch.autocast(kind, dtype=dtype) if self.precision.autocast else nullcontext():
            yield


def load_adapted(
    adapter: Adapter, *, device: str = "auto", dtype: str = "auto", tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> Adapted:
    """Load the base in 4 bits and put the adapter on it. No code that comes with either is run; weights are safetensors alone.

    Args:
        device: auto, cpu or cuda.
        dtype: of computation: auto, bf16, fp16 or fp32. auto takes what the adapter's run was given, where this device has it.
        tokenizer: what `find_tokenizer` gave, where that was needed before.

    Raises:
        HardwareError: no such device or type, or too little memory.
        ModelError: the base or its tokenizer cannot be had, or the adapter does not fit it.
    """
    from qlora.training.recovery import is_out_of_memory

    progress, found = progress or Progress(), find_device(device)
    precision = choose_precision(_dtype_of(adapter, found) if dtype == "auto" else dtype, found)
    try:
        base = _build(adapter, found, precision, progress)
        model = _put_on(base, adapter, precision, progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise HardwareError(f"{found.name} has too little memory for {adapter.base} in 4 bits.",
                            "Free some, or use --device cpu, which takes RAM instead.") from error
    tokenizer = tokenizer or find_tokenizer(adapter, progress)
    notes = _about_vocabulary(model, tokenizer)
    for note in notes:
        progress.note(note)
    return Adapted(model, tokenizer, found, precision, adapter, notes)


def find_architecture(adapter: Adapter) -> Architecture:
    """What the config of the base says of it. Reads no weights.

    Raises:
        ModelError: it cannot be had.
    """
    from qlora.architecture import describe, find_config
    from qlora.model.build import locate_base

    try:
        return describe(find_config(locate_base(adapter.base), revision=adapter.base_revision))
    except ModelError as error:
        raise _of_base(error, adapter) from error


# --- the base ----------------------------------------------------------------------------------------------------------


def _dtype_of(adapter: Adapter, device: Device) -> str:
    """What the run was given; what another device chose by itself says nothing about this one."""
    given = adapter.run.setting("model.dtype") if adapter.run else None
    return given if given == "fp32" or (given == "bf16" and device.has_bf16) else "auto"


def _build(adapter: Adapter, device: Device, precision: Precision, progress: Progress) -> PreTrainedModel:
    from qlora.architecture import find_config
    from qlora.model.build import build_base, locate_base

    if adapter.run and adapter.run.setting("model.weights") == "random":
        raise ModelError(f"{adapter.name} was trained on random weights (model.weights: random), to show memory and speed; it "
                         "has nothing to say.", "Train it on the model itself.")
    attention = adapter.run.setting("model.attention") if adapter.run else None
    _compat.hide_loading_bars()
    try:
        with progress.stage(f"Loading {adapter.base} in 4 bits") as update:
            place = locate_base(adapter.base, lambda share, text: update(round(share * 100), 100))
            config = find_config(place, revision=adapter.base_revision)
            return build_base(
                place, config, device=device, precision=precision, revision=adapter.base_revision,
                attention=attention if attention in ("sdpa", "eager") else "sdpa",
            )
    except ModelError as error:
        raise _of_base(error, adapter) from error


def _of_base(error: ModelError, adapter: Adapter) -> ModelError:
    """What is wrong with the base, for somebody who has named only the adapter."""
    if "trust_remote_code" in error.fix:
        return ModelError(error.problem, "Code of a model is never run here. " + _ANOTHER_BASE)
    return ModelError(error.problem,
                      f"It is the base of {adapter.name}. {error.fix}\nOr take another copy of it: --base MODEL")


# --- the adapter -------------------------------------------------------------------------------------------------------


def _put_on(base: PreTrainedModel, adapter: Adapter, precision: Precision, progress: Progress) -> PeftModel:
    """PEFT's own loading, and a look at whether every number of the file found its place.

    Raises:
        ModelError: the adapter is of another base, or damaged.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from qlora.precision import torch_dtype
    from qlora.training.recovery import is_out_of_memory

    with progress.stage(f"Loading the adapter {adapter.name}"):
        try:
            model = PeftModel.from_pretrained(base, str(adapter.folder), autocast_adapter_dtype=False)
        except SafetensorError as error:
            raise ModelError(f"The weights of {adapter.name} are damaged: {_brief(error)}",
                             "Copy or fetch the adapter again.") from error
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(f"The adapter {adapter.name} does not fit {adapter.base}: {_brief(error)}", _ANOTHER_BASE) from error
        _refuse_strangers(model, adapter)
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # as in training
                parameter.data = parameter.data.to(torch_dtype(precision.adapters))
    return model.eval()


def _refuse_strangers(model: PeftModel, adapter: Adapter) -> None:
    """PEFT loads what it finds a place for, and passes over the rest."""
    from peft import get_peft_model_state_dict, load_peft_weights

    renamed = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None)  # as `PeftModel.from_pretrained` does it
    held = set(load_peft_weights(str(adapter.folder), device="cpu", key_mapping=renamed or None))
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    strangers = sorted(held - wanted - own)
    missing = sorted(wanted - held)
    if strangers or missing:
        said = (f"it has weights for {strangers[0]}, which the base has not" if strangers
                else f"it has no weights for {missing[0]}, which its config names")
        count = len(strangers or missing)
        raise ModelError(f"The adapter {adapter.name} does not fit {adapter.base}: {said} ({count} of this kind).", _ANOTHER_BASE)


# --- the tokenizer -----------------------------------------------------------------------------------------------------


def find_tokenizer(adapter: Adapter, progress: Progress) -> PreTrainedTokenizerBase:
    """The adapter's own, with the chat template that it was trained with; else the base's.

    Raises:
        ModelError: neither can be had.
    """
    from qlora.model.build import load_tokenizer, locate_base

    folder = adapter.folder
    try:
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
            return load_tokenizer(str(folder))
        tokenizer = load_tokenizer(locate_base(adapter.base), revision=adapter.base_revision)
    except ModelError as error:
        raise _of_base(error, adapter) from error
    template = folder / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    progress.note("The adapter has no tokenizer beside it; the base's is used.")
    return tokenizer


def _about_vocabulary(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Token numbers that the model has no embedding for."""
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= size:
        return ()
    return (f"The tokenizer has {len(tokenizer):,} tokens, and the base embeddings for {size:,}: it cannot read the others.",)


def _brief(error: Exception) -> str:
    """What a library says, on one line: for shapes that differ, the first that do."""
    from qlora.results.facts import printable

    lines: list[Any] = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
    return printable(first)[:300]
