"""PyTorch's CUDA caching allocator, without a GPU: what it would hold and hand out for a recorded trace.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of torch 2.13, with its default settings (no
max_split_size, no rounding to powers of two, no garbage collection) and one stream. The rules:

- A request is rounded up to 512 bytes. Up to 1 MiB it is served from the pool of small blocks, else from that of large ones.
- The smallest free block that is large enough is taken; of equal ones the one at the lowest address. Each new segment lies
  below the last one: the driver takes address space as Linux hands it out, from the top down. That is not documented; the
  measured T4 rows (tests/test_t4.py) come out as they were only this way.
- Without one, a segment is asked of the driver: 2 MiB for a small request, 20 MiB for one under 10 MiB, else the request
  rounded up to 2 MiB. "Reserved" is the sum of the segments, "allocated" that of the blocks handed out.
- What is left of a block is split off where it is worth it: 512 bytes in the small pool, more than 1 MiB in the large one.
  So up to 1 MiB that nobody asked for counts as allocated.
- A freed block is merged with its free neighbours in the segment. A segment goes back only when the cache is emptied or
  the limit is hit: then all wholly free ones do, and the request is tried once more.
- Expandable segments: one segment for each pool, which grows in pages of 2 and 20 MiB; pages that are free can be given back
  one by one. Their remainders are always split off.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora.planning.trace import Event

EMPTY_CACHE = "torch.cuda.empty_cache"  # an event of this name gives back what is free
ROUND_BYTES = 512
_MIB = 2**20
_SMALL_BYTES = _MIB
_SEGMENT_ROUND_BYTES = 2 * _MIB
_LARGE_SEGMENT_BYTES = 20 * _MIB
_LARGE_REQUEST_BYTES = 10 * _MIB
_ADDRESS_SPACE_BYTES = 2**50  # what an expandable segment may grow to; more than any card has


class OutOfMemory(Exception):
    """A request that the limit leaves no room for, after everything free was given back."""


@dataclass(frozen=True)
class Replay:
    """What a trace comes to.

    Attributes:
        peak_allocated_bytes: as torch.cuda.max_memory_allocated.
        peak_reserved_bytes: as torch.cuda.max_memory_reserved.
        allocated_by_phase: the highest value while in that phase.
        reserved_by_phase: the same of what is reserved.
        num_retries: requests that were served only after free segments had been given back.
        out_of_memory: a request could not be served; the numbers are those up to it.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    allocated_by_phase: dict[str, int]
    reserved_by_phase: dict[str, int]
    num_retries: int
    out_of_memory: bool


def replay(events: Iterable[Event], *, limit_bytes: int | None = None, expandable: bool = False) -> Replay:
    """Feed a trace to the allocator.

    Args:
        limit_bytes: what may be reserved in all, as torch.cuda.set_per_process_memory_fraction sets it; None for no limit.
        expandable: PYTORCH_ALLOC_CONF=expandable_segments:True.
    """
    allocator = CachingAllocator(limit_bytes=limit_bytes, expandable=expandable)
    allocated: dict[str, int] = {}
    reserved: dict[str, int] = {}
    out_of_memory = False
    for storage, size_bytes, op, phase, _ in events:
        try:
            if size_bytes > 0:
                allocator.allocate(storage, size_bytes)
            elif size_bytes < 0:
                allocator.free(storage)
            elif op == EMPTY_CACHE:
                allocator.empty_cache()
        except OutOfMemory:
            out_of_memory = True
            break
        if allocator.allocated_bytes > allocated.get(phase, -1):
            allocated[phase] = allocator.allocated_bytes
        if allocator.reserved_bytes > reserved.get(phase, -1):
            reserved[phase] = allocator.reserved_bytes
    return Replay(
        max(allocated.values(), default=0), max(reserved.values(), default=0), allocated, reserved,
        allocator.num_retries, out_of_memory,
    )


def live_peaks(events: Iterable[Event]) -> dict[str, int]:
    """The highest sum of live storages in each phase, each rounded up to 512 bytes: the least that is ever handed out."""
    live, peaks = 0, {}
    for event in events:
        live += _rounded_change(event)
        peaks[event.phase] = max(live, peaks.get(event.phase, 0))
    return peaks


def parts_at_peak(events: Iterable[Event]) -> tuple[str, dict[str, int]]:
    """The phase in which the sum of live storages is highest, and bytes by part at that moment.

    Sizes are rounded up to 512 bytes; the parts add up to the phase's figure in `live_peaks`. Of equal moments the first.
    """
    events = list(events)
    live = peak = peak_at = 0
    for i, event in enumerate(events):
        live += _rounded_change(event)
        if live > peak:
            peak, peak_at = live, i
    parts: dict[str, int] = {}
    for event in events[: peak_at + 1]:
        parts[event.part] = parts.get(event.part, 0) + _rounded_change(event)
    return (events[peak_at].phase if events else ""), {part: size for part, size in parts.items() if size}


def slack_bytes(live_bytes: int, *, expandable: bool) -> int:
    """What to give the allocator beyond the bytes of the tensors, so that it never runs out while they fit: a page for the end
    of each pool, and a share for holes. Whether that is enough for a trace, `replay` with a limit tells.
    """
    return 24 * _MIB + round(live_bytes * (0.03 if expandable else 0.08))


class CachingAllocator:
    """The allocator itself; sizes in bytes. See the module for its rules.

    Attributes:
        allocated_bytes: handed out now, rounding and unsplit remainders included.
        reserved_bytes: held from the driver now.
        num_retries: requests that were served only after free segments had been given back.
    """

    def __init__(self, *, limit_bytes: int | None = None, expandable: bool = False):
        self.allocated_bytes = self.reserved_bytes = self.num_retries = 0
        self._limit, self._expandable = limit_bytes, expandable
        self._small, self._large = _Pool(2 * _MIB), _Pool(20 * _MIB)
        self._handed_out: dict[int, tuple[_Block, _Pool]] = {}
        self._lowest_address = 0

    def allocate(self, key: int, size_bytes: int) -> None:
        """Serve a request; `key` is for `free`.

        Raises:
            OutOfMemory: the limit.
        """
        size = -(-size_bytes // ROUND_BYTES) * ROUND_BYTES
        pool = self._small if size <= _SMALL_BYTES else self._large
        block = pool.take(size, self._expandable) or self._grow(pool, size)
        if block is None:
            self.empty_cache()
            block = self._grow(pool, size)
            if block is None:
                raise OutOfMemory(f"{size_bytes} bytes do not fit with {self.reserved_bytes} of {self._limit} reserved")
            self.num_retries += 1
        rest = block.size - size
        if rest > _SMALL_BYTES or (rest >= ROUND_BYTES and (self._expandable or pool is self._small)):
            pool.put(block.cut(size))
        block.free = False
        self._handed_out[key] = block, pool
        self.allocated_bytes += block.size

    def free(self, key: int) -> None:
        """Take a block back."""
        block, pool = self._handed_out.pop(key)
        self.allocated_bytes -= block.size
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free and neighbour.mapped:
                pool.remove(neighbour)
                block.absorb(neighbour)
        pool.put(block)

    def empty_cache(self) -> None:
        """Give back all segments that are wholly free; of expandable ones, all pages that are."""
        for pool in (self._small, self._large):
            for block in pool.blocks():
                if self._expandable:
                    self._unmap_pages(pool, block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size

    def _grow(self, pool: _Pool, size: int) -> _Block | None:
        """A new block of at least `size` bytes, or None where the limit is in the way."""
        if self._expandable:
            return self._expand(pool, size)
        segment = _segment_bytes(size)
        if not self._reserve(segment):
            return None
        self._lowest_address -= segment
        return _Block(self._lowest_address, segment)

    def _expand(self, pool: _Pool, size: int) -> _Block | None:
        """Map pages at the first place where `size` bytes can lie in one piece, the free block before them included."""
        if not pool.unmapped:
            pool.unmapped.append((0, _Block(0, _ADDRESS_SPACE_BYTES, mapped=False)))
        for _, hole in pool.unmapped:
            start = hole.before if hole.before is not None and hole.before.free else hole
            room = hole.size if start is hole else start.size + hole.size
            if hole.after is not None and hole.after.free:
                room += hole.after.size
            if room >= size:
                break
        needed = size - (0 if start is hole else start.size)
        pages = min(hole.size, -(-needed // pool.page_bytes) * pool.page_bytes)
        if not self._reserve(pages):
            return None
        pool.unmapped.remove((hole.address, hole))
        if pages < hole.size:
            rest = hole.cut(pages)
            pool.unmapped.append((rest.address, rest))
            pool.unmapped.sort()
        hole.mapped = True
        for neighbour in (hole.before, hole.after):
            if neighbour is not None and neighbour.free and neighbour.mapped:
                pool.remove(neighbour)
                hole.absorb(neighbour)
        return hole

    def _unmap_pages(self, pool: _Pool, block: _Block) -> None:
        page = pool.page_bytes
        begin, end = -(-block.address // page) * page, (block.address + block.size) // page * page
        if begin >= end:
            return
        pool.remove(block)
        if block.address < begin:
            middle = block.cut(begin - block.address)
            pool.put(block)
            block = middle
        if end < block.address + block.size:
            pool.put(block.cut(end - block.address))
        block.mapped = False
        self.reserved_bytes -= block.size
        for neighbour in (block.before, block.after):
            if neighbour is not None and not neighbour.mapped:
                pool.unmapped.remove((neighbour.address, neighbour))
                block.absorb(neighbour)
        pool.unmapped.append((block.address, block))
        pool.unmapped.sort()

    def _reserve(self, size: int) -> bool:
        if self._limit is not None and self.reserved_bytes + size > self._limit:
            return False
        self.reserved_bytes += size
        return True


class _Block:
    """A stretch of a segment, linked to the stretches before and after it."""

    __slots__ = ("address", "after", "before", "free", "mapped", "size")

    def __init__(self, address: int, size: int, *, mapped: bool = True):
        self.address, self.size, self.mapped = address, size, mapped
        self.free = True
        self.before: _Block | None = None
        self.after: _Block | None = None

    def could_be(self) -> int:
        """Its size, with the unmapped stretch after it."""
        return self.size + (self.after.size if self.after is not None and not self.after.mapped else 0)

    def cut(self, size: int) -> _Block:
        """Keep the first `size` bytes; the rest is a new block."""
        rest = _Block(self.address + size, self.size - size, mapped=self.mapped)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def absorb(self, neighbour: _Block) -> None:
        """Become one with the block directly before or after."""
        self.size += neighbour.size
        if neighbour is self.before:
            self.address, self.before = neighbour.address, neighbour.before
            if self.before is not None:
                self.before.after = self
        else:
            self.after = neighbour.after
            if self.after is not None:
                self.after.before = self


class _Pool:
    """The free blocks of one kind, by size and then by address."""

    def __init__(self, page_bytes: int):
        self.page_bytes = page_bytes
        self.unmapped: list[tuple[int, _Block]] = []  # of the expandable segment, by address
        self._free: list[tuple[int, int, _Block]] = []

    def put(self, block: _Block) -> None:
        insort(self._free, (block.size, block.address, block))

    def remove(self, block: _Block) -> None:
        del self._free[bisect_left(self._free, (block.size, block.address))]

    def take(self, size: int, expandable: bool) -> _Block | None:
        """The best fit, no longer in the pool. A block that could grow counts as large as it could become."""
        i = bisect_left(self._free, (size,))
        if i == len(self._free):
            return None
        if expandable:
            while i + 1 < len(self._free) and self._free[i + 1][2].could_be() < self._free[i][2].could_be():
                i += 1
        return self._free.pop(i)[2]

    def blocks(self) -> list[_Block]:
        return [block for _, _, block in self._free]


def _segment_bytes(size: int) -> int:
    if size <= _SMALL_BYTES:
        return _SEGMENT_ROUND_BYTES
    if size < _LARGE_REQUEST_BYTES:
        return _LARGE_SEGMENT_BYTES
    return -(-size // _SEGMENT_ROUND_BYTES) * _SEGMENT_ROUND_BYTES


def _rounded_change(event: Event) -> int:
    rounded = -(-abs(event.size_bytes) // ROUND_BYTES) * ROUND_BYTES
    return rounded if event.size_bytes > 0 else -rounded
