"""What an export will write, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import RecipeError
from qlora.exporting import ExportPlan, families, metadata
from qlora.exporting.formats import ADAPTER_FORMATS, DEFAULT, Format, find_format, type_of
from qlora.merging import workplace
from qlora.merging.parts import Parts, gather
from qlora.progress import Progress

if TYPE_CHECKING:
    from qlora.hub.adapter import Adapter


def choose_format(name: str | None, adapter_only: bool) -> Format:
    """The format that is meant.

    Raises:
        RecipeError: there is none of that name, or it is none for an adapter.
    """
    found = find_format(name or (ADAPTER_FORMATS[0] if adapter_only else DEFAULT))
    if adapter_only and found.name not in ADAPTER_FORMATS:
        raise RecipeError(f"An adapter alone is not written as {found.name}: it is small, and its rounding would add up.",
                          f"Take one of {', '.join(ADAPTER_FORMATS)}.")
    return found


def make_plan(
    adapter: Adapter, out: Path, file: str, form: Format, into: str, adapter_only: bool, progress: Progress
) -> ExportPlan:
    """Raises ModelError where it cannot be done."""
    from qlora.exporting import checking, writing
    from qlora.hardware.host import host_memory
    from qlora.merging.checking import LOADED_BYTES

    parts = gather(adapter, into=into, dtype=None, progress=progress)
    family = families.find_family(adapter.base, parts.config)
    free_bytes = host_memory()[1]
    loaded_bytes = min(LOADED_BYTES, free_bytes // 2)
    need_bytes = checking.peak_bytes(parts, loaded_bytes)
    name = out.name.removesuffix("-gguf")
    if adapter_only:
        from qlora.exporting import adapter as alone

        halves, alpha = alone.halves_of(parts, family)
        fields, entries = alone.header(alpha, name, adapter.base), alone.entries_of(halves, form.matrices)
        return ExportPlan(parts, out, file, form, into, family, tuple(fields), tuple(entries), None, need_bytes, free_bytes,
                          workplace.disk_bytes(out), loaded_bytes, ())
    from qlora.adapted import find_tokenizer
    from qlora.exporting.vocabulary import read_vocabulary

    placed = families.place(adapter.base, parts.config, family, parts.changes)
    size = parts.config.vocab_size
    described = metadata.describe(adapter.base, parts.config, family, vocab_size=size, file_type=form.file_type, name=name)
    vocabulary = read_vocabulary(find_tokenizer(adapter, progress), size, _ends(parts))
    entries = [writing.vector_entry(key, values) for key, values in described.extra.items()]
    entries += writing.entries_of(placed, form, parts.trained)
    notes = [*described.notes, *vocabulary.notes]
    twins = [change for change in parts.changes if change.name == "lm_head.weight" and _is_tied(parts)]
    left_out = len(parts.changes) - len(placed) - len(twins)
    if left_out:
        notes.append(f"{left_out} tensors of the checkpoint are none of the text model's, and are left out.")
    if form.matrices.startswith("Q"):
        coarse = sum(type_of(one.name, one.shape, form) == "F16" for one in placed)
        if coarse:
            notes.append(f"{coarse} matrices have rows that blocks of 32 do not divide; they are F16.")
    return ExportPlan(parts, out, file, form, into, family, (*described.fields, *vocabulary.fields), tuple(entries), vocabulary,
                      max(need_bytes, writing.memory_bytes(placed, form)), free_bytes, workplace.disk_bytes(out), loaded_bytes,
                      tuple(notes))


def _is_tied(parts: Parts) -> bool:
    return bool(getattr(parts.config, "tie_word_embeddings", False))


def _ends(parts: Parts) -> tuple[int, ...]:
    """Tokens that end an answer, by the base's generation_config.json."""
    path = parts.folder / "generation_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError):  # there need be none
        return ()
    return tuple(number for number in (found if isinstance(found, list) else [found]) if isinstance(number, int))
