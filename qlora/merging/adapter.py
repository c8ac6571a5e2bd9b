"""What an adapter adds to which matrix: read from its files, and refused where that is not a sum.

Only settings that are known to leave W + s B A as the whole of the adapter pass: an unknown one could change what it computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import ModelError
from qlora.hub.adapter import CONFIG, WEIGHTS, read_document
from qlora.merging.shards import FLOATS, Stored, read_list, read_rows

if TYPE_CHECKING:
    import torch

# Settings of peft.LoraConfig (0.21) that say who, where and how it was trained, and nothing of what is computed.
_HARMLESS = {
    "auto_mapping", "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "r", "lora_alpha", "use_rslora",
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save", "init_lora_weights", "runtime_config", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "ensure_weight_tying",
}
# These start from a changed base, which the files do not hold.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_BY_PEFT = "Merge it with PEFT: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Product:
    """What is added to the weight of one module: `scaling` B A, A of shape (r, in) and B of shape (out, r)."""

    a: Stored
    b: Stored
    scaling: float

    def delta(self, *, transposed: bool, rows: slice) -> torch.Tensor:
        """Rows of what is added, in fp32.

        Args:
            transposed: the weight has shape (in, out), as GPT-2's have.
        """
        a, b = read_rows(self.a).float(), read_rows(self.b).float()
        return (b @ a[:, rows]).T * self.scaling if transposed else (b[rows] @ a) * self.scaling


@dataclass(frozen=True)
class LoraFiles:
    """An adapter as its files hold it.

    Attributes:
        products: by the module's name in the model.
        replaced: whole tensors by their name there, which take the place of the base's.
        apart: those of them that PEFT keeps beside the base's (modules_to_save), so that what shares the base's stays.
    """

    products: Mapping[str, Product]
    replaced: Mapping[str, Stored]
    apart: frozenset[str]
    size_bytes: int


def read_adapter(folder: Path) -> LoraFiles:
    """Look at an adapter. Weights are not read yet.

    Raises:
        ModelError: it cannot be read, is no LoRA, or adds more than a product.
    """
    from safetensors import SafetensorError

    config = read_document(folder / CONFIG)
    _refuse_others(config)
    try:
        tensors = {stored.name: stored for stored in read_list(folder / WEIGHTS)}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read: {error}", "Save or download the adapter again.") from error
    halves: dict[str, dict[str, Stored]] = {}
    replaced: dict[str, Stored] = {}
    for name, stored in tensors.items():
        bare = name.removeprefix(_PREFIX)
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", bare)
        if not name.startswith(_PREFIX) or stored.dtype not in FLOATS or (".lora_" in bare and not found):
            raise ModelError(f"The adapter in {folder} holds {name}, which is no part of a LoRA on a linear layer.", _BY_PEFT)
        if found:
            halves.setdefault(found[1], {})[found[2]] = stored
        else:  # of embeddings and heads that have an adapter, PEFT saves the base's own as well
            replaced[bare.replace(".base_layer.", ".")] = stored
    try:
        products = {module: _product(folder, module, pair, config) for module, pair in halves.items()}
        apart = frozenset(name for name in replaced if _is_apart(name, config.get("modules_to_save") or ()))
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise ModelError(f"{CONFIG} in {folder} cannot be understood: {type(error).__name__} {error}",
                         "Save or download it again.") from error
    if not products and not replaced:
        raise ModelError(f"The adapter in {folder} holds no LoRA weights.", "Save or download it again.")
    return LoraFiles(products, replaced, apart, sum(stored.size_bytes for stored in tensors.values()))


# --- details -----------------------------------------------------------------------------------------------------------


def _refuse_others(config: Mapping[str, Any]) -> None:
    """Raises ModelError for whatever is not plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"The adapter is of the kind {config.get('peft_type')}; only LoRA can be merged here.",
                         "Load it beside its base with PEFT instead.")
    if config.get("use_dora"):
        raise ModelError("The adapter is a DoRA (use_dora: true), which also rescales the base's columns; that is not merged.",
                         _BY_PEFT)
    if config.get("bias", "none") != "none":
        raise ModelError(f"The adapter holds biases of the base (bias: {config['bias']}), which are not merged here.",
                         _BY_PEFT)
    if config.get("init_lora_weights", True) not in _STARTS:
        raise ModelError(f"The adapter was started as {config['init_lora_weights']!r}, which takes a part of the base away; what "
                         "is left of the base is not in the adapter's files.",
                         "Convert it to plain LoRA where it was trained (PEFT: save_pretrained with "
                         "path_initial_model_for_weight_conversion).")
    unknown = sorted(key for key, value in config.items() if value and key not in _HARMLESS and key != "bias")
    if unknown:
        raise ModelError(f"The adapter uses {', '.join(unknown)}, which may add more than a product of two matrices.",
                         _BY_PEFT)


def _product(folder: Path, module: str, pair: Mapping[str, Stored], config: Mapping[str, Any]) -> Product:
    if len(pair) < 2 or any(len(half.shape) != 2 for half in pair.values()):
        raise ModelError(f"The adapter in {folder} has not both matrices of {module}.", "Save or download it again.")
    a, b = pair["A"], pair["B"]
    rank = int(_of_module(module, config.get("rank_pattern") or {}, config["r"]))
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ModelError(f"The adapter's config says rank {rank} for {module}, and its weights have {a.shape[0]} and "
                         f"{b.shape[1]}.",
                         "Its two files do not belong together; save or download it again.")
    alpha = float(_of_module(module, config.get("alpha_pattern") or {}, config["lora_alpha"]))
    # Without the root: https://arxiv.org/abs/2106.09685, section 4.1; with it (rsLoRA): https://arxiv.org/abs/2312.03732
    return Product(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_module(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern that the module's name ends with (PEFT, utils/other.py: get_pattern_key)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_apart(name: str, modules: Sequence[str]) -> bool:
    module = name.rpartition(".")[0]
    return any(module == each or module.endswith(f".{each}") for each in modules)
