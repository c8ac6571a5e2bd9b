"""Carry out the plan of an export: write, and compare what lies on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora import durable
from qlora.exporting import ExportPlan
from qlora.progress import Progress

if TYPE_CHECKING:
    from qlora.exporting.adapter import AdapterCheck
    from qlora.exporting.checking import ModelCheck, NumbersCheck
    from qlora.exporting.texts import TextCheck


def write(plan: ExportPlan, part: Path, progress: Progress) -> bool:
    """The GGUF file and the Modelfile; returns whether that has the chat template.

    Raises:
        ModelError: a number that is not finite, or too large for its type.
        OSError: a file cannot be read or written.
    """
    from qlora.exporting.ollama import modelfile
    from qlora.exporting.writing import write_gguf

    with progress.stage(f"Writing {len(plan.entries)} tensors as {plan.form.name}") as update:
        write_gguf(part / plan.file, plan.family.arch, plan.fields, plan.entries, update)
    if plan.vocabulary is None:
        base = plan.parts.adapter.base
        durable.write_text(part / "Modelfile", f"# Put a model that Ollama has, or a GGUF file of {base}, after FROM.\n"
                                               f"FROM {base}\nADAPTER ./{plan.file}\n")
        return False
    adds_bos = next(field.value for field in plan.fields if field.key == "tokenizer.ggml.add_bos_token")
    text, has_template = modelfile(plan.file, _tokenizer(plan), plan.vocabulary.stops, adds_bos=adds_bos)
    durable.write_text(part / "Modelfile", text)
    return has_template


def check(
    plan: ExportPlan, part: Path, progress: Progress
) -> tuple[NumbersCheck, ModelCheck | None, TextCheck | None, AdapterCheck | None]:
    """Read the file from the disk and compare."""
    from qlora.exporting import adapter, checking, families, texts

    with progress.stage("Reading it back") as update:
        numbers = checking.check_numbers(part / plan.file, plan.entries, update)
    with progress.stage("Comparing it with base and adapter", bar=False) as update:
        if plan.is_adapter:
            halves, _ = adapter.halves_of(plan.parts, plan.family)
            return numbers, None, None, adapter.check_adapter(
                part / plan.file, plan.parts, halves, kind=plan.form.matrices, loaded_bytes=plan.loaded_bytes, progress=update)
        placed = families.place(plan.parts.adapter.base, plan.parts.config, plan.family, plan.parts.changes)
        model = checking.check_model(part, plan.file, plan.parts, placed, limit=plan.form.max_kl, loaded_bytes=plan.loaded_bytes,
                                     progress=update)
    with progress.stage("Comparing its tokenizer"):
        return numbers, model, texts.check_tokenizer(part, plan.file, _tokenizer(plan)), None


def problem_of(
    plan: ExportPlan, numbers: NumbersCheck, model: ModelCheck | None, found: TextCheck | None, adapter: AdapterCheck | None
) -> str | None:
    """What is wrong with the file, in words; None where nothing is."""
    if not numbers.passes:
        return f"{numbers.worst}, read back, is off by {numbers.share:.2g} times what its type may be"
    if adapter is not None and not adapter.passes:
        return (f"the product of {adapter.worst}, read back, is off by {adapter.share:.2g} of its largest number; allowed: "
                f"{adapter.limit:.0e}")
    if model is not None and not model.passes:
        return f"merged and exported differ by {model.exported.words()}; allowed for {plan.form.name}: KL {model.limit:g}"
    if found is not None and plan.vocabulary.pre != "default" and not found.prompts_same:
        return f"its tokenizer cuts a plain prompt otherwise: {found.example!r}"
    return None


def _tokenizer(plan: ExportPlan):
    from qlora.adapted import find_tokenizer

    return find_tokenizer(plan.parts.adapter, Progress())
