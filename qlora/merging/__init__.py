"""Merge an adapter into its base: a model that anybody can load, without PEFT.

`adapter` says what is added, `base` where to, `parts` puts the two together, `writing` writes the sum tensor by tensor,
`workplace` is where, and `checking` holds what was written against base and adapter. `merge` is all of it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import VerificationError
from qlora.merging import workplace
from qlora.progress import Progress
from qlora.units import GIB, format_bytes

if TYPE_CHECKING:
    from qlora.hub.adapter import Adapter
    from qlora.merging.checking import Comparison
    from qlora.merging.parts import Parts

INTO = {
    "16bit": "into the base's original weights, which are finer than the 4-bit ones that the adapter was trained on",
    "nf4": "into the weights as NF4 had them in training, stored at full width: what was trained, and no smaller",
}
MAX_SHARD_BYTES = 5 * GIB


@dataclass(frozen=True)
class MergePlan:
    """What a merge will take; nothing is written yet.

    Attributes:
        size_bytes: of the weights that are written, into `num_shards` files.
        memory_bytes: host memory at its highest, beside the libraries.
        loaded_bytes: a model that takes more in fp32 is not loaded to be compared, but run from the disk.
    """

    parts: Parts
    out: Path
    into: str
    dtype: str | None
    max_shard_bytes: int
    size_bytes: int
    num_shards: int
    memory_bytes: int
    free_memory_bytes: int
    free_disk_bytes: int
    loaded_bytes: int

    def lines(self) -> list[str]:
        files = "1 file" if self.num_shards == 1 else f"{self.num_shards} files"
        return [
            f"Merge:   {self.parts.adapter.name} into {self.parts.adapter.base}, {INTO[self.into]}",
            f"Changes: {self.parts.num_changed} of {len(self.parts.changes)} tensors, one at a time",
            f"RAM:     {format_bytes(self.memory_bytes)} at most beside the libraries; "
            f"{format_bytes(self.free_memory_bytes)} free",
            f"Disk:    {format_bytes(self.size_bytes)} in {files}; {format_bytes(self.free_disk_bytes)} free",
            f"Folder:  {self.out}",
        ]


@dataclass(frozen=True)
class Merged:
    """A merged model on the disk.

    Attributes:
        into: "16bit" or "nf4".
        num_merged: matrices that the adapter changed, of `num_tensors` in all.
        comparison: with base and adapter.
    """

    folder: Path
    into: str
    size_bytes: int
    num_merged: int
    num_tensors: int
    comparison: Comparison

    def lines(self) -> list[str]:
        """What to tell the user."""
        found = self.comparison
        lines = [
            f"Merged:  {self.folder}  ({format_bytes(self.size_bytes)}; the adapter is in {self.num_merged} of "
            f"{self.num_tensors} tensors)",
            f"How:     {INTO[self.into]}",
        ]
        if found.how == "tensors":
            lines.append("Checked: every tensor read back from the disk; the model was not run, as its weights are kept in "
                         "a form that only Transformers' loader reads")
        else:
            ran = "loaded by Transformers" if found.how == "loaded" else "run from the disk module by module, as it is large"
            lines += [
                f"Checked: {ran}, against base + adapter by PEFT in fp32 on {found.num_positions} tokens: max |logit difference| "
                f"{found.max_difference:.2g}, KL {found.kl:.2g} nats, {found.max_kl:.2g} at most (the adapter itself: "
                f"{found.kl_of_adapter:.2g}), top-1 agreement {found.top1:.1%}; allowed: {found.limit}",
            ]
            if found.kl > 0.1 * found.kl_of_adapter > 0:
                lines.append("Note:    rounding the weights takes a tenth or more of what the adapter does; "
                             "--dtype fp32 keeps it all")
        return [*lines, *self._cost(), *self._load()]

    def _cost(self) -> list[str]:
        """What it means that training saw other weights than these."""
        if self.into == "nf4":
            return ["Cost:    none against training as it is; whoever puts it into 4 bits again rounds it a second time"]
        if self.comparison.trained is None:
            return []
        return [f"Cost:    against what was trained, the adapter on the base in 4 bits (NF4): {self.comparison.trained.words()}; "
                "--into nf4 keeps what was trained"]

    def _load(self) -> list[str]:
        return [
            f'Load it: AutoModelForCausalLM.from_pretrained({str(self.folder)!r}, dtype="auto")   # Transformers',
            f"         {shlex.join(['vllm', 'serve', str(self.folder)])}",
        ]


def default_folder(adapter: Adapter, ending: str = "merged") -> Path:
    """Where a merged model goes without a word: NAME-merged, in the folder that one is in."""
    named = Path(adapter.name).expanduser().resolve()
    return Path(f"{named.parent.name if named.name == 'adapter' else named.name}-{ending}")


def plan_merge(
    adapter: Adapter, out: Path | str | None = None, *, into: str = "16bit", dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES, progress: Progress | None = None,
) -> MergePlan:
    """What `merge` with the same arguments will do, and whether it can. Writes nothing; a base on the Hub is downloaded.

    Raises:
        ModelError: base or adapter cannot be had, do not belong together, or cannot be merged as a sum.
        OutputError: OUT is not empty, or there is not enough room on the disk or in RAM.
    """
    from qlora.merging import checking, writing
    from qlora.merging.parts import gather
    from qlora.merging.shards import split

    assert into in INTO, into
    out = default_folder(adapter) if out is None else Path(out).expanduser()
    workplace.refuse_full(out)
    parts = gather(adapter, into=into, dtype=dtype, progress=progress or Progress())
    outlines = [change.outline for change in parts.changes]
    size_bytes, free_bytes = sum(outline.size_bytes for outline in outlines), _free_memory()
    loaded_bytes = min(checking.LOADED_BYTES, free_bytes // 2)
    need_bytes = max(writing.memory_bytes(parts.changes), checking.peak_bytes(
        parts.changes, parts.nf4, parts.files.size_bytes, parts.config.vocab_size, loaded_bytes))
    workplace.refuse_small_memory(free_bytes, need_bytes, "Merging")
    workplace.refuse_small_disk(out, size_bytes, "The merged model")
    return MergePlan(parts, out, into, dtype, max_shard_bytes, size_bytes, len(split(outlines, max_shard_bytes)), need_bytes,
                     free_bytes, workplace.disk_bytes(out), loaded_bytes)


def merge(
    adapter: Adapter, out: Path | str | None = None, *, into: str = "16bit", dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES, progress: Progress | None = None,
) -> Merged:
    """Write base and adapter as one model, and hold it against the two.

    It is written in OUT.part beside OUT and renamed at the end, so that OUT is there whole or not at all.

    Args:
        adapter: of `qlora.hub.fetch.find_adapter`.
        out: the new folder; `default_folder` without one.
        into: see `INTO`.
        dtype: bf16, fp16 or fp32 for all numbers; None leaves each tensor the type that the base has it in.
        max_shard_bytes: of one file; a tensor that is larger has a file of its own.

    Raises:
        ModelError: base or adapter cannot be had, do not belong together, or cannot be merged as a sum.
        OutputError: OUT is not empty, or there is not enough room on the disk or in RAM.
        BusyError: another process works on it.
        VerificationError: the merged model differs; it is kept under another name.
    """
    from qlora.merging import checking, writing

    progress = progress or Progress()
    plan = plan_merge(adapter, out, into=into, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=progress)
    for line in plan.lines()[1:4]:
        progress.note(line)
    parts, out = plan.parts, plan.out
    with workplace.workplace(out) as part:
        with workplace.explained(part, "The merged model"):
            with progress.stage(f"Merging {parts.num_changed} of {len(parts.changes)} tensors") as update:
                writing.write_weights(part, parts.changes, max_shard_bytes=max_shard_bytes, trained=parts.trained,
                                      progress=update)
                writing.copy_small_files(parts.folder, adapter.folder, part, dtype)
        with progress.stage("Comparing it with base and adapter") as update:
            comparison = checking.compare(part, parts.folder, adapter.folder, parts.changes, nf4=parts.nf4, trained=parts.trained,
                                          loaded_bytes=plan.loaded_bytes, progress=update)
        if not comparison.passes:
            raise _differs(comparison, workplace.put_aside(part, out))
        workplace.publish(part, out)
    return Merged(out, into, plan.size_bytes, parts.num_changed, len(parts.changes), comparison)


# --- details -----------------------------------------------------------------------------------------------------------


def _free_memory() -> int:
    from qlora.hardware.host import host_memory

    return host_memory()[1]


def _differs(found: Comparison, aside: Path) -> VerificationError:
    return VerificationError(
        f"The merged model is not what base and adapter are together: max |logit difference| {found.max_difference:.3g}, "
        f"KL {found.kl:.3g} nats, {found.max_kl:.3g} at most, top-1 agreement {found.top1:.1%}; allowed: {found.limit}. "
        f"It is kept as {aside}, to be looked at.",
        "With --dtype fp32 nothing is rounded, which tells whether rounding does it. Until then, load the adapter beside its "
        "base.",
    )
