"""The shelf of quantised bases in the user's cache: which are there, whether they are whole, and how to take them away.

One folder a base, named by the base and a digest of all that makes it what it is:

    manifest.json   what is in the folder: identity, layouts, offsets, checksums; written last, with a checksum of its own
    layers.bin      one block a layer, each on whole pages, in order
    rest.bin        everything outside of the layers
    damaged         only after a checksum was wrong: the reason; such a base is made anew
    .in-use-*.lock  one for each process that has it open; the lock is the operating system's and ends with its holder

One that is being made ends in ".part" and holds a journal in place of the manifest. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora.durable import write_text
from qlora.errors import OutputError, RecipeError
from qlora.home import cache_home
from qlora.progress import Progress

FORMAT = 1
MANIFEST, LAYERS, REST, DAMAGED, JOURNAL = "manifest.json", "layers.bin", "rest.bin", "damaged", "journal.jsonl"
PART = ".part"


def bases_home() -> Path:
    """Where all bases are kept; it may not exist yet."""
    return cache_home() / "bases"


def folder_of(identity: Mapping[str, Any]) -> Path:
    """Where the base of this identity is or would be."""
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in short_name(identity))
    return bases_home() / f"{name[-60:].lstrip('.-')}-{digest(identity)[:12]}"


def short_name(identity: Mapping[str, Any]) -> str:
    """What people call the base: its Hub id, or the name of its folder."""
    base = str(identity["base"])
    return Path(base).name if Path(base).is_absolute() else base


def digest(document: Any) -> str:
    """A checksum over plain JSON values."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


# --- whole or not ------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, document: Mapping[str, Any]) -> None:
    """Raises: OSError."""
    write_text(folder / MANIFEST, json.dumps({**document, "checksum": digest(document)}))


def read_manifest(folder: Path, *, whole: bool = True) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Args:
        whole: the files that it speaks of must have their sizes, and none been found to be damaged.

    Raises:
        ValueError: the base cannot be used; says why.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"its manifest cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise ValueError("its manifest is damaged") from None
    if not isinstance(document, dict) or document.pop("checksum", None) != digest(document):
        raise ValueError("its manifest is damaged")
    if document.get("format") != FORMAT:
        raise ValueError(f"it has format {document.get('format')} of another version of this program; this one reads {FORMAT}")
    if not whole:
        return document
    with contextlib.suppress(OSError):
        raise ValueError((folder / DAMAGED).read_text(encoding="utf-8").strip() or "it was found to be damaged")
    for name, size in ((LAYERS, document["layers_bytes"]), (REST, document["rest_bytes"])):
        try:
            found = (folder / name).stat().st_size
        except OSError:
            raise ValueError(f"{name} is missing") from None
        if found != size:
            raise ValueError(f"{name} has {found:,} bytes and should have {size:,}")
    return document


def mark_damaged(folder: Path, reason: str) -> None:
    """So that the next start makes the base anew. A folder that cannot be written stays as it is."""
    with contextlib.suppress(OSError):
        write_text(folder / DAMAGED, reason)


def other_versions(identity: Mapping[str, Any]) -> list[str]:
    """In what the kept copies of this base differ from the one that is asked for, one entry a copy."""
    found = []
    for folder in _folders():
        with contextlib.suppress(ValueError):
            kept = read_manifest(folder)["identity"]
            if kept.get("base") == identity["base"] and kept != identity:
                found.append(", ".join(sorted(key for key in {*kept, *identity} if kept.get(key) != identity.get(key))))
    return found


# --- one at a time -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def building(folder: Path, progress: Progress, what: str) -> Iterator[None]:
    """Alone at work on this base; waits for whoever is, and says so.

    Raises:
        OutputError: the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.note(f"Another run is quantising {what}; waiting until it has finished.")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise cannot_write(folder.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def cannot_write(folder: Path, error: Exception) -> OutputError:
    """For a cache that is read-only, or a disk that fails."""
    return OutputError(f"The quantised base cannot be written to {folder}: {getattr(error, 'strerror', None) or error}.",
                       "Set QLORA_CACHE to a folder that you may write to, on a local disk.")


class Hold:
    """Says that a base is in use, until it is let go or the process ends. In a read-only cache it says nothing."""

    def __init__(self, folder: Path):
        self._path = folder / f".in-use-{os.getpid()}-{uuid.uuid4().hex[:8]}.lock"
        self._lock = FileLock(self._path)
        with contextlib.suppress(OSError, NotImplementedError):
            self._lock.acquire(timeout=0)

    def release(self) -> None:
        self._lock.release()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def _is_held(folder: Path) -> bool:
    """Whether any process has the base open, or is making it. Marks that killed processes left are removed."""
    for path in (folder.with_name(f"{folder.name.removesuffix(PART)}.lock"), *folder.glob(".in-use-*.lock")):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        if path.parent == folder:
            path.unlink(missing_ok=True)
    return False


# --- the list ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shelved:
    """A base on the shelf.

    Attributes:
        name: of its folder.
        base: what people call it.
        num_parameters: 0 where that is not known.
        used: when it was opened last, in seconds since 1970.
        state: "" for one that is whole, else why it is not.
    """

    name: str
    base: str
    num_parameters: int
    size_bytes: int
    used: float
    state: str


@dataclass(frozen=True)
class Cleared:
    """What `clear_stores` did: folders it removed, bytes that this freed, and folders it left because they are in use."""

    removed: tuple[str, ...]
    freed_bytes: int
    in_use: tuple[str, ...]


def list_stores() -> list[Shelved]:
    """Every base that is kept, the one used last first, unfinished and damaged ones included."""
    found = []
    for folder in _folders():
        base, num_parameters, state = folder.name, 0, ""
        try:
            manifest = read_manifest(folder)
            base, num_parameters = short_name(manifest["identity"]), manifest["num_parameters"]
        except ValueError as error:
            state = "unfinished" if folder.name.endswith(PART) else str(error)
        found.append(Shelved(folder.name, base, num_parameters, size_of(folder), _used(folder), state))
    return sorted(found, key=lambda shelved: -shelved.used)


def clear_stores(names: Sequence[str] | None = None) -> Cleared:
    """Remove bases by the names of their folders or of their models; None removes all. One in use is left alone.

    Raises:
        RecipeError: no base is called that; nothing has been removed then.
        OutputError: the disk does not let go of one.
    """
    stores = list_stores()
    for name in names or ():
        if not any(name in (store.name, store.base) for store in stores):
            known = ", ".join(store.name for store in stores) or "none"
            raise RecipeError(f"No base called {name!r} is kept.", f"Kept are: {known}.")
    removed, freed, in_use = [], 0, []
    for store in stores:
        if names is not None and store.name not in names and store.base not in names:
            continue
        folder = bases_home() / store.name
        if _is_held(folder):
            in_use.append(store.name)
            continue
        remove(folder)
        removed.append(store.name)
        freed += store.size_bytes
    return Cleared(tuple(removed), freed, tuple(in_use))


def remove(folder: Path) -> None:
    """Take a base away, under another name first, so that one that is half removed is never opened.

    Raises:
        OutputError: the disk does not let go of it.
    """
    aside = folder.with_name(f"{folder.name.removesuffix(PART)}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        os.replace(folder, aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise OutputError(f"{folder} cannot be removed: {error.strerror or error}.", "Remove it by hand.") from error


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _folders() -> list[Path]:
    home = bases_home()
    return sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []


def _used(folder: Path) -> float:
    """The manifest's time is set at each opening."""
    for name in (MANIFEST, JOURNAL, "."):
        with contextlib.suppress(OSError):
            return (folder / name).stat().st_mtime
    return 0.0
