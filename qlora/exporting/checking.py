"""Hold a GGUF file that lies on the disk against the adapter on its base, and against the merged model: the same prompts, in
fp32.

The file is read by Transformers' own GGUF loader, which knows nothing of what wrote it. A model that is too large for that is
read tensor by tensor and run module by module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora import _compat
from qlora.errors import NeedsLoaderError
from qlora.exporting.families import Placed
from qlora.exporting.formats import MAX_SHARE
from qlora.exporting.reading import GgufFile
from qlora.exporting.writing import Entry
from qlora.merging.base import Change
from qlora.merging.checking import Agreement, agree, load_plain, run, run_both, stream, token_ids
from qlora.merging.parts import Parts
from qlora.merging.shards import read_rows, torch_type
from qlora.merging.streamed import Read, build_streamed
from qlora.merging.writing import merged_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What decides what a model computes, as configs call it; of those that a config does not have, nothing.
_DECISIVE = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rms_norm_eps", "layer_norm_epsilon", "rope_parameters", "sliding_window", "layer_types", "attention_bias",
    "mlp_bias",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "hidden_act", "hidden_activation",
    "activation_function", "n_positions", "n_inner", "tie_word_embeddings",
)
_WINDOWS = {"sliding_window", "layer_types"}  # which Llama's config has not; the file's context ends where they would begin


@dataclass(frozen=True)
class ModelCheck:
    """What three models say after the same tokens: adapter on base, merged, exported.

    Attributes:
        how: "Transformers", which loaded the file; "streamed": read tensor by tensor.
        from_header: whether Transformers needed nothing but the file, and no config beside it.
        merged, exported, whole: adapter and merged, merged and exported, adapter and exported.
        trained: what was trained, with the base in 4 bits, and exported; None where the base is that one.
        kl_of_adapter: mean KL(adapter || base), what the adapter does on these prompts.
        limit: what the mean KL of merged and exported may be.
    """

    how: str
    from_header: bool
    num_positions: int
    merged: Agreement
    exported: Agreement
    whole: Agreement
    trained: Agreement | None
    kl_of_adapter: float
    limit: float

    @property
    def passes(self) -> bool:
        return self.exported.kl <= self.limit


@dataclass(frozen=True)
class NumbersCheck:
    """Every tensor of a file, read back: the largest error, as a share of what its type may be off (`MAX_SHARE`), and where."""

    num_tensors: int
    share: float
    worst: str

    @property
    def passes(self) -> bool:
        return self.share <= 1


def check_numbers(path: Path, entries: Sequence[Entry], progress: Callable[[int, int], None]) -> NumbersCheck:
    """Hold every tensor against what it was to be. What is computed with a model can hide a fault in one of its tensors."""
    file, share, worst = GgufFile(path), 0.0, ""
    for number, entry in enumerate(entries, 1):
        rows, first, off, size = file.rows(entry.name), 0, 0.0, 0.0
        for wanted in entry.rows():
            found = rows.between(first, first + len(wanted))
            first += len(wanted)
            off += float((found - wanted).double().square().sum())
            size += float(wanted.double().square().sum())
        this = math.sqrt(off / size) / MAX_SHARE[entry.kind] if size else (math.inf if off else 0.0)
        if not this <= share:
            share, worst = this if this == this else math.inf, entry.name
        progress(number, len(entries))
    return NumbersCheck(len(entries), share, worst)


def check_model(
    folder: Path, name: str, parts: Parts, placed: Sequence[Placed], *, limit: float, loaded_bytes: int,
    progress: Callable[[int, int], None],
) -> ModelCheck:
    """Run the three on a few prompts.

    Args:
        folder, name: the file. placed: where each of the model's tensors should be.
        limit: of the mean KL of merged and exported.
        loaded_bytes: a model whose loading takes more is streamed.

    Raises:
        ModelError: the base cannot be loaded.
    """
    config, base, adapter = parts.config, parts.folder, parts.adapter.folder
    ids = prompt_ids(parts)
    in_nf4 = any(change.nf4 for change in parts.changes)
    loads = 4 * parts.num_numbers <= loaded_bytes
    try:
        plain = loads and not in_nf4
        reference = load_plain(base, config) if plain else stream(base, config, parts.nf4 if in_nf4 else {}, parts.trained)
    except NeedsLoaderError as error:
        raise AssertionError("no family that is exported keeps its weights in another form") from error
    with_adapter, without = run_both(reference, adapter, ids)
    del reference
    progress(2, 5)
    merged = run(build_streamed(config, lambda skeleton: _merged(skeleton, parts)), ids)
    progress(3, 5)
    found, loaded = _header(folder, name), None
    from_header = found is not None and _same(found, config)
    if found is not None and 2 * 4 * parts.num_numbers <= loaded_bytes:
        loaded = _by_transformers(folder, name, None if from_header else _completed(found, config))
    how = "Transformers" if loaded is not None else "streamed"
    exported = run(loaded if loaded is not None else stream_file(folder / name, config, placed), ids)
    del loaded
    progress(4, 5)
    trained = None
    if parts.nf4 and not in_nf4:
        trained = agree(run_both(stream(base, config, parts.nf4, parts.trained), adapter, ids, alone=False)[0], exported)
    progress(5, 5)
    return ModelCheck(how, from_header, ids.numel(), agree(with_adapter, merged), agree(merged, exported),
                      agree(with_adapter, exported), trained, agree(with_adapter, without).kl, limit)


def prompt_ids(parts: Parts) -> torch.Tensor:
    """Token ids of the prompts, of shape (rows, tokens): by the adapter's tokenizer, or the base's where it has none."""
    adapter = parts.adapter.folder
    return token_ids(adapter if any(adapter.glob("tokenizer*")) else parts.folder, parts.config.vocab_size)


def stream_file(path: Path, config: PreTrainedConfig, placed: Sequence[Placed]) -> PreTrainedModel:
    """The model in a GGUF file, run module by module; in fp32."""
    file, places = GgufFile(path), {one.change.name: one for one in placed}

    def open_weights(skeleton: PreTrainedModel) -> Read:
        alias = _aliases(skeleton, places)

        def read(name: str) -> Any:
            one = places.get(alias.get(name, name))
            if one is None:
                return None
            plain = not one.is_whole and not one.offset and len(one.shape) > 1
            return file.rows(one.name) if plain else one.from_file(file.tensor(one.name))

        return read

    return build_streamed(config, open_weights)


def peak_bytes(parts: Parts, loaded_bytes: int) -> int:
    """Host memory that `check_model` takes at most, beside the libraries."""
    from qlora.merging.checking import peak_bytes as peak_of_merge

    base = peak_of_merge(parts.changes, parts.nf4, parts.files.size_bytes, parts.config.vocab_size, loaded_bytes)
    return max(base, 8 * parts.num_numbers if 8 * parts.num_numbers <= loaded_bytes else 0)


# --- details -----------------------------------------------------------------------------------------------------------


def _merged(skeleton: PreTrainedModel, parts: Parts) -> Read:
    """The merged model's weights, as `qlora merge` would write them."""
    changes = {change.name: change for change in parts.changes}
    alias = _aliases(skeleton, changes)

    def read(name: str) -> torch.Tensor | None:
        change: Change | None = changes.get(alias.get(name, name))
        if change is None:
            return None
        if change.is_copy:
            return read_rows(change.stored)
        pieces = [piece.to(torch_type(change.outline.dtype)) for piece in merged_rows(change, parts.trained)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    return read


def _aliases(skeleton: PreTrainedModel, held: Mapping[str, Any]) -> dict[str, str]:
    """For each name of a tensor that is shared and not held under it, the name under which it is."""
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {}
    for twins in names.values():
        kept = next((name for name in twins if name in held), None)
        if kept is not None:
            found |= {name: kept for name in twins if name not in held}
    return found


def _header(folder: Path, name: str) -> PreTrainedConfig | None:
    """The config that Transformers reads out of the file; None where it does not know the family."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), gguf_file=name)
    except (ValueError, KeyError, NotImplementedError, ImportError, AttributeError):
        return None


def _by_transformers(folder: Path, name: str, config: PreTrainedConfig | None) -> PreTrainedModel | None:
    """The model as Transformers loads the file; None where it does not know the family.

    Args:
        config: for what it does not read of the header; None where that is enough.
    """
    from transformers import AutoModelForCausalLM

    given = {} if config is None else {"config": config}
    try:
        with _compat.without_gguf_bar():
            model, loading = AutoModelForCausalLM.from_pretrained(
                str(folder), gguf_file=name, dtype=torch.float32, output_loading_info=True, **given)
    except (ValueError, KeyError, NotImplementedError, ImportError, AttributeError):
        return None
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    if set(loading.get("missing_keys") or ()) - tied or loading.get("mismatched_keys"):
        return None
    return model.requires_grad_(False).eval()


def _completed(found: PreTrainedConfig, wanted: PreTrainedConfig) -> PreTrainedConfig:
    """What the header does not say, or Transformers does not read of it."""
    if found.model_type == wanted.model_type:
        return wanted
    for key in _DECISIVE:  # Mistral's models are Llama's for llama.cpp
        if hasattr(found, key) and getattr(wanted, key, None) is not None:
            setattr(found, key, getattr(wanted, key))
    return found


def _same(found: PreTrainedConfig, wanted: PreTrainedConfig) -> bool:
    """Whether a config that was read from a header leads to the same computation."""
    kept = set(_DECISIVE) - (_WINDOWS if wanted.model_type == "mistral" else set())
    return {found.model_type, wanted.model_type} in ({wanted.model_type}, {"llama", "mistral"}) and all(
        _near(getattr(found, key, None), getattr(wanted, key, None)) for key in kept)


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_near(one.get(key), other.get(key)) for key in {*one, *other})
    if isinstance(one, (int, float)) and isinstance(other, (int, float)) and not isinstance(one, bool):
        return math.isclose(one, other, rel_tol=1e-6)
    return (one or None) == (other or None)
