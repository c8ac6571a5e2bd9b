"""Hidden states between layers: all that a step keeps of its forward pass. They wait on the device, or in host memory.

Waiting in host memory costs the device two or three of them at a time, whatever the number of layers and of micro-batches.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from qlora.engine.arena import PAGE
from qlora.engine.pinned import HostMemory
from qlora.engine.sources import Copier

_CHUNK_BYTES = 256 * 2**20
_IN_FLIGHT = 2  # copies to the host whose tensors are still held on the device


class OnDevice:
    """Hidden states that stay where they are."""

    def __init__(self) -> None:
        self._held: dict[Hashable, torch.Tensor] = {}

    def keep(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Hold a tensor until it is taken."""
        self._held[key] = tensor

    def look(self, key: Hashable) -> torch.Tensor:
        """The tensor, which is still held."""
        return self._held[key]

    def take(self, key: Hashable) -> torch.Tensor:
        """The tensor, which is not held any more."""
        return self._held.pop(key)

    def soon(self, key: Hashable) -> None:
        """It is going to be looked at next."""

    def clear(self) -> None:
        """Let go of all, after a step that ended early."""
        self._held.clear()


class OnHost:
    """Hidden states in host memory, page-locked where the device is a GPU, copied there and back beside the computation.

    The one that was kept last stays on the device as well, because it often is the next to be looked at.
    """

    def __init__(self, device: torch.device | str):
        self.memory = HostMemory(device)
        self._room = _Room(self.memory)
        self._copier = Copier(device)  # one stream for both ways: what comes back has gone there before
        self._held: dict[Hashable, _Kept] = {}
        self._latest: tuple[Hashable, torch.Tensor] | None = None
        self._leaving: deque[tuple[torch.Tensor, Callable[[], None]]] = deque()
        self._coming: dict[Hashable, tuple[torch.Tensor, Callable[[], None]]] = {}

    def keep(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Hold a tensor until it is taken."""
        self._held[key], wait = self._send(tensor)
        self._latest = key, tensor
        self._leaving.append((tensor, wait))
        while len(self._leaving) > _IN_FLIGHT:
            # The device's memory may go to others once further work waits for the copy out of it.
            self._leaving.popleft()[1]()

    def look(self, key: Hashable) -> torch.Tensor:
        """The tensor on the device; it is still held."""
        if self._is_latest(key):
            return self._latest[1]
        self.soon(key)
        tensor, wait = self._coming.pop(key)
        wait()
        return tensor

    def take(self, key: Hashable) -> torch.Tensor:
        """The tensor on the device; it is not held any more."""
        tensor = self.look(key)
        if self._is_latest(key):
            self._latest = None
        self._forget(self._held.pop(key))
        return tensor

    def soon(self, key: Hashable) -> None:
        """It is going to be looked at next: begin to bring it back."""
        if key in self._held and key not in self._coming and not self._is_latest(key):
            self._coming[key] = self._bring(self._held[key])

    def clear(self) -> None:
        """Let go of all, after a step that ended early."""
        self._copier.synchronise()
        for held in (self._held, self._coming, self._leaving):
            held.clear()
        self._latest = None
        self._room.clear()

    def close(self) -> None:
        """Give host memory back."""
        self.clear()
        self.memory.close()

    def _is_latest(self, key: Hashable) -> bool:
        return self._latest is not None and self._latest[0] == key

    def _send(self, tensor: torch.Tensor) -> tuple[_Kept, Callable[[], None]]:
        """Begin the way to the host."""
        num_bytes = tensor.numel() * tensor.element_size()
        place = self._room.take(num_bytes)
        kept = _Kept(tensor.shape, tensor.dtype, place)
        return kept, self._copier.copy(tensor, kept.host)

    def _bring(self, kept: _Kept) -> tuple[torch.Tensor, Callable[[], None]]:
        """Begin the way back."""
        tensor = torch.empty(kept.shape, dtype=kept.dtype, device=self._copier.device)
        return tensor, self._copier.copy(kept.host, tensor)

    def _forget(self, kept: _Kept) -> None:
        self._room.give_back(kept.place)


class OnSimulatedHost(OnHost):
    """The same on meta tensors: what waits in host memory takes none on the device, and none here."""

    def __init__(self) -> None:
        super().__init__("meta")

    def _send(self, tensor: torch.Tensor) -> tuple[_Kept, Callable[[], None]]:
        return _Kept(tensor.shape, tensor.dtype, None), _nothing

    def _bring(self, kept: _Kept) -> tuple[torch.Tensor, Callable[[], None]]:
        return torch.empty(kept.shape, dtype=kept.dtype, device="meta"), _nothing

    def _forget(self, kept: _Kept) -> None:
        pass


@dataclass
class _Kept:
    shape: torch.Size
    dtype: torch.dtype
    place: torch.Tensor | None

    @property
    def host(self) -> torch.Tensor:
        """The tensor in host memory."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return self.place[:size].view(self.dtype).view(self.shape)


class _Room:
    """Places in a few large blocks of host memory. Freed ones are used again for the same size; when all are free, from the start:
    rows of ever different lengths do not make it grow beyond what the largest step needs.
    """

    def __init__(self, memory: HostMemory):
        self._memory = memory
        self._chunks: list[torch.Tensor] = []
        self._chunk, self._offset, self._num_taken = 0, 0, 0
        self._free: dict[int, list[torch.Tensor]] = {}

    def take(self, size_bytes: int) -> torch.Tensor:
        size = -(-size_bytes // PAGE) * PAGE
        self._num_taken += 1
        if self._free.get(size):
            return self._free[size].pop()
        while self._chunk < len(self._chunks) and self._offset + size > self._chunks[self._chunk].numel():
            self._chunk, self._offset = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            self._chunks.append(self._memory.block(max(size, _CHUNK_BYTES)))
        place = self._chunks[self._chunk][self._offset : self._offset + size]
        self._offset += size
        return place

    def give_back(self, place: torch.Tensor) -> None:
        self._free.setdefault(place.numel(), []).append(place)
        self._num_taken -= 1
        if self._num_taken == 0:
            self.clear()

    def clear(self) -> None:
        self._free.clear()
        self._chunk, self._offset, self._num_taken = 0, 0, 0


def _nothing() -> None:
    pass
