"""Put an adapter on a base, by PEFT's own loading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora.adapted.base import ANOTHER_BASE
from qlora.errors import ModelError
from qlora.hardware import Device
from qlora.hub.adapter import Adapter
from qlora.precision import Precision
from qlora.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def put_on(
    model: PreTrainedModel | PeftModel, adapter: Adapter, name: str, device: Device, precision: Precision, progress: Progress
) -> PeftModel:
    """PEFT's own loading, and a look at whether every number of the file found its place.

    Args:
        model: the base, or one that has adapters already.
        name: what PEFT shall call it.

    Raises:
        ModelError: the adapter is of another base, or damaged.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from qlora.precision import torch_dtype
    from qlora.training.recovery import is_out_of_memory

    options = {"autocast_adapter_dtype": False, "torch_device": device.torch_name}
    with progress.stage(f"Loading the adapter {adapter.name}"):
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(str(adapter.folder), name, key_mapping=_renamed(model), **options)
            else:
                model = PeftModel.from_pretrained(_without_device_map(model), str(adapter.folder), name, **options)
        except SafetensorError as error:
            raise ModelError(f"The weights of {adapter.name} are damaged: {_brief(error)}",
                             "Copy or fetch the adapter again.") from error
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(f"The adapter {adapter.name} does not fit {adapter.base}: {_brief(error)}", ANOTHER_BASE) from error
        _refuse_strangers(model, adapter, name)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:  # as in training
                parameter.data = parameter.data.to(torch_dtype(precision.adapters))
    return model.eval()


def _without_device_map(base: PreTrainedModel) -> PreTrainedModel:
    """All of the base is where it should be. From its list of devices PEFT would take that parts of it are to be moved about."""
    base.__dict__.pop("hf_device_map", None)
    return base


def _renamed(model: PeftModel) -> dict[str, str] | None:
    """Weights that a new version of a model's class calls otherwise, as `PeftModel.from_pretrained` looks for it."""
    return getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None) or None


def _refuse_strangers(model: PeftModel, adapter: Adapter, name: str) -> None:
    """PEFT loads what it finds a place for, and passes over the rest."""
    from peft import get_peft_model_state_dict, load_peft_weights

    held = set(load_peft_weights(str(adapter.folder), device="cpu", key_mapping=_renamed(model)))
    wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    strangers = sorted(held - wanted - own)
    missing = sorted(wanted - held)
    if strangers or missing:
        said = (f"it has weights for {strangers[0]}, which the base has not" if strangers
                else f"it has no weights for {missing[0]}, which its config names")
        count = len(strangers or missing)
        raise ModelError(f"The adapter {adapter.name} does not fit {adapter.base}: {said} ({count} of this kind).", ANOTHER_BASE)


def _brief(error: Exception) -> str:
    """What a library says, on one line: for shapes that differ, the first that do."""
    from qlora.results.facts import printable

    lines: list[Any] = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
    return printable(first)[:300]
