"""Bring a quantised base to the disk, so that a kill, a full disk or a second run at any moment leaves nothing that looks whole.

Every finished layer is on the disk and in the journal before the next is begun; a build that was killed goes on after the
layers whose bytes are as the journal says. The manifest comes last, and then the folder gets its name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qlora.durable import sync_folder
from qlora.engine import shelf
from qlora.engine.arena import Layout, aligned_block, layer_layout, layout_of
from qlora.engine.skeleton import rest_tensors
from qlora.engine.store import BaseStore, look_up
from qlora.errors import OutputError
from qlora.progress import Progress
from qlora.units import format_bytes

_CHUNK_BYTES = 2**25
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FREE_MARGIN_BYTES = 2**24


class Content:
    """The layers and the rest of a model.

    Attributes:
        layouts: one a layer, equal ones the same object.
    """

    def __init__(self, model: torch.nn.Module, layers_path: str):
        self.model, self.layers_path = model, layers_path
        self.layers = list(model.get_submodule(layers_path))
        known: dict[Layout, Layout] = {}
        self.layouts = [known.setdefault(layout, layout) for layout in map(layer_layout, self.layers)]
        self.rest = rest_tensors(model, layers_path)
        self.rest_layout = layout_of(self.rest)
        self.num_parameters = sum(
            parameter.numel() if getattr(parameter, "quant_state", None) is None else parameter.quant_state.shape.numel()
            for parameter in model.parameters())

    @property
    def size_bytes(self) -> int:
        return sum(layout.size_bytes for layout in self.layouts) + self.rest_layout.size_bytes

    def fill(self, number: int, block: torch.Tensor) -> None:
        """Put a layer into a block, gaps as zeros."""
        raise NotImplementedError

    def rest_tensor(self, name: str) -> torch.Tensor:
        """One tensor of the rest, of the type in the layout; it may lie anywhere and in any strides."""
        raise NotImplementedError


def look_up_or_write(identity: Mapping[str, Any], content: Callable[[], Content], progress: Progress) -> BaseStore:
    """The kept base of this identity, else the one of `content`, which is called only then.

    Raises:
        OutputError: no room on the disk, with both sizes, or the cache cannot be written.
    """
    store, _ = look_up(identity)
    if store is not None:
        return store
    folder, name = shelf.folder_of(identity), shelf.short_name(identity)
    with shelf.building(folder, progress, name):
        store, reason = look_up(identity)  # somebody may have made it meanwhile
        if store is not None:
            return store
        if reason:
            progress.note(f"{name} is quantised anew: {reason}.")
        part, made = folder.with_name(folder.name + shelf.PART), content()
        if folder.is_dir():
            _reopen(folder, part)
        _write(part, identity, made, progress)
        try:
            os.replace(part, folder)
            sync_folder(folder.parent)
            (folder / shelf.JOURNAL).unlink()  # only now: without it, an unfinished base would be begun anew
        except OSError as error:
            raise shelf.cannot_write(folder, error) from error
        store, reason = look_up(identity)
        if store is None:
            raise OutputError(f"The quantised base in {folder} is not as it was written: {reason}.", "Look at that disk.")
        return store


def _reopen(folder: Path, part: Path) -> None:
    """Make an unfinished base of a damaged one, so that what is good in it need not be made again.

    Raises:
        OutputError: the cache cannot be written.
    """
    if part.exists():
        shelf.remove(part)
    try:
        manifest = shelf.read_manifest(folder, whole=False)
    except ValueError:
        shelf.remove(folder)  # nothing says what is in it
        return
    outline, layers, rest = manifest, manifest["layers"], manifest["rest"]
    entries = [{"part": str(number), "crc32": layer.pop("crc32")} for number, layer in enumerate(layers)]
    entries.append({"part": "rest", "crc32": rest.pop("crc32")})
    try:
        for name in (shelf.DAMAGED, shelf.JOURNAL):
            (folder / name).unlink(missing_ok=True)
        for entry in ({"outline": shelf.digest(outline)}, *entries):
            _note(folder, entry)
        os.replace(folder, part)
        (part / shelf.MANIFEST).unlink()
    except OSError as error:
        raise shelf.cannot_write(folder, error) from error


def _write(part: Path, identity: Mapping[str, Any], content: Content, progress: Progress) -> None:
    """Everything, into the folder of an unfinished base; what is there already and good is kept."""
    outline = _outline(identity, content)
    name, failing = shelf.short_name(identity), _Failing(part, content.size_bytes, shelf.short_name(identity))
    failing.check_room()
    with failing:
        checksums = _journal(part, shelf.digest(outline))
        layers_file = _opened(part / shelf.LAYERS)
        rest_file = _opened(part / shelf.REST)
    with layers_file, rest_file, progress.stage(f"Quantising {name}") as report:
        block = aligned_block(max(layout.size_bytes for layout in content.layouts))
        total = len(content.layouts) + 1
        for number, (layout, layer) in enumerate(zip(content.layouts, outline["layers"], strict=True)):
            report(number, total)
            key = str(number)
            if key not in checksums or _checksum(layers_file, layer["offset"], layout.size_bytes) != checksums[key]:
                view = block[: layout.size_bytes]
                content.fill(number, view)
                with failing:
                    checksums[key] = _append(layers_file, layer["offset"], [view])
                    _note(part, {"part": key, "crc32": checksums[key]})
            layer["crc32"] = checksums[key]
        report(total - 1, total)
        if "rest" not in checksums or _checksum(rest_file, 0, content.rest_layout.size_bytes) != checksums["rest"]:
            with failing:
                checksums["rest"] = _append(rest_file, 0, _rest_pieces(content))
                _note(part, {"part": "rest", "crc32": checksums["rest"]})
        outline["rest"]["crc32"] = checksums["rest"]
        with failing:
            layers_file.truncate(outline["layers_bytes"])
            rest_file.truncate(outline["rest_bytes"])
            shelf.write_manifest(part, outline)
        report(total, total)


def _outline(identity: Mapping[str, Any], content: Content) -> dict[str, Any]:
    """The manifest without checksums."""
    kinds = list(dict.fromkeys(content.layouts))
    layers, offset = [], 0
    for layout in content.layouts:
        layers.append({"layout": kinds.index(layout), "offset": offset})
        offset += layout.size_bytes
    return {
        "format": shelf.FORMAT, "identity": dict(identity), "num_parameters": content.num_parameters,
        "layouts": [layout.to_json() for layout in kinds], "layers": layers, "layers_bytes": offset,
        "rest": {"layout": content.rest_layout.to_json()}, "rest_bytes": content.rest_layout.size_bytes,
    }


def _rest_pieces(content: Content) -> Iterator[torch.Tensor]:
    """The bytes of the rest in order, gaps included, in pieces that do not fill the memory."""
    position = 0
    for entry in content.rest_layout.entries:
        yield torch.zeros(entry.offset - position, dtype=torch.uint8)
        tensor = content.rest_tensor(entry.name)
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.torch_dtype, entry.shape), entry.name
        for piece in tensor.split(max(1, _CHUNK_BYTES * len(tensor) // max(1, tensor.nbytes))) if tensor.ndim else [tensor]:
            yield piece.cpu().contiguous().reshape(-1).view(torch.uint8)
        position = entry.offset + entry.num_bytes
    yield torch.zeros(content.rest_layout.size_bytes - position, dtype=torch.uint8)


# --- files -------------------------------------------------------------------------------------------------------------


def _opened(path: Path) -> BinaryIO:
    """For reading and writing; what is there stays."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+b", buffering=0)


def _append(file: BinaryIO, offset: int, pieces: Iterable[torch.Tensor]) -> int:
    """Write pieces of uint8 one after the other and bring them to the disk; returns their checksum."""
    file.seek(offset)
    checksum = 0
    for piece in pieces:
        view = memoryview(piece.numpy())
        checksum = zlib.crc32(view, checksum)
        while len(view):
            view = view[file.write(view) :]
    os.fsync(file.fileno())
    return checksum


def _checksum(file: BinaryIO, offset: int, size_bytes: int) -> int | None:
    """Of bytes in a file; None where it ends before them."""
    file.seek(offset)
    checksum = 0
    while size_bytes:
        chunk = file.read(min(_CHUNK_BYTES, size_bytes))
        if not chunk:
            return None
        checksum, size_bytes = zlib.crc32(chunk, checksum), size_bytes - len(chunk)
    return checksum


def _journal(part: Path, outline: str) -> dict[str, int]:
    """Checksums of what an earlier build of this very base has finished. Of any other, and without a journal, all goes."""
    found: dict[str, int] = {}
    try:
        for number, line in enumerate((part / shelf.JOURNAL).read_text(encoding="utf-8").splitlines()):
            entry = json.loads(line)
            if number == 0 and entry["outline"] != outline:
                break
            if number:
                found[entry["part"]] = entry["crc32"]
        else:
            return found
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        if found:
            return found  # the last line was being written
    if part.exists():
        shelf.remove(part)
    part.mkdir(parents=True)
    _note(part, {"outline": outline})
    return {}


def _note(part: Path, entry: Mapping[str, Any]) -> None:
    """A line of the journal, on the disk when this returns."""
    with open(part / shelf.JOURNAL, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


class _Failing:
    """What a failure to write means for an unfinished base, within it: without room it is removed, else it is kept.

    Raises:
        OutputError: on leaving, for any OSError.
    """

    def __init__(self, part: Path, size_bytes: int, name: str):
        self._part, self._size_bytes, self._name = part, size_bytes, name

    def check_room(self) -> None:
        """Raises: OutputError."""
        missing = self._size_bytes + _FREE_MARGIN_BYTES - shelf.size_of(self._part)
        free = self._free()
        if missing > free:
            raise self._no_room(f"Quantising {self._name} needs {format_bytes(missing)} in {shelf.bases_home()}, and "
                                f"{format_bytes(free)} are free there.")

    def __enter__(self) -> _Failing:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, OutputError):
            return
        if error.errno not in _NO_ROOM:
            raise shelf.cannot_write(self._part.parent, error) from error
        shutil.rmtree(self._part, ignore_errors=True)
        raise self._no_room(
            f"There was no more room for the quantised {self._name} in {shelf.bases_home()} ({error.strerror}): it needs "
            f"{format_bytes(self._size_bytes)}, and {format_bytes(self._free())} are free now that the unfinished one is removed."
        ) from error

    @staticmethod
    def _no_room(problem: str) -> OutputError:
        return OutputError(problem, "Free some space (`qlora cache` lists the bases that are kept, `qlora cache clear NAME` "
                                    "removes one), or set QLORA_CACHE to a folder on a larger disk.")

    @staticmethod
    def _free() -> int:
        folder = shelf.bases_home()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free
