"""Checkpoints that are whole or not there at all: written aside, sealed by a manifest, renamed in, verified before they are used.

Beside `checkpoint-<step>` a folder of checkpoints may hold, after a crash or for a moment:

    .incoming-<step>        is being written, or is written and about to be renamed
    .outgoing-<step>        is being removed
    checkpoint-<step>.bad   was found damaged, and is left for a person to look at

The manifest has the size and SHA-256 of every file, and a hash of itself. That finds what crashes, disks and copying do to a
checkpoint. It is no signature: whoever can write into the folder can write a manifest too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from qlora.durable import sync_folder
from qlora.errors import OutputError, QloraError, ResumeError
from qlora.units import MIB, format_bytes

MANIFEST = "manifest.json"
_FORMAT = 1
_FINAL, _INCOMING, _OUTGOING = "checkpoint-", ".incoming-", ".outgoing-"
_NAME = re.compile(r"(checkpoint-|\.incoming-|\.outgoing-)(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was whole when it was looked at. `facts` is what its writer wanted remembered, as JSON has it."""

    path: Path
    step: int
    facts: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run. One process at a time works with them; the lock on the run folder sees to that.

    All methods raise OutputError where the folder is there and cannot be listed.

    Args:
        folder: where they are; made when the first one is written.
        keep: how many of the newest `rotate` leaves. At least two, whatever is asked for: the newest may turn out damaged.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, max(2, keep)

    def write(self, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> Checkpoint:
        """Make `checkpoint-<step>`, in the place of one that is there already. All others stay as they are.

        Args:
            fill: writes the files into the folder that it is given; files only, no folders.
            facts: anything that is JSON.

        Raises:
            OutputError: it could not be written; nothing half of it is left.
        """
        incoming = self._path(_INCOMING, step)
        try:
            self._make_folder()
            _remove(incoming)
            incoming.mkdir()
            fill(incoming)
            facts = _seal(incoming, step, facts)
            self._put_in_place(incoming, step)
        except Exception as error:  # a KeyboardInterrupt is in a hurry: the next sweep removes what it leaves
            written_bytes = _size_bytes(incoming)
            _remove(incoming)
            if isinstance(error, OSError) and not isinstance(error, QloraError):
                raise self._not_written(step, written_bytes, error) from error
            raise
        return Checkpoint(self._path(_FINAL, step), step, facts)

    def rotate(self, keep_also: Collection[int] = ()) -> None:
        """Remove all but the newest `keep` and those of the steps in `keep_also`. To be called once a newer one is written."""
        for step in self.steps()[: -self.keep]:
            if step not in keep_also:
                self._retire(step)

    def sweep(self) -> None:
        """Remove what a crash has left half written or half removed. What is whole and the newest gets its name back instead."""
        self._recover()
        for kind in (_INCOMING, _OUTGOING):
            for step in self._numbers(kind):
                _remove(self._path(kind, step))

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and one line for each newer one that is not: those are set aside.

        Raises:
            ResumeError: a later version of the program wrote it.
        """
        self._recover()
        damage = []
        for step in reversed(self._numbers(_FINAL)):
            path = self._path(_FINAL, step)
            try:
                return Checkpoint(path, step, _verify(path, step)), damage
            except _Damaged as error:
                damage.append(_set_aside(path, error))
        return None, damage

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of this step.

        Raises:
            ResumeError: it is not there, damaged, or written by a later version of the program.
        """
        path = self._path(_FINAL, step)
        try:
            return Checkpoint(path, step, _verify(path, step))
        except _Damaged as error:
            raise ResumeError(f"{path} is needed and cannot be used: {error}.",
                              "Put a good copy of it back, or add --fresh to start anew beside it.") from None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were sealed, ascending. That they are still whole is not looked into."""
        found = ((step, self._path(_FINAL, step)) for step in self._numbers(_FINAL))
        return [step for step, path in found if _is_folder(path) and os.path.lexists(path / MANIFEST)]

    def ever_written(self) -> bool:
        """Whether there has been a checkpoint here, be it damaged by now."""
        return any(name.startswith((_FINAL, _OUTGOING)) for name in self._names())

    # --- details ------------------------------------------------------------------------------------------------------

    def _path(self, kind: str, step: int) -> Path:
        return self.folder / f"{kind}{step}"

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:  # not the same as an empty folder: nothing may begin anew because of it
            raise OutputError(f"{self.folder} cannot be read: {error.strerror or error}.",
                              "See to it that it is a folder that you may read.") from error

    def _numbers(self, kind: str) -> list[int]:
        matches = map(_NAME.fullmatch, self._names())
        return sorted(int(match[2]) for match in matches if match and match[1] == kind)

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)

    def _put_in_place(self, incoming: Path, step: int) -> None:
        final, outgoing = self._path(_FINAL, step), self._path(_OUTGOING, step)
        replaces = os.path.lexists(final)
        if replaces:  # no system exchanges two folders at once; a crash in between is put right by _recover
            _remove(outgoing)
            os.replace(final, outgoing)
        try:
            os.replace(incoming, final)
        except OSError:
            if replaces:
                os.replace(outgoing, final)
            raise
        sync_folder(self.folder)
        _remove(outgoing)

    def _retire(self, step: int) -> None:
        outgoing = self._path(_OUTGOING, step)
        _remove(outgoing)
        try:
            # Removing takes many steps; a crash between them must not leave something that has a checkpoint's name.
            os.replace(self._path(_FINAL, step), outgoing)
        except OSError:
            return  # it is whole still, and the next rotation comes to it again
        _remove(outgoing)

    def _recover(self) -> None:
        """A whole checkpoint that is newer than all others was about to be renamed, or replaced, when the program ended."""
        # Of the same step, what was coming in is newer than what was going out.
        candidates = sorted((step, kind) for kind in (_INCOMING, _OUTGOING) for step in self._numbers(kind))
        for step, kind in candidates:
            if step <= max(self.steps(), default=-1):
                continue
            try:
                _verify(self._path(kind, step), step)
                os.replace(self._path(kind, step), self._path(_FINAL, step))
            except (_Damaged, ResumeError, OSError):
                continue  # half written; or the folder cannot be written to, which the run is about to find out

    def _not_written(self, step: int, written_bytes: int, error: OSError) -> OutputError:
        try:
            last_bytes = sum(_size_bytes(self._path(_FINAL, number)) for number in self.steps()[-1:])
            free_bytes = shutil.disk_usage(self.folder).free
        except OSError:
            last_bytes = written_bytes = free_bytes = 0  # a disk that is gone has no numbers
        if written_bytes > last_bytes:
            needs = f"more than {format_bytes(written_bytes)}"
        else:
            needs = f"about {format_bytes(last_bytes)}"
        room = f" It takes {needs}, and {format_bytes(free_bytes)} are free there." if written_bytes or last_bytes else ""
        return OutputError(
            f"The checkpoint of step {step:,} could not be written to {self.folder}: {error.strerror or error}.{room} "
            "Those before it are as they were.",
            "Free some space there, or see to it that the folder can be written to; the same command then goes on from the last.",
        )


# --- the manifest -----------------------------------------------------------------------------------------------------


class _Damaged(Exception):
    """A checkpoint is not what its manifest says; which file, and how, in a few words."""


def _seal(folder: Path, step: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Bring everything in the folder to the disk, and the manifest after it; return the facts as they will be read.

    Raises:
        OSError: not everything is on the disk.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # safetensors leaves 0600; the folder has what the user's umask allows
    files = {}
    for name, entry in sorted(_entries(folder).items()):
        assert entry.is_file(follow_symlinks=False) and name != MANIFEST, f"a checkpoint cannot hold {name}"
        os.chmod(entry.path, mode)
        with open(entry.path, "r+b") as file:  # for writing too: Windows syncs nothing else
            files[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": _sha256(file)}
            os.fsync(file.fileno())
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = _with_hash({"format": _FORMAT, "step": step, "date": date, "files": files, "facts": dict(facts)})
    with open(folder / MANIFEST, "xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    return json.loads(text)["facts"]


def _verify(folder: Path, step: int) -> dict[str, Any]:
    """The facts of a checkpoint that is whole.

    Only names that are in the folder are ever opened: one that a manifest made up, such as "../x", is a missing file.

    Raises:
        _Damaged: it is not whole.
        ResumeError: a later version of the program wrote it.
    """
    if not _is_folder(folder):
        raise _Damaged("it is no folder" if os.path.lexists(folder) else "it is missing")
    try:
        entries = _entries(folder)
        for name, entry in entries.items():
            if not entry.is_file(follow_symlinks=False):
                raise _Damaged(f"{_shown(name)} is not a regular file")
        if MANIFEST not in entries:
            raise _Damaged(f"{MANIFEST} is missing")
        manifest = _read_manifest(folder)
        if manifest["step"] != step:
            raise _Damaged(f"{MANIFEST} is that of step {manifest['step']}")
        files = manifest["files"]
        if missing := sorted(files.keys() - entries.keys()):
            raise _Damaged(f"{_shown(missing[0])} is missing")
        if unknown := sorted(entries.keys() - files.keys() - {MANIFEST}):
            raise _Damaged(f"{_shown(unknown[0])} does not belong to it")
        for name, listed in files.items():  # sizes of all first: they cost nothing
            size = entries[name].stat(follow_symlinks=False).st_size
            if size != listed["bytes"]:
                raise _Damaged(f"{_shown(name)}: {size:,} bytes of {listed['bytes']:,}")
        for name, listed in files.items():
            with open(folder / name, "rb") as file:
                if _sha256(file) != listed["sha256"]:
                    raise _Damaged(f"{_shown(name)}: other content than was written")
    except OSError as error:
        raise _Damaged(f"{Path(error.filename or folder).name} cannot be read: {error.strerror or error}") from error
    return manifest["facts"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest that is byte for byte as it was written, and has the parts that `_verify` reads.

    Raises:
        _Damaged, ResumeError: as `_verify`.
        OSError: it cannot be read.
    """
    text = (folder / MANIFEST).read_bytes()
    try:
        manifest = json.loads(text)
        del manifest["sha256"]
        is_whole = _with_hash(manifest) == text
    except (ValueError, KeyError, TypeError, RecursionError):  # no JSON, no object, or nothing but brackets
        is_whole = False
    if not is_whole:
        raise _Damaged(f"{MANIFEST} is cut off or changed")
    if manifest.get("format") != _FORMAT:
        raise ResumeError(
            f"{folder} has format {manifest.get('format')!r}, and this version of the program knows format {_FORMAT}.",
            "Go on with the version of qlora that wrote it, or add --fresh to start anew beside it.",
        )
    files, facts = manifest.get("files"), manifest.get("facts")
    well_formed = isinstance(facts, dict) and isinstance(files, dict) and all(
        isinstance(listed, dict) and type(listed.get("bytes")) is int and isinstance(listed.get("sha256"), str)
        for listed in files.values()
    )
    if type(manifest.get("step")) is not int or not well_formed:
        raise _Damaged(f"{MANIFEST} lacks what a manifest has to say")
    return manifest


def _with_hash(content: Mapping[str, Any]) -> bytes:
    """A manifest as it stands in its file: with the hash of all else that is in it."""
    content = json.loads(json.dumps(content))  # keys and tuples as JSON has them, so that reading it back gives the same hash
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, sort_keys=True, indent=2) + "\n").encode()


# --- files ------------------------------------------------------------------------------------------------------------


def _set_aside(path: Path, reason: _Damaged) -> str:
    """Give a damaged checkpoint a name that nobody looks for; return what there is to say."""
    bad, number = path.with_name(f"{path.name}.bad"), 1
    while os.path.lexists(bad):
        number += 1
        bad = path.with_name(f"{path.name}.bad-{number}")
    try:
        os.replace(path, bad)
    except OSError as error:
        return f"{path.name} is damaged ({reason}); passed over, as it cannot be renamed ({error.strerror or error})"
    return f"{path.name} is damaged ({reason}); set aside as {bad.name}"


def _remove(folder: Path) -> None:
    """Remove a folder, following no links. What resists (a file that a virus scanner holds) stays for the next sweep."""
    if _is_folder(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _entries(folder: Path) -> dict[str, os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return {entry.name: entry for entry in entries}


def _size_bytes(folder: Path) -> int:
    """Of the files in it; 0 where that cannot be found out."""
    try:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in _entries(folder).values())
    except OSError:
        return 0


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(MIB):
        digest.update(chunk)
    return digest.hexdigest()


def _shown(name: str) -> str:
    """A file's name for a message: anything that could play with a terminal is spelt out."""
    return name if name.isprintable() else ascii(name)
