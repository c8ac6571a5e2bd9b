"""Where streamed layers come from: host memory, or a file that is read ahead by a thread of its own.

A source fills a slot on the device with a layer's block, and says when that has been done. Weights only ever go to the device: they are
frozen, so nothing is ever written back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from qlora.engine.arena import Layout, Reader
from qlora.engine.pinned import HostMemory

_STAGES = 2  # buffers between a file and a GPU: one is filled while the other is copied


class Source(Protocol):
    """What a stream asks."""

    def fetch(self, number: int, slot: torch.Tensor) -> Callable[[], None]:
        """Begin to bring a layer's block into a slot, after all that the device was asked to do so far. What is returned makes the
        device's further work wait for it; errors of reading are raised there.
        """

    def close(self) -> None:
        """Let go of threads, files and page locks."""


def make_source(
    read: Reader, layouts: Sequence[Layout], streamed: Sequence[int], *, device: torch.device | str, stream_from: str,
    loading: Callable[[int, int], None] = lambda done, total: None,
) -> Source:
    """A source of these layers for a device.

    Args:
        read: fills a block of host memory with a layer's bytes; see `qlora.engine.store.BaseStore.read_layer`.
        stream_from: "ram": all of them are read into host memory now; "disk": each is read when it is needed.
        loading: told how many layers have been read into host memory.
    """
    device = torch.device(device)
    if device.type == "meta":
        return NoSource()
    if stream_from == "ram":
        return RamSource(read, layouts, streamed, device, loading)
    return DiskSource(read, layouts, streamed, device)


class NoSource:
    """For a simulation: nothing is brought."""

    def fetch(self, number: int, slot: torch.Tensor) -> Callable[[], None]:
        return _nothing

    def close(self) -> None:
        pass


class RamSource:
    """Layers in host memory, page-locked where the device is a GPU, copied on a stream of their own."""

    def __init__(
        self, read: Reader, layouts: Sequence[Layout], streamed: Sequence[int], device: torch.device,
        loading: Callable[[int, int], None],
    ):
        self.memory = HostMemory(device)
        self._copier = Copier(device)
        self._blocks: dict[int, torch.Tensor] = {}
        for done, number in enumerate(streamed, 1):
            self._blocks[number] = self.memory.block(layouts[number].size_bytes)
            read(number, self._blocks[number])
            loading(done, len(streamed))

    def fetch(self, number: int, slot: torch.Tensor) -> Callable[[], None]:
        return self._copier.copy(self._blocks[number], slot)

    def close(self) -> None:
        self._copier.synchronise()
        self.memory.close()
        self._blocks.clear()


class DiskSource:
    """Layers in a file. A thread reads ahead, straight into the slot where the device is the CPU, else into page-locked stages."""

    def __init__(self, read: Reader, layouts: Sequence[Layout], streamed: Sequence[int], device: torch.device):
        self._read, self._layouts = read, layouts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qlora-read")
        self._copier = Copier(device)
        self.memory = HostMemory(device)
        largest = max((layouts[number].size_bytes for number in streamed), default=0)
        num_stages = _STAGES if device.type == "cuda" else 0
        self._stages = [(self.memory.block(largest), _nothing) for _ in range(num_stages)]

    def fetch(self, number: int, slot: torch.Tensor) -> Callable[[], None]:
        size = self._layouts[number].size_bytes
        if not self._stages:
            return self._thread.submit(self._read, number, slot[:size]).result
        ready = self._copier.mark()
        future = self._thread.submit(self._read_and_copy, number, slot[:size], ready)
        return lambda: future.result()()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._copier.synchronise()
        self.memory.close()

    def _read_and_copy(self, number: int, slot: torch.Tensor, ready: Any) -> Callable[[], None]:
        """In the thread: into the stage that was used longest ago, and from there to the device."""
        stage, copied = self._stages.pop(0)
        self._copier.wait_on_host(copied)
        self._read(number, stage[: slot.numel()])
        wait = self._copier.copy(stage[: slot.numel()], slot, ready)
        self._stages.append((stage, wait))
        return wait


class Copier:
    """Copies between host and device beside the computation: on a CUDA stream of its own, or at once where there is none."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def mark(self) -> Any:
        """This moment in the device's work."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def copy(self, source: torch.Tensor, target: torch.Tensor, ready: Any = None) -> Callable[[], None]:
        """Begin a copy once the device has come to `ready`, by default to what it has been asked for so far. The function that is
        returned makes the device's further work wait for it.
        """
        if self._stream is None:
            target.copy_(source)
            return _nothing
        self._stream.wait_event(ready or self.mark())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        return _Wait(done, self.device)

    def wait_on_host(self, wait: Callable[[], None]) -> None:
        """Wait here, not on the device, for a copy."""
        if isinstance(wait, _Wait):
            wait.event.synchronize()

    def synchronise(self) -> None:
        """Wait here for all copies."""
        if self._stream is not None:
            self._stream.synchronize()


class _Wait:
    """Makes the device's current stream wait for a copy."""

    def __init__(self, event: Any, device: torch.device):
        self.event, self._device = event, device

    def __call__(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self.event)


def _nothing() -> None:
    pass


