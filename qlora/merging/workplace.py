"""Where a new folder is made: OUT.part beside OUT, locked, and renamed when all of it is on the disk.

Whatever happens, OUT is there whole or not at all, and nothing is cleared away that somebody else made.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora.errors import BusyError, OutputError
from qlora.units import MIB, format_bytes

MARK = ".qlora-part"  # in a folder that is being made; no other is ever cleared


def refuse_full(out: Path) -> None:
    """Raises OutputError where OUT is there and holds something."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise OutputError(f"{out} is there already, and is not an empty folder.", "Name another folder.")


def refuse_small_memory(free_bytes: int, need_bytes: int, doing: str) -> None:
    """Raises OutputError where there is not enough RAM. `doing` begins the sentence: "Merging"."""
    if need_bytes > free_bytes:
        raise OutputError(f"{doing} takes {format_bytes(need_bytes)} of RAM; {format_bytes(free_bytes)} are free.",
                          "Close other programs, or do it on a machine with more RAM.")


def disk_bytes(out: Path) -> int:
    """What is free where OUT would be made: on the disk of its nearest folder that is there."""
    place = out.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def refuse_small_disk(out: Path, size_bytes: int, what: str) -> None:
    """Raises OutputError where there is not enough room. `what` begins the sentence: "The merged model"."""
    free_bytes, need_bytes = disk_bytes(out), size_bytes + 64 * MIB
    if need_bytes > free_bytes:
        raise OutputError(f"{what} takes {format_bytes(need_bytes)}; {format_bytes(free_bytes)} are free at "
                          f"{out.absolute().parent}.",
                          "Make room, or name a folder on a larger disk.")


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """An empty OUT.part that no other process works in; gone afterwards, whatever happens.

    Raises:
        BusyError: another process works there.
        OutputError: it cannot be written, or was not made here.
    """
    from filelock import FileLock, Timeout

    part = out.with_name(f"{out.name}.part")
    if part.is_symlink() or (part.exists() and not (part.is_dir() and ((part / MARK).exists() or not any(part.iterdir())))):
        raise OutputError(f"{part} is where {out.name} would be made, and something else is there.",
                          "Move that away, or name another folder.")
    try:
        part.mkdir(parents=True, exist_ok=True)
        lock = FileLock(part / MARK)
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"Another process is making {out}.", "Wait for it, or name another folder.") from None
    except (OSError, NotImplementedError) as error:
        raise OutputError(f"{part} cannot be written: {getattr(error, 'strerror', None) or error}.",
                          "Name another folder.") from error
    try:
        _clear(part)  # what was left by a process that was killed
        yield part
    finally:
        _clear(part)
        lock.release()
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def explained(part: Path, what: str) -> Iterator[None]:
    """Turn the system's errors in writing into a sentence.

    Raises:
        OutputError
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{what} cannot be written to {part}: {error.strerror or error}.",
                          "Make room or name another folder; the same command starts anew.") from error


def publish(part: Path, out: Path) -> None:
    """Rename what is whole, after all of it is on the disk.

    Raises:
        OutputError: it cannot be put there.
    """
    from qlora import durable

    try:
        durable.sync_tree(part)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()  # empty: Windows renames onto nothing
        (part / MARK).unlink(missing_ok=True)
        os.replace(part, out)
        durable.sync_folder(out.parent)
    except OSError as error:
        raise OutputError(f"What was made cannot be put to {out}: {error.strerror or error}.", "Name another folder.") from error


def put_aside(part: Path, out: Path) -> Path:
    """Publish under another name what did not come out as it should; returns where."""
    number = 1
    while (aside := out.with_name(f"{out.name}.differs{'' if number == 1 else f'-{number}'}")).exists():
        number += 1
    publish(part, aside)
    return aside


def _clear(part: Path) -> None:
    """Remove all but the mark, which is locked. A file that cannot be removed is written over, or reported then."""
    for path in part.iterdir() if part.is_dir() else ():
        if path.name != MARK:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
