"""Export an adapter as GGUF, for llama.cpp, Ollama and whatever reads their files: merged into its base, or alone.

`formats` says how numbers are stored, `families` and `metadata` what llama.cpp wants of each family, `vocabulary` how a tokenizer
goes in; `writing` writes, `reading` reads back, `checking`, `texts` and `adapter` compare. `export` is all of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import VerificationError
from qlora.exporting.formats import ADAPTER_FORMATS, DEFAULT, FORMATS, Format, find_format
from qlora.merging import INTO, default_folder, workplace
from qlora.progress import Progress
from qlora.units import format_bytes

if TYPE_CHECKING:
    from qlora.exporting.adapter import AdapterCheck
    from qlora.exporting.checking import ModelCheck, NumbersCheck
    from qlora.exporting.families import Family
    from qlora.exporting.metadata import Field
    from qlora.exporting.texts import TextCheck
    from qlora.exporting.vocabulary import Vocabulary
    from qlora.exporting.writing import Entry
    from qlora.hub.adapter import Adapter
    from qlora.merging.parts import Parts

__all__ = ["ADAPTER_FORMATS", "DEFAULT", "FORMATS", "ExportPlan", "Exported", "export", "find_format", "plan_export"]


@dataclass(frozen=True)
class ExportPlan:
    """What an export will take; nothing is written yet.

    Attributes:
        file: the name of the GGUF file in `out`.
        vocabulary: None for an adapter alone.
        memory_bytes: host memory at its highest, beside the libraries.
        loaded_bytes: a model that takes more to load is not loaded to be compared, but run from the disk.
        notes: what somebody who uses the file should know.
    """

    parts: Parts
    out: Path
    file: str
    form: Format
    into: str
    family: Family
    fields: tuple[Field, ...]
    entries: tuple[Entry, ...]
    vocabulary: Vocabulary | None
    memory_bytes: int
    free_memory_bytes: int
    free_disk_bytes: int
    loaded_bytes: int
    notes: tuple[str, ...]

    @property
    def is_adapter(self) -> bool:
        return self.vocabulary is None

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries)

    def lines(self) -> list[str]:
        adapter = self.parts.adapter
        what = (f"the adapter {adapter.name} alone, for a GGUF file of {adapter.base}" if self.is_adapter
                else f"{adapter.name} merged into {adapter.base}, {INTO[self.into]}")
        lines = [
            f"Export:  {what}",
            f"Format:  {self.form.name}, {self.form.about}; architecture {self.family.arch}, {len(self.entries)} tensors",
            f"RAM:     {format_bytes(self.memory_bytes)} at most beside the libraries; "
            f"{format_bytes(self.free_memory_bytes)} free",
            f"Disk:    {format_bytes(self.size_bytes)}; {format_bytes(self.free_disk_bytes)} free",
            f"Folder:  {self.out}, with {self.file} and a Modelfile",
        ]
        return lines + [f"Note:    {note}" for note in self.notes]


@dataclass(frozen=True)
class Exported:
    """A GGUF file on the disk, and what was found about it.

    Attributes:
        has_template: whether the Modelfile holds the chat template.
        numbers: of every tensor. model, texts: of a merged model. adapter: of an adapter alone.
    """

    plan: ExportPlan
    folder: Path
    size_bytes: int
    has_template: bool
    numbers: NumbersCheck
    model: ModelCheck | None
    texts: TextCheck | None
    adapter: AdapterCheck | None

    @property
    def path(self) -> Path:
        return self.folder / self.plan.file

    def lines(self) -> list[str]:
        """What to tell the user."""
        from qlora.exporting.words import lines_of

        return lines_of(self)


def plan_export(
    adapter: Adapter, out: Path | str | None = None, *, form: str | None = None, adapter_only: bool = False, into: str = "16bit",
    progress: Progress | None = None,
) -> ExportPlan:
    """What `export` with the same arguments will do, and whether it can. Writes nothing; a base on the Hub is downloaded.

    Raises:
        RecipeError: there is no such format, or it is none for an adapter.
        ModelError: base or adapter cannot be had, do not belong together, or llama.cpp would compute something else.
        OutputError: OUT is not empty, or there is not enough room on the disk or in RAM.
    """
    from qlora.exporting import planning

    progress = progress or Progress()
    chosen = planning.choose_format(form, adapter_only)
    out = default_folder(adapter, "gguf") if out is None else Path(out).expanduser()
    workplace.refuse_full(out)
    stem = re.sub(r"[^\w.-]+", "-", out.name.removesuffix("-gguf")).strip("-.") or "model"
    file = f"{stem}-{'adapter-' if adapter_only else ''}{chosen.name.upper()}.gguf"
    plan = planning.make_plan(adapter, out, file, chosen, into, adapter_only, progress)
    workplace.refuse_small_memory(plan.free_memory_bytes, plan.memory_bytes, "Exporting")
    workplace.refuse_small_disk(out, plan.size_bytes, "The GGUF file")
    return plan


def export(
    adapter: Adapter, out: Path | str | None = None, *, form: str | None = None, adapter_only: bool = False, into: str = "16bit",
    progress: Progress | None = None,
) -> Exported:
    """Write a GGUF file and a Modelfile for Ollama, and hold the file against base and adapter.

    They are written in OUT.part beside OUT, which is renamed at the end, so that OUT is there whole or not at all.

    Args:
        adapter: of `qlora.hub.fetch.find_adapter`.
        out: the new folder; NAME-gguf without one.
        form: see `FORMATS`; q8_0 without one, and f16 for an adapter alone.
        adapter_only: write the adapter without its base.
        into: which weights of the base, "16bit" or "nf4"; see `qlora.merging.INTO`.

    Raises:
        RecipeError: there is no such format, or it is none for an adapter.
        ModelError: base or adapter cannot be had, do not belong together, or llama.cpp would compute something else.
        OutputError: OUT is not empty, or there is not enough room on the disk or in RAM.
        BusyError: another process works on it.
        VerificationError: the file is not the model; it is kept under another name.
    """
    from qlora.exporting import carrying

    progress = progress or Progress()
    plan = plan_export(adapter, out, form=form, adapter_only=adapter_only, into=into, progress=progress)
    for line in (line for line in plan.lines() if line.startswith(("Format", "RAM", "Disk", "Note"))):
        progress.note(line)
    with workplace.workplace(plan.out) as part:
        with workplace.explained(part, "The GGUF file"):
            has_template = carrying.write(plan, part, progress)
        found = carrying.check(plan, part, progress)
        problem = carrying.problem_of(plan, *found)
        if problem:
            aside = workplace.put_aside(part, plan.out)
            raise VerificationError(
                f"{plan.file} is not what base and adapter are together: {problem}. It is kept in {aside}, to be looked at.",
                "Take a finer format, such as --gguf f16, which tells whether rounding does it. Until then, use the merged "
                "model: qlora merge",
            )
        size_bytes = (part / plan.file).stat().st_size
        workplace.publish(part, plan.out)
    return Exported(plan, plan.out, size_bytes, has_template, *found)
