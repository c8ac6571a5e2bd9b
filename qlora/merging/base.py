"""The base that an adapter goes into: where its files are, and what becomes of each tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import _compat
from qlora.errors import HubError, ModelError
from qlora.hub.patience import Patience
from qlora.merging.adapter import LoraFiles, Product
from qlora.merging.shards import FLOATS, Outline, Stored, read_list
from qlora.model import build
from qlora.model.safe_files import INDEX, pickled, refuse_unsafe_files
from qlora.precision import Precision
from qlora.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SINGLE = "model.safetensors"
_TYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
# Beside the weights: settings, tokenizers, templates, licences. No code, and no weights of another form.
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*"]
_SECONDS = 24 * 3600.0
_SHAPES_ONLY = Precision("fp32", "fp32", False, "for names and shapes")


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor of the checkpoint.

    Attributes:
        stored: as the base has it.
        outline: as it is written.
        name: in the model; checkpoints may have another.
        module: its module in the model, where it is one of those that an adapter or NF4 changes.
        product: what is added to it.
        nf4: whether it goes through NF4 first.
        transposed: it has shape (in, out).
        replaced: the adapter's tensor that takes its place.
    """

    stored: Stored
    outline: Outline
    name: str
    module: str | None = None
    product: Product | None = None
    nf4: bool = False
    transposed: bool = False
    replaced: Stored | None = None

    @property
    def is_copy(self) -> bool:
        """Whether it is written byte by byte as it was."""
        return self.product is None and not self.nf4 and self.replaced is None and self.outline.dtype == self.stored.dtype


def base_folder(base: str, revision: str | None, progress: Progress) -> Path:
    """The folder with a base's files; one on the Hub is downloaded into the client's cache, or taken from it.

    Raises:
        ModelError: not there, gated, unreachable, pickled.
        HubError: the way to the Hub broke again and again.
    """
    from safetensors import SafetensorError

    located = build.locate_base(base)
    try:
        refuse_unsafe_files(located, revision=revision)
        folder = Path(located).expanduser()
        if folder.is_dir():
            return folder
        # The client has time-outs of its own for downloads, and they may be long.
        patience = Patience(_SECONDS, stall_seconds=_SECONDS, tell=progress.note)
        return patience.call(f"the download of {base}", lambda: _download(base, revision))
    except (ModelError, HubError):
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise build.explain(error, base, "weights") from error


def list_tensors(base: str, folder: Path) -> list[Stored]:
    """Every tensor of a checkpoint, file after file.

    Raises:
        ModelError: there are no weights as safetensors, files are missing or cut short, or they are quantised already.
    """
    from safetensors import SafetensorError

    try:
        _refuse_quantised(base, json.loads((folder / "config.json").read_text(encoding="utf-8")))
        if (folder / SINGLE).is_file():
            return read_list(folder / SINGLE)
        if not (folder / INDEX).is_file():
            if any(folder.glob("*.bin")):
                raise pickled(base)
            raise ModelError(f"{base} has neither {SINGLE} nor {INDEX}.", "Name the folder with the base's weights: --base MODEL")
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        found = [stored for name in sorted(set(places.values())) for stored in read_list(folder / name)]
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise build.explain(error, base, "weights") from error
    listed = [stored for stored in found if places.get(stored.name) == stored.path.name]
    if len(listed) < len(places):
        lost = min(set(places) - {stored.name for stored in listed})
        raise ModelError(f"{base}: {INDEX} names {lost}, which its file does not hold.", "Download or save the model again.")
    return listed


def plan_changes(
    base: str, config: PreTrainedConfig, tensors: Iterable[Stored], adapter: LoraFiles, *, into: str, dtype: str | None,
    trained: Precision,
) -> list[Change]:
    """What becomes of every tensor of the checkpoint, under the checkpoint's own names.

    Args:
        into: "16bit" or "nf4".
        dtype: a type for all numbers of the result (bf16, fp16, fp32); None leaves each tensor its own.
        trained: of the training, which decides what was quantised.

    Raises:
        ModelError: the adapter is for another model, or changes what this one keeps in another form, or twice.
    """
    skeleton = skeleton_of(config)
    tensors = list(tensors)
    names, converted = _compat.checkpoint_names(skeleton, [stored.name for stored in tensors], build.TEXT_PART_KEYS)
    wanted = _wanted(base, skeleton, adapter)
    quantised = _quantised_modules(config, trained) if into == "nf4" else set()
    clash = [key for key in converted if names[key] in wanted]
    if clash:
        raise ModelError(f"{base} keeps {clash[0]} in another form than its model, which cannot be merged tensor by tensor.",
                         "Merge it with PEFT: PeftModel.from_pretrained(base, adapter).merge_and_unload()")
    changes = []
    for stored in tensors:
        name = names[stored.name]
        module = name.rpartition(".")[0] if stored.name not in converted else None
        product, replaced = wanted.pop(name, (None, None))
        nf4 = module in quantised and name == f"{module}.weight"
        if (product or replaced or nf4) and stored.dtype not in FLOATS:
            raise ModelError(f"{base} keeps {stored.name} as {stored.dtype}, which nothing can be added to.",
                             "Name the original 16-bit model: --base MODEL")
        changes.append(Change(
            stored, _outline(stored, dtype), name, module if product or nf4 else None, product, nf4,
            bool(product or nf4) and _is_transposed(skeleton, module), replaced,
        ))
    if wanted:
        raise ModelError(f"{base} holds no weights under {min(wanted)}, which the adapter changes.",
                         "Is it the base that the adapter was trained on? Name that one: --base MODEL")
    return changes


def nf4_weights(config: PreTrainedConfig, changes: Iterable[Change], trained: Precision) -> dict[str, bool]:
    """Names in the model of the weights that training has in NF4, and whether each has shape (in, out)."""
    skeleton = skeleton_of(config)
    modules = _quantised_modules(config, trained)
    held = {change.name for change in changes}
    return {f"{module}.weight": _is_transposed(skeleton, module) for module in sorted(modules) if f"{module}.weight" in held}


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights, for names and shapes."""
    return build.plain_skeleton(config, _SHAPES_ONLY)


# --- details -----------------------------------------------------------------------------------------------------------


def _download(base: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # Small files alone first: repositories also hold the weights in forms that are not wanted here.
    folder = Path(snapshot_download(base, revision=revision, allow_patterns=_SMALL_FILES))
    revision = folder.name  # the commit, so that a branch that moves on cannot give half of two
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [SINGLE]
    try:
        for name in names:
            hf_hub_download(base, name, revision=revision)
    except LocalEntryNotFoundError:  # no network, and not in the cache
        raise
    except EntryNotFoundError:
        raise pickled(base) from None
    return folder


def _refuse_quantised(base: str, raw: Mapping[str, Any]) -> None:
    found = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config")
    if found:
        raise ModelError(f"{base} is stored quantised ({found.get('quant_method', 'unknown')}); an adapter is merged into "
                         "16-bit weights.",
                         "Name the original 16-bit model: --base MODEL")


def _wanted(base: str, skeleton: PreTrainedModel, adapter: LoraFiles) -> dict[str, tuple[Product | None, Stored | None]]:
    """The change of each of the model's tensors, by name.

    Raises:
        ModelError: a module that the model does not have, or has in another shape, or shares.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    other = "Is it the base that the adapter was trained on? Name that one: --base MODEL"
    modules = dict(skeleton.named_modules())
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    changes: dict[str, tuple[Product | None, Stored | None]] = {}
    for name, product in adapter.products.items():
        module = modules.get(name)
        if not isinstance(module, (nn.Linear, Conv1D)):
            what = "no such module" if module is None else f"a {type(module).__name__} there"
            raise ModelError(f"The adapter changes {name}; {base} has {what}.", other)
        shape = tuple(module.weight.shape) if isinstance(module, nn.Linear) else tuple(module.weight.shape)[::-1]
        if shape != (product.b.shape[0], product.a.shape[1]):
            raise ModelError(f"The adapter's {name} is for a matrix of {product.b.shape[0]} x {product.a.shape[1]}; {base} has "
                             f"one of {shape[0]} x {shape[1]}.", other)
        changes[f"{name}.weight"] = (product, None)
    for name, stored in adapter.replaced.items():
        if name not in parameters or tuple(parameters[name].shape) != stored.shape:
            has = "none" if name not in parameters else f"one of {' x '.join(map(str, parameters[name].shape))}"
            raise ModelError(f"The adapter holds {name} whole, of {' x '.join(map(str, stored.shape))}; {base} has {has}.",
                             "A vocabulary that has grown cannot be merged here; PEFT can: merge_and_unload().")
        changes[name] = (changes.get(name, (None, None))[0], stored)
    for name, (product, _) in changes.items():
        twins = [other for other, parameter in parameters.items() if parameter is parameters[name] and other != name]
        if twins and (product is not None or name in adapter.apart):
            raise ModelError(f"The adapter changes {name}, which {base} shares with {twins[0]}; merged, both would change.",
                             "Load the adapter beside its base instead, or train one without that target.")
    return changes


def _quantised_modules(config: PreTrainedConfig, trained: Precision) -> set[str]:
    """Names of the modules that training kept in NF4, with an adapter or without."""
    import bitsandbytes as bnb

    from qlora.model.meta import build_base_on_meta

    model = build_base_on_meta(config, precision=trained, attention="eager")  # which every family has; it is not run
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def _is_transposed(skeleton: PreTrainedModel, module: str | None) -> bool:
    from transformers.pytorch_utils import Conv1D

    return module is not None and isinstance(skeleton.get_submodule(module), Conv1D)


def _outline(stored: Stored, dtype: str | None) -> Outline:
    if dtype is None or stored.dtype not in FLOATS:
        return Outline(stored.name, stored.dtype, stored.shape, stored.size_bytes)
    return Outline(stored.name, _TYPES[dtype], stored.shape, stored.num_numbers * FLOATS[_TYPES[dtype]])
