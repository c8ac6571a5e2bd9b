"""A model without weights: built on the meta device from its config, and asked which module is what.

Nothing is derived from a table of families; names decide only whether a block is attention or MLP. Checked with the
default config of every causal model class of transformers 5.23.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Literal

from qlora.catalog.lookup import first_line, has_remote_class, is_causal
from qlora.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

Kind = Literal["attention", "mlp", "other"]

# Names of blocks inside a layer, over the families of transformers. The leftmost part of a place that is one decides.
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|expert|^(ff|fc_?\w*|intermediate|output|lin[12]|w[123])$", re.IGNORECASE)
# What a projection does where its block is called "mixer", whichever kind it is of (Nemotron-H).
_LEAVES = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a config (of an encoder its bare model), on meta: no memory, an 8B in 0.03 s.

    Raises:
        ModelError: transformers cannot build it.
    """
    import torch
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM

    factory = AutoModelForCausalLM if is_causal(config) else AutoModel
    try:
        with torch.device("meta"):
            return factory.from_config(copy.deepcopy(config), trust_remote_code=has_remote_class(config))
    except Exception as error:  # model classes check their config in ways of their own: any type of error comes out
        raise ModelError(
            f"{getattr(config, 'name_or_path', '') or 'The config'} ({config.model_type}): transformers "
            f"{transformers.__version__} cannot build the model: {first_line(error)}",
            "Compare config.json with that of a model of the same family.",
        ) from error


def find_layers(config: PreTrainedConfig, modules: dict[str, nn.Module]) -> str:
    """Name of the list of layers: of the lists as long as the config says, else of all, the one with most parameters.

    Raises:
        ModelError: there is no list of layers.
    """
    from torch import nn

    lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    num_layers = getattr(config, "num_hidden_layers", None)
    lists = {name: module for name, module in lists.items() if len(module) == num_layers} or lists
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    if not sizes:
        raise ModelError(
            f"{getattr(config, 'name_or_path', '') or config.model_type} is not a stack of layers, so adapters have no "
            "place in it.",
            "Name a transformer language model.",
        )
    return max(sizes, key=sizes.__getitem__)


def linear_modules(modules: dict[str, nn.Module]) -> dict[str, tuple[nn.Module, bool]]:
    """Every linear module by name, and whether its weight is stored as (in, out), as GPT-2's Conv1D does."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)
    return {name: (m, isinstance(m, Conv1D)) for name, m in modules.items() if isinstance(m, kinds)}


def quantised_names(model: PreTrainedModel, linear: dict[str, tuple[nn.Module, bool]]) -> list[str]:
    """Modules that transformers' `replace_with_bnb_linear` replaces; the names it keeps come from its own functions.

    Subclasses of nn.Linear (FalconLinear, Llama4Router) are not replaced.
    """
    from torch import nn
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    plain = [name for name, (module, transposed) in linear.items() if transposed or type(module) is nn.Linear]
    return [name for name in plain if should_convert_module(name, kept)]


def holds_experts(module: nn.Module) -> bool:
    """Whether the module's own parameters are experts in 3-D tensors."""
    return "expert" in type(module).__name__.lower() and any(p.ndim == 3 for p in module.parameters(recurse=False))


def place_of(path: str, layers_path: str) -> str:
    """The name inside a layer, with * for indices: "model.layers.3.mlp.up_proj" is at "mlp.up_proj"."""
    inner = re.sub(rf"^{re.escape(layers_path)}\.\d+\.", "", path)
    return ".".join("*" if part.isdigit() else part for part in inner.split("."))


def kind_of(path: str, layers_path: str, modules: dict[str, nn.Module]) -> Kind:
    """Attention, mlp, or other: routers, per-layer inputs, state-space mixers, and all that is not in a layer."""
    if not path.startswith(f"{layers_path}."):
        return "other"
    place = place_of(path, layers_path)
    parts = place.split(".")
    chooses = parts[-1] == "gate" and hasattr(modules[path.rpartition(".")[0]], "experts")
    if chooses or "router" in place or "gate" in parts[:-1] or parts[-1].endswith("expert_gate"):
        return "other"  # they choose experts: few weights, and an adapter there can upset the balance between experts
    for part in parts:
        if part.endswith("norm"):
            continue  # "post_attention_layernorm" is no attention block
        if _ATTENTION.search(part):
            return "attention"
        if _MLP.search(part):
            return "mlp"
    return next((kind for kind, leaves in _LEAVES.items() if parts[-1] in leaves), "other")


def layer_kinds(model: PreTrainedModel) -> list[tuple]:
    """What each layer is made of, equal for layers that are alike: its type where the config has several, and its weights."""
    layers = model.get_submodule(find_layers(model.config, dict(model.named_modules())))
    types = getattr(model.config, "layer_types", None) or [None] * len(layers)
    return [(kind, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())) for kind, layer in zip(types, layers)]
