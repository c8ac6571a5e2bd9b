"""A GGUF file, written tensor by tensor: gguf-py packs the header, and each tensor follows as it is made.

The library's own way of writing tensors wants each of them whole; here a large one comes some rows at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import ModelError
from qlora.exporting.families import Placed
from qlora.exporting.formats import Format, type_of
from qlora.exporting.metadata import Field
from qlora.merging.shards import PIECE
from qlora.merging.writing import merged_rows

if TYPE_CHECKING:
    import numpy as np
    import torch

ALIGNMENT = 32  # of each tensor's first byte (gguf.md)


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name, its shape in torch's order, GGML's name of its type, and its rows in fp32, piece by
    piece."""

    name: str
    shape: tuple[int, ...]
    kind: str
    rows: Callable[[], Iterator[torch.Tensor]]

    @property
    def size_bytes(self) -> int:
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // block * size


def entries_of(placed: Sequence[Placed], form: Format, trained: str) -> list[Entry]:
    """The tensors of a model.

    Args:
        trained: the type in which the base was quantised for training.
    """
    return [Entry(one.name, one.shape, type_of(one.name, one.shape, form), lambda one=one: _rows(one, trained)) for one in placed]


def vector_entry(name: str, values: Sequence[float]) -> Entry:
    """A vector that the checkpoint does not hold."""
    def rows() -> Iterator[torch.Tensor]:
        import torch

        yield torch.tensor(values, dtype=torch.float32)

    return Entry(name, (len(values),), "F32", rows)


def write_gguf(
    path: Path, arch: str, fields: Sequence[Field], entries: Sequence[Entry], progress: Callable[[int, int], None]
) -> None:
    """Write a file.

    Args:
        progress: told how many bytes are written, and of how many.

    Raises:
        ModelError: a number that is not finite, or too large for its type.
        OSError: a file cannot be read or written.
    """
    _write_header(path, arch, fields, entries)
    done, total = 0, sum(entry.size_bytes for entry in entries)
    with path.open("ab") as file:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        for entry in entries:
            before = done
            for piece in entry.rows():
                block = _packed(entry, piece)
                file.write(memoryview(block).cast("B"))
                done += block.nbytes
                progress(done, total)
            assert done - before == entry.size_bytes, f"{entry.name} has another size than planned"
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())


def memory_bytes(placed: Sequence[Placed], form: Format) -> int:
    """Host memory that writing takes at most, beside the libraries."""
    def of(one: Placed) -> int:
        numbers = one.change.stored.num_numbers
        piece = numbers if one.is_whole else min(numbers, PIECE)
        # Read, in fp32, what is added, the sum, turned; and gguf-py's quantisers hold some more of the kind.
        need = (24 if one.is_whole else 20) * piece + 28 * min(piece, PIECE)
        return need + (12 * numbers if one.change.nf4 else 0)

    return max(map(of, placed), default=0)


# --- details -----------------------------------------------------------------------------------------------------------


def _rows(one: Placed, trained: str) -> Iterator[torch.Tensor]:
    import torch

    pieces = (piece.float() for piece in merged_rows(one.change, trained))
    if not one.is_whole:
        yield from (one.to_file(piece) for piece in pieces)
        return
    whole = one.to_file(torch.cat(list(pieces)))
    step = max(1, PIECE // max(1, math.prod(whole.shape[1:])))
    for first in range(0, len(whole), step):
        yield whole[first : first + step]


def _packed(entry: Entry, piece: torch.Tensor) -> np.ndarray:
    import gguf
    import torch

    if not bool(torch.isfinite(piece).all()):
        raise ModelError(f"{entry.name} would hold numbers that are not finite: the adapter or its base does.",
                         "Do not use this adapter; take an earlier checkpoint of its run.")
    largest = float(piece.abs().max()) if piece.numel() else 0.0
    # Blocks keep their scale in F16: of 8 bits it is the largest number / 127, of 4 bits / 8, and so on.
    if largest > {"F16": 65504.0, "Q8_0": 127 * 65504.0}.get(entry.kind, 7 * 65504.0 if entry.kind[0] == "Q" else math.inf):
        raise ModelError(f"{entry.name} holds {largest:.3g}, which {entry.kind} cannot.",
                         "Write bf16, which has the range of fp32: --gguf bf16")
    return gguf.quants.quantize(piece.contiguous().numpy(), gguf.GGMLQuantizationType[entry.kind])


def _write_header(path: Path, arch: str, fields: Sequence[Field], entries: Sequence[Entry]) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, arch)
    add: dict[str, Callable[[str, Any], None]] = {
        "u32": writer.add_uint32, "f32": writer.add_float32, "bool": writer.add_bool, "str": writer.add_string,
    }
    for field in fields:
        add.get(field.kind, writer.add_array)(field.key, field.value)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        shape = gguf.quant_shape_to_byte_shape(entry.shape, kind) if entry.kind[0] == "Q" else entry.shape
        # A width in bytes where there are blocks; the library turns it back into numbers by the type.
        dtype = np.dtype(np.uint8 if entry.kind[0] == "Q" else np.float32)
        writer.add_tensor_info(entry.name, shape, dtype, entry.size_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
