"""From a config to facts: how many parameters, which of them become 4-bit, and which projections can have an adapter.

The model is built on the meta device, without weights, and asked; nothing is derived from a table of families.
Sources: LoRA, https://arxiv.org/abs/2106.09685 (an adapter on a projection from `in` to `out` has r x (in + out)
parameters); QLoRA, https://arxiv.org/abs/2305.14314 (NF4 with double quantisation, section 3).
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from qlora.catalog import published_parameters
from qlora.catalog.lookup import find_config, is_causal
from qlora.catalog.skeleton import (
    Kind, build_skeleton, find_layers, holds_experts, kind_of, linear_modules, place_of, quantised_names,
)
from qlora.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

__all__ = [
    "Architecture", "Projection", "TargetSelection",
    "describe", "find_config", "inspection", "is_causal", "lora_parameters", "nf4_bytes", "select_targets",
]


@dataclass(frozen=True)
class Projection:
    """Linear modules of one name, place and shape, over all layers.

    Attributes:
        name: last part of the module's name, what a person writes as a target: "c_proj".
        kind: attention or mlp; "other" for routers, per-layer inputs and the like, which get no adapter by default.
        in_features, out_features: x of shape (..., in) becomes (..., out), however the weight is stored.
        count: how many modules, = len(paths).
        module: "Linear", or "Conv1D" where the weight is stored transposed (GPT-2).
        paths: full names in the causal language model, in order.
        place: name inside a layer, "attn.c_proj", with * for indices.
    """

    name: str
    kind: Kind
    in_features: int
    out_features: int
    count: int
    module: Literal["Linear", "Conv1D"]
    paths: tuple[str, ...] = field(repr=False)
    place: str


@dataclass(frozen=True)
class Architecture:
    """What a config builds.

    Attributes:
        name: where the config came from, a Hub id or folder; may be empty.
        causal: False for models that can be inspected only (BERT and its kin).
        max_positions: None where the config sets no limit.
        num_parameters: tied weights counted once.
        embedding_parameters: of every embedding table, those of positions and of single layers too.
        head_parameters: of the output head where it has weights of its own; 0 when tied.
        quantised_parameters: weights that transformers hands to bitsandbytes: plain nn.Linear and Conv1D modules but
            the head. Everything else stays in 16 bit.
        quantised_sizes: the same as (weights of a module, number of such modules), for sizes in bytes.
        kept_linear: weights of linear modules that stay in 16 bit although they are not the head, as (class, weights).
        unquantised_expert_parameters: experts in 3-D tensors, with their biases; never 4-bit, never adapted.
        projections: attention and mlp, in the order of the first layer that has them.
        others: linear modules that are neither, the head left out.
        stored_quantisation: method of a checkpoint that is quantised already ("gptq", "bitsandbytes", ...), else None.
        layers_path: name of the list of layers, "model.layers".
        attentions: implementations that the model class can run with torch alone, best first.
    """

    name: str
    model_type: str
    causal: bool
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    num_parameters: int
    embedding_parameters: int
    head_parameters: int
    tied_embeddings: bool
    quantised_parameters: int
    quantised_sizes: tuple[tuple[int, int], ...]
    kept_linear: tuple[tuple[str, int], ...]
    unquantised_expert_parameters: int
    expert_places: tuple[str, ...]
    projections: tuple[Projection, ...]
    others: tuple[Projection, ...]
    stored_quantisation: str | None
    layers_path: str
    attentions: tuple[str, ...]
    head_name: str | None
    module_names: tuple[str, ...] = field(repr=False)

    @property
    def num_quantised_modules(self) -> int:
        return sum(count for _, count in self.quantised_sizes)

    @property
    def quantised_bytes(self) -> int:
        """Bytes of the 4-bit weights with their scales, as bitsandbytes holds them; see `nf4_bytes`."""
        return sum(nf4_bytes(size) * count for size, count in self.quantised_sizes)


@dataclass(frozen=True)
class TargetSelection:
    """The modules that get an adapter.

    Attributes:
        patterns: for PEFT's `target_modules`: the shortest names that hit these modules and no other one.
        notes: what a person should know about the choice, one sentence each.
    """

    projections: tuple[Projection, ...]
    patterns: tuple[str, ...]
    notes: tuple[str, ...]
    architecture: Architecture = field(repr=False)

    @property
    def num_modules(self) -> int:
        return sum(p.count for p in self.projections)


def describe(config: PreTrainedConfig) -> Architecture:
    """Build the model on the meta device and take stock of it.

    Raises:
        ModelError: transformers cannot build the model, or it is not a stack of layers.
    """
    from torch import nn

    model = build_skeleton(config)
    modules = dict(model.named_modules())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head_name = next((name for name, module in modules.items() if module is head), None) if head is not None else None
    layers_path = find_layers(config, modules)
    linear = linear_modules(modules)
    quantised = quantised_names(model, linear)
    sizes = Counter(modules[name].weight.numel() for name in quantised)
    kept: Counter[str] = Counter()
    for name in linear.keys() - {*quantised, head_name}:
        kept[type(modules[name]).__name__] += modules[name].weight.numel()
    tables = {id(p): p.numel() for m in modules.values() if isinstance(m, nn.Embedding) for p in m.parameters()}
    experts = {f"{name}.{key}": p for name, module in modules.items() if holds_experts(module)
               for key, p in module.named_parameters(recurse=False)}
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    projections = _projections({name: linear[name] for name in linear if name != head_name}, layers_path, modules)
    return Architecture(
        name=getattr(config, "name_or_path", "") or "",
        model_type=config.model_type,
        causal=is_causal(config),
        num_layers=len(modules[layers_path]),
        hidden_size=getattr(config, "hidden_size", None) or embedding.weight.shape[1],
        vocab_size=getattr(config, "vocab_size", None) or embedding.weight.shape[0],
        max_positions=getattr(config, "max_position_embeddings", None),
        num_parameters=sum(p.numel() for p in model.parameters()),
        embedding_parameters=sum(tables.values()),
        head_parameters=sum(p.numel() for p in head.parameters() if id(p) not in tables) if head is not None else 0,
        tied_embeddings=head is not None and getattr(head, "weight", None) is embedding.weight,
        quantised_parameters=sum(size * count for size, count in sizes.items()),
        quantised_sizes=tuple(sorted(sizes.items())),
        kept_linear=tuple(sorted(kept.items())),
        unquantised_expert_parameters=sum(p.numel() for p in experts.values()),
        expert_places=tuple(sorted({place_of(name, layers_path) for name in experts})),
        projections=tuple(p for p in projections if p.kind != "other"),
        others=tuple(p for p in projections if p.kind == "other"),
        stored_quantisation=None if stored is None else str(getattr(method, "value", method)),
        layers_path=layers_path,
        attentions=("sdpa", "eager") if model._supports_sdpa else ("eager",),
        head_name=head_name,
        module_names=tuple(modules)[1:],
    )


def select_targets(
    architecture: Architecture, targets: Literal["all", "attention", "qv"] | Sequence[str] = "all"
) -> TargetSelection:
    """The projections that get an adapter. The output head never does.

    Args:
        targets: "all" attention and mlp projections; "attention"; "qv", query and value (or the fused projection that
            holds them); or names, matched as PEFT does: "c_proj" and "attn.c_proj" both name "h.0.attn.c_proj".

    Raises:
        ModelError: a name that hits nothing, or nothing that can have an adapter; a model without such projections.
    """
    if isinstance(targets, str) and targets in ("all", "attention", "qv"):
        chosen, notes = _by_keyword(architecture, targets)
    else:
        chosen, notes = _by_name(architecture, (targets,) if isinstance(targets, str) else tuple(targets))
    if architecture.unquantised_expert_parameters:
        places = ", ".join(architecture.expert_places)
        notes.append(
            f"{architecture.unquantised_expert_parameters:,} expert parameters ({places}) are 3-D tensors: "
            "bitsandbytes leaves them in 16 bit, and they get no adapter."
        )
    left = sorted({p.place for p in architecture.others if p not in chosen})
    if left and targets == "all":
        notes.append(f"Neither attention nor MLP, left alone: {', '.join(left)}.")
    paths = [path for projection in chosen for path in projection.paths]
    patterns = _shortest_patterns(paths, architecture.module_names)
    return TargetSelection(tuple(chosen), patterns, tuple(notes), architecture)


def lora_parameters(selection: TargetSelection, r: int) -> int:
    """Trainable parameters at rank r: r x (in + out) for each module, A of shape (r, in) and B of shape (out, r)."""
    return sum(r * (p.in_features + p.out_features) * p.count for p in selection.projections)


def nf4_bytes(num_weights: int) -> int:
    """Bytes of a weight of `num_weights` numbers in NF4 with double quantisation, as bitsandbytes 0.50 holds it.

    Two numbers a byte; one 8-bit scale for each block of 64; one fp32 scale for each 256 of those; the fp32 mean of the
    scales; and two tables that every weight has for itself, of 16 and of 256 fp32 values (NF4, and the 8-bit type of
    the scales). Source: bitsandbytes, functional.quantize_4bit.
    """
    blocks = math.ceil(num_weights / 64)
    return math.ceil(num_weights / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 + 4 * 16 + 4 * 256


def inspection(architecture: Architecture, selection: TargetSelection, r: int) -> dict[str, Any]:
    """Everything `qlora inspect` shows, as plain JSON values. `sixteen_bit` is the base as bf16 or fp16."""
    hits = Counter(path for projection in selection.projections for path in projection.paths)
    rows = []
    for projection in (*architecture.projections, *architecture.others):
        num_hit = sum(hits[path] for path in projection.paths)
        rows.append({
            "name": projection.name, "place": projection.place, "kind": projection.kind, "module": projection.module,
            "in_features": projection.in_features, "out_features": projection.out_features,
            "count": projection.count, "hit": num_hit > 0, "num_hit": num_hit,
            "lora_parameters": r * (projection.in_features + projection.out_features) * num_hit,
        })
    total, trainable = architecture.num_parameters, lora_parameters(selection, r)
    rest = total - architecture.quantised_parameters
    parts = {
        "embeddings": architecture.embedding_parameters, "head": architecture.head_parameters,
        "experts": architecture.unquantised_expert_parameters,
    }
    return {
        "model": architecture.name or architecture.model_type,
        "model_type": architecture.model_type,
        "causal": architecture.causal,
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "vocab_size": architecture.vocab_size,
        "max_positions": architecture.max_positions,
        "tied_embeddings": architecture.tied_embeddings,
        "num_parameters": total,
        "published_parameters": published_parameters(architecture.name),
        "four_bit": {
            "parameters": architecture.quantised_parameters,
            "modules": architecture.num_quantised_modules,
            "bytes": architecture.quantised_bytes,
            "counted": "packed weights, 8-bit block scales, fp32 scales of those, their mean, and both code tables",
        },
        "sixteen_bit": {"parameters": rest, "bytes": 2 * rest, **parts, "norms_and_rest": rest - sum(parts.values())},
        "base_bytes": architecture.quantised_bytes + 2 * rest,
        "r": r,
        "projections": rows,
        "num_targets": selection.num_modules,
        "lora_parameters": trainable,
        "percent_trainable": 100 * trainable / total,
        "patterns": list(selection.patterns),
        "notes": list(selection.notes) + _warnings(architecture),
    }


# --- details ----------------------------------------------------------------------------------------------------------

_FUSED = re.compile(r"qkv|query_key_value|c_attn|^kv_", re.IGNORECASE)
_QUERY_OR_VALUE = re.compile(r"^w?(q|v|query|value)(_|$)", re.IGNORECASE)


def _projections(
    linear: dict[str, tuple[nn.Module, bool]], layers_path: str, modules: dict[str, nn.Module]
) -> list[Projection]:
    groups: dict[tuple, list[str]] = {}
    for path, (module, transposed) in linear.items():
        in_features, out_features = module.weight.shape if transposed else module.weight.shape[::-1]
        kind = kind_of(path, layers_path, modules)
        key = (place_of(path, layers_path), kind, in_features, out_features, "Conv1D" if transposed else "Linear")
        groups.setdefault(key, []).append(path)
    return [
        Projection(place.rpartition(".")[2], kind, in_features, out_features, len(paths), module, tuple(paths), place)
        for (place, kind, in_features, out_features, module), paths in groups.items()
    ]


def _by_keyword(architecture: Architecture, targets: str) -> tuple[list[Projection], list[str]]:
    attention = [p for p in architecture.projections if p.kind == "attention"]
    if targets == "all":
        chosen, notes = list(architecture.projections), []
    elif targets == "attention":
        chosen, notes = attention, []
    else:
        fused = [p for p in attention if _FUSED.search(p.name)]
        chosen = [p for p in attention if p in fused or _QUERY_OR_VALUE.search(p.name)]
        names = ", ".join(sorted({p.name for p in fused}))
        notes = [f"{names}: keys share this projection with what was asked for, and are adapted too."] if fused else []
    if not chosen:
        kinds = "attention or MLP projections" if targets == "all" else "such attention projections"
        places = ", ".join(sorted({p.place for p in (*architecture.projections, *architecture.others)})) or "none"
        raise ModelError(
            f"lora.targets is {targets!r}, but {architecture.model_type} has no {kinds} that are known by name.",
            f"Name some of its linear modules: {places}.",
        )
    return chosen, notes


def _by_name(architecture: Architecture, names: Iterable[str]) -> tuple[list[Projection], list[str]]:
    notes: list[str] = []
    hit: set[str] = set()
    for name in dict.fromkeys(names):
        found = _matching(architecture.projections, name) or _matching(architecture.others, name)
        if not found:
            raise _no_hit(architecture, name)
        hit.update(path for projection in found for path in projection.paths)
        kinds: Counter[str] = Counter()
        for projection in found:
            kinds[projection.kind] += projection.count
        if len(kinds) > 1:
            hits = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
            notes.append(f"{name} hits {hits} modules.")
    if not hit:
        raise ModelError("lora.targets is an empty list; no adapter would be trained.", "Write lora.targets=all.")
    whole = (*architecture.projections, *architecture.others)
    return [part for p in whole for part in _restrict(p, [path for path in p.paths if path in hit])], notes


def _matching(projections: Iterable[Projection], name: str) -> list[Projection]:
    """The parts of projections whose modules `name` hits, by PEFT's rule: the whole name, or its end after a dot."""
    return [
        part
        for projection in projections
        for part in _restrict(projection, [p for p in projection.paths if p == name or p.endswith(f".{name}")])
    ]


def _restrict(projection: Projection, paths: list[str]) -> list[Projection]:
    return [replace(projection, count=len(paths), paths=tuple(paths))] if paths else []


def _no_hit(architecture: Architecture, name: str) -> ModelError:
    everything = (*architecture.projections, *architecture.others)
    places = [p.place for p in everything]
    known = list(dict.fromkeys([p.name for p in everything] + places + ["all", "attention", "qv"]))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    has = f"This model has {', '.join(dict.fromkeys(places))}."
    hint = f"Did you mean {' or '.join(near)}? {has}" if near else has
    what = f"lora.targets names {name!r}"
    ending = f".{name}"
    if name in ("all", "attention", "qv"):
        return ModelError(f"{what} inside a list; it is a word for a whole set.", f"Write lora.targets={name}.")
    if architecture.head_name is not None and f".{architecture.head_name}".endswith(ending):
        return ModelError(f"{what}, the output head; adapters never go there.", "Leave it out.")
    if any(f".{expert}".endswith(ending) for expert in architecture.expert_places):
        return ModelError(f"{what}: experts in one 3-D tensor, not linear modules; they cannot be adapted.", hint)
    if any(f".{module}".endswith(ending) for module in architecture.module_names):
        return ModelError(f"{what}, which is not a linear module.", hint)
    return ModelError(f"{what}, which hits no module of {architecture.name or architecture.model_type}.", hint)


def _shortest_patterns(paths: Sequence[str], module_names: Iterable[str]) -> tuple[str, ...]:
    """For each path its shortest ending that no module outside of `paths` shares; the path where there is none."""
    everywhere = Counter(ending for name in module_names for ending in _endings(name))
    chosen = Counter(ending for path in paths for ending in _endings(path))
    patterns = (next((e for e in _endings(path) if everywhere[e] == chosen[e]), path) for path in paths)
    return tuple(dict.fromkeys(patterns))


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _warnings(architecture: Architecture) -> list[str]:
    notes = []
    if not architecture.causal:
        notes.append("Not a causal language model: it can be inspected, not trained here.")
    if architecture.kept_linear:
        kept = ", ".join(f"{weights:,} weights in {cls}" for cls, weights in architecture.kept_linear)
        notes.append(f"Linear modules that transformers leaves in 16 bit: {kept}.")
    if architecture.stored_quantisation:
        method = architecture.stored_quantisation
        notes.append(f"The checkpoint is quantised already ({method}); the counts are those of its 16-bit original.")
    return notes
