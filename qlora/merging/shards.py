"""Safetensors files, read by rows and written as their bytes come.

The format is a length, a list in JSON, and the tensors one after another (https://github.com/huggingface/safetensors). The
library's own writer wants all tensors of a file in memory; this one wants a piece of one.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Numbers that are in memory at once: 64 MiB in fp32.
PIECE = 2**24
_COPIED_BYTES = 2**24
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: its type as the file calls it, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    size_bytes: int

    @property
    def num_numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Outline:
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def read_list(path: Path) -> list[Stored]:
    """Every tensor of a file, in the order of their bytes.

    Raises:
        safetensors.SafetensorError: it is none, or is cut short.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt"):  # holds the list against the file: types, gaps, overlaps, its end
        pass
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    found = [
        Stored(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + entry["data_offsets"][0],
               entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries.items()
    ]
    return sorted(found, key=lambda stored: stored.start)


def read_bytes(stored: Stored) -> Iterator[bytes]:
    """A tensor's bytes, up to 16 MiB at a time."""
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        left = stored.size_bytes
        while left:
            block = file.read(min(left, _COPIED_BYTES))
            if not block:
                raise OSError(f"{stored.path} ends in the middle of {stored.name}.")
            left -= len(block)
            yield block


def read_rows(stored: Stored, first: int = 0, count: int | None = None) -> torch.Tensor:
    """Rows of a tensor of floats, in the type of the file; all of them without `count`.

    Read, not mapped: what has been read of a mapped file counts as this process's memory.
    """
    import torch

    rows = stored.shape[0] if stored.shape else 1
    count = rows - first if count is None else min(count, rows - first)
    row_bytes = stored.size_bytes // rows if rows else 0
    block = bytearray(count * row_bytes)
    with stored.path.open("rb") as file:
        file.seek(stored.start + first * row_bytes)
        if file.readinto(block) != len(block):
            raise OSError(f"{stored.path} ends in the middle of {stored.name}.")
    shape = (count, *stored.shape[1:]) if stored.shape else ()
    if not block:
        return torch.empty(shape, dtype=torch_type(stored.dtype))
    return torch.frombuffer(block, dtype=torch_type(stored.dtype)).reshape(shape)


def row_pieces(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of rows that have up to `PIECE` numbers together; one piece where all have."""
    rows = shape[0] if shape else 1
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def torch_type(name: str) -> torch.dtype:
    """torch's name for a type of floats of the format."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def split(outlines: Iterable[Outline], max_bytes: int) -> list[list[Outline]]:
    """Files of at most so many bytes, or of one tensor, in the order given."""
    files: list[list[Outline]] = []
    filled = 0
    for outline in outlines:
        if not files or filled + outline.size_bytes > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(outline)
        filled += outline.size_bytes
    return files


def write_shard(path: Path, outlines: Sequence[Outline], content: Callable[[Outline], Iterable[bytes | memoryview]]) -> None:
    """Write a file under a temporary name; its own is there once it is whole and on the disk.

    Raises:
        OSError: it cannot be written.
    """
    # The widest first, as the library has it, so that each tensor begins at a multiple of its numbers' size.
    ordered = sorted(outlines, key=lambda outline: -FLOATS.get(outline.dtype, 1))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for outline in ordered:
        entries[outline.name] = {"dtype": outline.dtype, "shape": outline.shape, "data_offsets": [end, end + outline.size_bytes]}
        end += outline.size_bytes
    head = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    aside = path.with_name(f".{path.name}.part")
    with aside.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for outline in ordered:
            before = file.tell()
            for block in content(outline):
                file.write(block)
            assert file.tell() - before == outline.size_bytes, f"{outline.name} has another size than planned"
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
