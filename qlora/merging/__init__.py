"""Merge an adapter into its base: a model that anybody can load, without PEFT.

`adapter` says what is added, `base` where to, `writing` writes it tensor by tensor, and `checking` holds what was written against
base and adapter. `merge` is all of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import _compat
from qlora.errors import BusyError, OutputError, VerificationError
from qlora.progress import Progress
from qlora.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from qlora.hub.adapter import Adapter
    from qlora.merging.base import Change
    from qlora.merging.checking import Comparison

INTO = {
    "16bit": "into the base's original weights, which are finer than the 4-bit ones that the adapter was trained on",
    "nf4": "into the weights as NF4 had them in training, stored at full width: what was trained, and no smaller",
}
MAX_SHARD_BYTES = 5 * GIB
_MARK = ".qlora-merge"  # in a folder that a merge works in; nothing else is ever cleared away


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
                f"{found.max_difference:.2g}, KL {found.kl:.2g} nats (the adapter itself: {found.kl_of_adapter:.2g}), "
                f"top-1 agreement {found.top1:.1%}; allowed: {found.limit}",
            ]
            if found.kl > 0.1 * found.kl_of_adapter > 0:
                lines.append("Note:    rounding the weights takes a tenth or more of what the adapter does; "
                             "--dtype fp32 keeps it all")
        return [*lines, f'Load it: AutoModelForCausalLM.from_pretrained({str(self.folder)!r}, dtype="auto")']


def default_folder(adapter: Adapter) -> Path:
    """Where a merged model goes without a word: NAME-merged, in the folder that one is in."""
    named = Path(adapter.name).expanduser().resolve()
    return Path(f"{named.parent.name if named.name == 'adapter' else named.name}-merged")


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
        BusyError: another process merges into it.
        VerificationError: the merged model differs; it is kept under another name.
    """
    from qlora.catalog.lookup import find_config
    from qlora.merging import adapter as adapters
    from qlora.merging import base, checking, writing

    assert into in INTO, into
    _compat.hide_loading_bars()
    progress = progress or Progress()
    out = default_folder(adapter) if out is None else Path(out).expanduser()
    _refuse_full(out)
    files = adapters.read_adapter(adapter.folder)
    with progress.stage(f"Looking at {adapter.base}") as update:
        folder = base.base_folder(adapter.base, adapter.base_revision, progress)
        config = find_config(str(folder))
        trained = _trained_precision(adapter)
        tensors = base.list_tensors(adapter.base, folder)
        changes = base.plan_changes(adapter.base, config, tensors, files, into=into, dtype=dtype, trained=trained)
        update(1, 1)
    size_bytes = sum(change.outline.size_bytes for change in changes)
    free_bytes = _free_memory()
    loaded_bytes = min(checking.LOADED_BYTES, free_bytes // 2)
    _refuse_small_memory(free_bytes, max(
        writing.memory_bytes(changes), checking.peak_bytes(changes, files.size_bytes, config.vocab_size, loaded_bytes)))
    with _workplace(out) as part:
        _refuse_small_disk(part, size_bytes)
        try:
            with progress.stage(f"Merging {len(files.products) + len(files.replaced)} of {len(changes)} tensors") as update:
                writing.write_weights(part, changes, max_shard_bytes=max_shard_bytes, trained=trained.compute, progress=update)
                writing.copy_small_files(folder, adapter.folder, part, dtype)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"The merged model cannot be written to {part}: {error.strerror or error}.",
                              "Make room or name another folder; the same command starts anew.") from error
        with progress.stage("Comparing it with base and adapter") as update:
            comparison = checking.compare(
                part, folder, adapter.folder, changes, trained=trained.compute, loaded_bytes=loaded_bytes, progress=update)
        if not comparison.passes:
            raise _differs(comparison, _put_aside(part, out))
        _publish(part, out)
    return Merged(out, into, size_bytes, len(files.products) + len(files.replaced), len(changes), comparison)


# --- details -----------------------------------------------------------------------------------------------------------


def _trained_precision(adapter: Adapter) -> Any:
    """As the run says; of an adapter from elsewhere, bf16."""
    from qlora.precision import Precision

    found = adapter.run.setting("model.dtype") if adapter.run else None
    return Precision(found if found in ("bf16", "fp16", "fp32") else "bf16", "fp32", False, "as in training")


def _free_memory() -> int:
    from qlora.hardware.host import host_memory

    return host_memory()[1]


def _refuse_full(out: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise OutputError(f"{out} is there already, and is not an empty folder.", "Name another folder for the merged model.")


def _refuse_small_memory(free_bytes: int, need_bytes: int) -> None:
    if need_bytes > free_bytes:
        raise OutputError(f"Merging takes {format_bytes(need_bytes)} of RAM; {format_bytes(free_bytes)} are free.",
                          "Close other programs, or merge on a machine with more RAM.")


def _refuse_small_disk(part: Path, size_bytes: int) -> None:
    free_bytes, need_bytes = shutil.disk_usage(part).free, size_bytes + 64 * MIB
    if need_bytes > free_bytes:
        raise OutputError(f"The merged model takes {format_bytes(need_bytes)}; {format_bytes(free_bytes)} are free at "
                          f"{part.parent}.",
                          "Make room, or name a folder on a larger disk.")


@contextlib.contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """An empty OUT.part that no other process works in; gone afterwards, whatever happens.

    Raises:
        BusyError: another process merges there.
        OutputError: it cannot be written, or was not made by a merge.
    """
    from filelock import FileLock, Timeout

    part = out.with_name(f"{out.name}.part")
    if part.is_symlink() or (part.exists() and not (part.is_dir() and ((part / _MARK).exists() or not any(part.iterdir())))):
        raise OutputError(f"{part} is where the merged model would be made, and something else is there.",
                          "Move that away, or name another folder.")
    try:
        part.mkdir(parents=True, exist_ok=True)
        lock = FileLock(part / _MARK)
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"Another process merges into {out}.", "Wait for it, or name another folder.") from None
    except (OSError, NotImplementedError) as error:
        raise OutputError(f"{part} cannot be written: {getattr(error, 'strerror', None) or error}.",
                          "Name another folder.") from error
    try:
        _clear(part)  # what a merge left that was killed
        yield part
    finally:
        _clear(part)
        lock.release()
        shutil.rmtree(part, ignore_errors=True)


def _clear(part: Path) -> None:
    """Remove all but the mark, which is locked. A file that cannot be removed is written over, or reported then."""
    for path in part.iterdir() if part.is_dir() else ():
        if path.name != _MARK:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _publish(part: Path, out: Path) -> None:
    """Rename what is whole, after all of it is on the disk."""
    from qlora import durable

    try:
        durable.sync_tree(part)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()  # empty: Windows renames onto nothing
        (part / _MARK).unlink(missing_ok=True)
        os.replace(part, out)
        durable.sync_folder(out.parent)
    except OSError as error:
        raise OutputError(f"The merged model cannot be put to {out}: {error.strerror or error}.",
                          "Name another folder.") from error


def _put_aside(part: Path, out: Path) -> Path:
    number = 1
    while (aside := out.with_name(f"{out.name}.differs{'' if number == 1 else f'-{number}'}")).exists():
        number += 1
    _publish(part, aside)
    return aside


def _differs(found: Comparison, aside: Path) -> VerificationError:
    return VerificationError(
        f"The merged model is not what base and adapter are together: max |logit difference| {found.max_difference:.3g}, "
        f"KL {found.kl:.3g} nats, top-1 agreement {found.top1:.1%}; allowed: {found.limit}. It is kept as {aside}, to be looked "
        "at.",
        "With --dtype fp32 nothing is rounded, which tells whether rounding does it. Until then, load the adapter beside its "
        "base.",
    )
