"""What a GGUF file says of a model: its sizes, its positions, its windows.

The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's src/llama-arch.cpp for newer ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora.errors import ModelError
from qlora.exporting.families import Family, window_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Field:
    """A key, its value, and what it is stored as: u32, f32, bool, str, or a list of strings, floats, integers or booleans."""

    key: str
    value: Any
    kind: str


@dataclass(frozen=True)
class Described:
    """Of a model.

    Attributes:
        fields: of the header.
        extra: vectors that llama.cpp reads as tensors, by name.
        notes: what somebody who uses the file should know.
    """

    fields: tuple[Field, ...]
    extra: Mapping[str, list[float]]
    notes: tuple[str, ...]


def describe(base: str, config: PreTrainedConfig, family: Family, *, vocab_size: int, file_type: int, name: str) -> Described:
    """Raises ModelError for positions or windows that llama.cpp has not."""
    arch, notes = family.arch, []
    rope = _rope(base, config)
    context = config.n_positions if arch == "gpt2" else config.max_position_embeddings
    windows = list(window_pattern(config))
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window:
        windows = [True] * config.num_hidden_layers  # its config names no kinds of layers
    if family.sliding == "full" and any(windows) and window and window < context:
        notes.append(f"The model's attention sees the last {window:,} tokens; llama.cpp's {arch} sees all. The file says that it "
                     f"reads {window:,} tokens, up to which the two are the same.")
        context = window
    heads = config.num_attention_heads
    fields = [
        Field("general.type", "model", "str"), Field("general.name", name, "str"), Field("general.file_type", file_type, "u32"),
        Field("general.quantization_version", 2, "u32"),
        Field(f"{arch}.vocab_size", vocab_size, "u32"), Field(f"{arch}.context_length", context, "u32"),
        Field(f"{arch}.embedding_length", config.hidden_size, "u32"),
        Field(f"{arch}.block_count", config.num_hidden_layers, "u32"),
        Field(f"{arch}.feed_forward_length", _feed_forward(config), "u32"), Field(f"{arch}.attention.head_count", heads, "u32"),
    ]
    if arch == "gpt2":
        return Described((*fields, Field("gpt2.attention.layer_norm_epsilon", config.layer_norm_epsilon, "f32")), {}, ())
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields += [
        Field(f"{arch}.attention.head_count_kv", config.num_key_value_heads, "u32"),
        Field(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps, "f32"),
        Field(f"{arch}.rope.freq_base", float(rope["rope_theta"]), "f32"),
    ]
    if arch != "phi3" or head * heads != config.hidden_size:
        fields += [Field(f"{arch}.attention.key_length", head, "u32"), Field(f"{arch}.attention.value_length", head, "u32")]
    if arch in ("llama", "phi3"):
        dims = int(head * (rope.get("partial_rotary_factor") or 1.0))
        fields.append(Field(f"{arch}.rope.dimension_count", dims, "u32"))
    if arch.startswith("gemma"):
        fields += _gemma(config, family, windows)
    elif arch == "phi3":
        # 0 where there is none: llama.cpp tells Phi-4 from Phi-3 by it, and keeps no window for either.
        fields.append(Field("phi3.attention.sliding_window", window or 0, "u32"))
    scaling, extra = _scaling(base, config, arch, rope, head)
    if "rope_factors_long.weight" in extra:
        original = next(field.value for field in scaling if field.key.endswith("original_context_length"))
        notes.append(f"llama.cpp turns all positions by the factors for long texts as soon as its context is larger than "
                     f"{original:,} tokens, however short the text is. For texts up to there: -c {original}, and in a Modelfile "
                     f"PARAMETER num_ctx {original}.")
    return Described((*fields, *scaling), extra, tuple(notes))


# --- details -----------------------------------------------------------------------------------------------------------


def _rope(base: str, config: PreTrainedConfig) -> dict[str, Any]:
    found = dict(getattr(config, "rope_parameters", None) or {})
    found = dict(found.get("full_attention", found))
    if config.model_type == "gpt2":
        return found
    if "rope_theta" not in found:
        raise ModelError(f"{base} does not say how it turns positions (rope_theta).", "Merge it instead: qlora merge")
    return found


def _feed_forward(config: PreTrainedConfig) -> int:
    if config.model_type == "gpt2":
        return config.n_inner or 4 * config.n_embd
    return config.intermediate_size


def _gemma(config: PreTrainedConfig, family: Family, windows: list[bool]) -> list[Field]:
    arch, fields = family.arch, []
    caps = {"attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
            "final_logit_softcapping": getattr(config, "final_logit_softcapping", None)}
    fields += [Field(f"{arch}.{key}", float(value), "f32") for key, value in caps.items() if value]
    if not any(windows):
        return fields
    fields.append(Field(f"{arch}.attention.sliding_window", config.sliding_window, "u32"))
    if windows != [(layer + 1) % family.sliding != 0 for layer in range(config.num_hidden_layers)]:
        fields.append(Field(f"{arch}.attention.sliding_window_pattern", windows, "bools"))
    local = (config.rope_parameters or {}).get("sliding_attention")
    if local:
        fields.append(Field(f"{arch}.rope.freq_base_swa", float(local["rope_theta"]), "f32"))
    return fields


def _scaling(
    base: str, config: PreTrainedConfig, arch: str, rope: dict[str, Any], head: int
) -> tuple[list[Field], dict[str, list[float]]]:
    """How positions beyond those of the first training are turned."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return _original(config, arch), {}
    if kind == "linear":
        return [Field(f"{arch}.rope.scaling.type", "linear", "str"),
                Field(f"{arch}.rope.scaling.factor", float(rope["factor"]), "f32")], {}
    plain = not any(rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"))
    if kind == "yarn" and plain:
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        return [Field(f"{arch}.rope.scaling.type", "yarn", "str"),
                Field(f"{arch}.rope.scaling.factor", float(rope["factor"]), "f32"),
                Field(f"{arch}.rope.scaling.original_context_length", original, "u32")], {}
    if kind == "llama3" and arch == "llama":
        return [], {"rope_freqs.weight": _llama3(rope, head)}
    if kind == "longrope" and arch == "phi3":
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        factor = config.max_position_embeddings / original
        given = rope.get("attention_factor")
        # https://arxiv.org/abs/2402.13753, as Transformers has it (modeling_rope_utils.py)
        attention = given or (math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0)
        fields = [Field(f"{arch}.rope.scaling.type", "longrope", "str"),
                  Field(f"{arch}.rope.scaling.original_context_length", original, "u32"),
                  Field(f"{arch}.rope.scaling.attn_factor", attention, "f32")]
        return fields, {"rope_factors_long.weight": list(rope["long_factor"]),
                        "rope_factors_short.weight": list(rope["short_factor"])}
    raise ModelError(f"{base} turns positions by {kind}, which is not written as GGUF here.", "Merge it instead: qlora merge")


def _original(config: PreTrainedConfig, arch: str) -> list[Field]:
    found = getattr(config, "original_max_position_embeddings", None) if arch == "phi3" else None
    return [Field("phi3.rope.scaling.original_context_length", found, "u32")] if found else []


def _llama3(rope: dict[str, Any], head: int) -> list[float]:
    """What each frequency is divided by (Llama 3.1; Transformers: modeling_rope_utils.py, _compute_llama3_parameters)."""
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for pair in range(0, head, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (pair / head)
        if wave < context / high:
            divisors.append(1.0)
        elif wave > context / low:
            divisors.append(float(factor))
        else:
            smooth = (context / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors
