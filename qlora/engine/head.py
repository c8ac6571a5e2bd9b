"""The output head in the four ways in which a run may keep it: on the device, in host memory, or in 8 or 4 bits on the device.

All but the first are read tile by tile, a tile being a run of rows of the (tokens, width) weight. A streamed head computes with
the numbers of a resident one. The two that are quantised do not: of normal weights 8-bit codes are off by 1.0 %, NF4 by 9.2 %
(root mean square, relative; blocks of 64 numbers; measured with bitsandbytes 0.50), in loss and gradient, in evaluation and in
generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from peft import PeftModel

# Of logits that are asked for outside of the loss, unless the loss has set another: 16 MiB are 2,048 rows of 4,096 numbers.
_TILE_BYTES = 2**24
_BLOCK = 64  # numbers that share a scale, in both quantised formats


class Head:
    """The weight of an output head, in tiles.

    Attributes:
        num_tokens: V, rows of the weight.
        width: H, numbers in a row.
        dtype: of the tiles, which is what products are computed in.
        bias: (V,) on the device, or None.
        sliceable: all of the weight lies on the device as it is, so that a tile costs nothing, nor does the whole.
        tile_rows: of the tiles in which `project` takes it.
    """

    sliceable = False

    def __init__(self, shape: torch.Size, dtype: torch.dtype, bias: torch.Tensor | None):
        self.num_tokens, self.width = shape
        self.dtype, self.bias = dtype, bias
        self.tile_rows = rows_within(self, _TILE_BYTES)

    def tiles(self, rows: int, *, backwards: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """Pairs of a first row and the weight from there on, of shape (up to `rows`, H), on the device. A tile may be gone when
        the next one is asked for. Backwards, the same tiles come in the other order.
        """
        starts = range(0, self.num_tokens, rows)
        for first in reversed(starts) if backwards else starts:
            yield first, self._tile(first, min(first + rows, self.num_tokens))

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., H), tile by tile: for generation and evaluation."""
        assert not (torch.is_grad_enabled() and hidden.requires_grad), "tiles are gone by the backward pass; use the chunked loss"
        hidden = hidden.to(self.dtype)
        logits = torch.empty((*hidden.shape[:-1], self.num_tokens), dtype=self.dtype, device=hidden.device)
        for first, tile in self.tiles(self.tile_rows):
            last = first + len(tile)
            logits[..., first:last] = F.linear(hidden, tile, None if self.bias is None else self.bias[first:last])
        return logits

    def release(self) -> None:
        """Give back what was allocated for tiles on the way; the next use allocates it anew."""

    def tensors(self) -> list[torch.Tensor]:
        """What the head keeps on the device for good, without the bias."""
        return []

    def _tile(self, first: int, last: int) -> torch.Tensor:
        raise NotImplementedError


def rows_within(head: Head, size_bytes: int) -> int:
    """Rows of a tile of so many bytes, at least one; whole groups of 64 where there are more, which is what kernels like."""
    rows = max(1, size_bytes // (head.width * head.dtype.itemsize))
    return min(rows - rows % 64 if rows > 64 else rows, head.num_tokens)


def make_head(
    model: PeftModel, format: str, device: torch.device | str, table: torch.Tensor | None = None,
    let_go: Callable[[], None] = lambda: None,
) -> Head:
    """The head of a model in one of the formats "resident", "streamed", "int8" and "nf4". The model's own `lm_head` computes
    through it from now on.

    Of "streamed", `lm_head.weight` is the table in host memory. Of a quantised head it is the table too, or empty where none is
    given; where head and embedding are one weight it stays what it is. Call it before a recorder is entered: one would count
    the table.

    Args:
        table: the weight in host memory, of shape (V, H) in the type of the model's own, maybe read-only; None takes the one
            that the model has. On meta it may be on meta; a recorder does not count it.
        let_go: called after a tile of a streamed head has been read; see `qlora.engine.store.BaseStore.let_go`.

    Raises:
        AssertionError: an unknown format; a table of another shape or type; a streamed head whose weight is also the embedding,
            which lies on the device.
    """
    lm_head = model.get_output_embeddings()
    assert format in ("resident", "streamed", "int8", "nf4") and isinstance(lm_head, torch.nn.Linear), format
    device, weight = torch.device(device), lm_head.weight
    tied = model.get_input_embeddings().weight is weight
    source = weight.data if table is None else table
    # An embedding in host memory leaves an empty weight on the device.
    assert source.shape == weight.shape or not weight.numel(), (source.shape, weight.shape)
    assert source.dtype == weight.dtype, (source.dtype, weight.dtype)
    bias = None if lm_head.bias is None else lm_head.bias.data.to(device)
    if format == "resident":
        if table is not None or weight.device.type != device.type:
            lm_head.weight = torch.nn.Parameter(source.to(device), requires_grad=False)
        return ResidentHead(lm_head.weight.data, bias)
    if format == "streamed":
        on_host = source.is_meta or source.device.type == "cpu"
        assert not tied or on_host, "the embedding lies on the device, and it is the head"
        source = source if source.is_meta else source.to("cpu")
        head: Head = StreamedHead(source, bias, device, let_go)
        if not tied:
            weight.data = source
    else:
        head = (Int8Head if format == "int8" else Nf4Head)(source, bias, device)
        if not tied:
            weight.data = torch.empty(0, dtype=source.dtype, device=source.device) if table is None else table
    lm_head.forward = head.project
    return head


class ResidentHead(Head):
    """All of it on the device, in 16 or 32 bits.

    Attributes:
        weight: (V, H).
    """

    sliceable = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(weight.shape, weight.dtype, bias)
        self.weight = weight

    def tensors(self) -> list[torch.Tensor]:
        return [self.weight]

    def _tile(self, first: int, last: int) -> torch.Tensor:
        return self.weight[first:last]


class StreamedHead(Head):
    """In host memory; two tiles at a time on the device, where the next one arrives while one is computed with.

    What the last pass ended with stays, so that a pass in the other direction begins with it, at no cost. On CUDA a stream of its
    own carries the tiles, from page-locked memory: the table itself where it is page-locked, else two tiles of it.
    """

    def __init__(
        self, table: torch.Tensor, bias: torch.Tensor | None, device: torch.device, let_go: Callable[[], None] = lambda: None
    ):
        super().__init__(table.shape, table.dtype, bias)
        self._table, self._device, self._let_go = table, device, let_go
        self._slots: list[_Slot] = []
        self._stream: Any = None
        self.num_loads = 0

    def tiles(self, rows: int, *, backwards: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        self._make_slots(min(rows, self.num_tokens))
        starts = list(range(0, self.num_tokens, rows))
        if backwards:
            starts.reverse()
        slot = self._fetch(starts[0], rows, None)
        for first, following in zip(starts, [*starts[1:], None], strict=True):
            ahead = None if following is None else self._fetch(following, rows, slot)
            try:
                yield first, slot.arrived()
            finally:
                slot.used()  # also where the work was given up half-way
            slot = ahead or slot

    def release(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._slots = []

    def _make_slots(self, rows: int) -> None:
        if self._slots and self._slots[0].rows == rows:
            return
        self.release()  # first give back, then take
        if self._device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        staged = self._stream is not None and not self._table.is_pinned()
        self._slots = [_Slot(rows, self.width, self.dtype, self._device, self._stream, staged) for _ in range(2)]

    def _fetch(self, first: int, rows: int, busy: _Slot | None) -> _Slot:
        for slot in self._slots:
            if slot.first == first:
                return slot
        slot = next(slot for slot in self._slots if slot is not busy)
        # A slice of a table on meta would be counted as memory of the device.
        slot.load(first, self._table if self._table.is_meta else self._table[first : first + rows])
        self._let_go()
        self.num_loads += 1
        return slot


class _Slot:
    """Room for one tile on the device; with a stream, copies into it run beside the computation.

    Attributes:
        first: row that the tile begins with; -1 while it holds none.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device, stream: Any, staged: bool):
        self.rows, self.first = rows, -1
        self._num_rows = rows
        self._buffer = torch.empty((rows, width), dtype=dtype, device=device)
        self._stream = stream
        self._staging = torch.empty((rows, width), dtype=dtype, pin_memory=True) if staged else None
        if stream is not None:
            self._free, self._ready = torch.cuda.Event(), torch.cuda.Event()
            self._free.record()  # the allocator may have handed out memory that earlier work still reads
            self._ready.record()

    def load(self, first: int, source: torch.Tensor) -> None:
        """Begin to fill it; the caller has said `used` of what was in it."""
        self.first = first
        if source.is_meta:  # all of the table
            self._num_rows = min(self.rows, len(source) - first)
            return
        self._num_rows = len(source)
        target = self._buffer[: self._num_rows]
        if self._stream is None:
            target.copy_(source)
            return
        if self._staging is not None:
            self._ready.synchronize()  # the copy that last read the staging memory
            source = self._staging[: self._num_rows].copy_(source)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free)
            target.copy_(source, non_blocking=True)
            self._ready.record(self._stream)

    def arrived(self) -> torch.Tensor:
        """The tile; what is enqueued from here on waits for it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._ready)
        return self._buffer[: self._num_rows]

    def used(self) -> None:
        """All that reads the tile has been enqueued."""
        if self._stream is not None:
            self._free.record()


class _QuantisedHead(Head):
    """Codes on the device, which become a tile of `dtype` when it is asked for.

    Quantised once, some rows at a time, so that no more than these are in 16 bits beside the codes.

    Attributes:
        codes: uint8, `codes_per_byte` of them in one; rows one after the other.
        scales: fp32, one for each block of 64 numbers.
    """

    codes_per_byte = 1

    def __init__(self, source: torch.Tensor, bias: torch.Tensor | None, device: torch.device):
        super().__init__(source.shape, source.dtype, bias)
        # Where the width is no multiple of a block, blocks run over the ends of rows. After so many rows one begins anew.
        self._step = _BLOCK // math.gcd(self.width, _BLOCK)
        numbers = source.numel()
        self.codes = torch.empty(-(-numbers // self.codes_per_byte), dtype=torch.uint8, device=device)
        self.scales = torch.empty(-(-numbers // _BLOCK), dtype=torch.float32, device=device)
        if not source.is_meta:
            self._quantise(source, device)

    def tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.scales]

    def _quantise(self, source: torch.Tensor, device: torch.device) -> None:
        rows = max(self._step, self.tile_rows - self.tile_rows % self._step)
        for first in range(0, self.num_tokens, rows):
            # bitsandbytes' kernels take no views that begin inside a storage on some backends; a tile is small
            codes, scales = self._encode(source[first : first + rows].to(device, copy=True))
            start = first * self.width
            self.codes[start // self.codes_per_byte :][: codes.numel()] = codes.flatten()
            self.scales[start // _BLOCK :][: scales.numel()] = scales

    def _tile(self, first: int, last: int) -> torch.Tensor:
        below = first - first % self._step
        start, numbers = below * self.width, (last - below) * self.width
        codes = self.codes[start // self.codes_per_byte :][: -(-numbers // self.codes_per_byte)]
        scales = self.scales[start // _BLOCK :][: -(-numbers // _BLOCK)]
        return self._decode(codes, scales, (last - below, self.width))[first - below :]

    def _encode(self, tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        raise NotImplementedError


class Int8Head(_QuantisedHead):
    """Dynamic 8-bit codes (https://arxiv.org/abs/2110.02861, section 2): 1.0625 bytes a number. Not exact."""

    def __init__(self, source: torch.Tensor, bias: torch.Tensor | None, device: torch.device):
        from bitsandbytes.functional import create_dynamic_map

        self._code = torch.empty(256, device=device) if source.is_meta else create_dynamic_map().to(device)
        super().__init__(source, bias, device)

    def _encode(self, tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from bitsandbytes.functional import quantize_blockwise

        codes, state = quantize_blockwise(tile, code=self._code, blocksize=_BLOCK)
        return codes, state.absmax

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        return dequantize_blockwise(
            codes.view(shape), QuantState(absmax=scales, code=self._code, blocksize=_BLOCK, dtype=self.dtype)
        )


class Nf4Head(_QuantisedHead):
    """NF4 (https://arxiv.org/abs/2305.14314, section 3) with plain scales: 0.5625 bytes a number. Not exact."""

    codes_per_byte = 2

    def _encode(self, tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(tile, blocksize=_BLOCK, quant_type="nf4")
        return codes, state.absmax

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(absmax=scales, shape=torch.Size(shape), blocksize=_BLOCK, quant_type="nf4", dtype=self.dtype)
        return dequantize_4bit(codes.view(-1, 1), state)


