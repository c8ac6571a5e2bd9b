"""Layers come to the device ahead of their use, into a few slots that are used again and again.

Which slot gives way is known exactly, because the order of visits is: the one whose layer is needed last (Belady's rule). At the turn from
forward to backward, and from one step to the next, the layers that are needed first are those that were needed last, so they are still
there: a step of L streamed layers and K slots loads 2 (L - K) of them, the first step K more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from qlora.engine.arena import Binding, Layout, Reader, aligned_block
from qlora.engine.sources import Source

NUM_SLOTS = 2  # one computes, one is filled


@dataclass
class _Slot:
    block: torch.Tensor
    layer: int | None = None
    wait: Callable[[], None] | None = None  # None once the device waits, or has nothing to wait for


def own_tensors(
    layers: Sequence[torch.nn.Module], layouts: Sequence[Layout], read: Reader, device: torch.device | str,
    loading: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Give layers tensors of their own on the device, one by one, as a loader would: for a base that stays there whole."""
    passing = aligned_block(max(layout.size_bytes for layout in layouts))
    for number, (layer, layout) in enumerate(zip(layers, layouts, strict=True)):
        read(number, passing[: layout.size_bytes])
        Binding(layer, layout).put({name: view.to(device, copy=True) for name, view in layout.views(passing).items()})
        loading(number + 1, len(layers))


class AllThere:
    """Layers that live on the device as the loader has left them; in the place of a `Stream`."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.num_loads = [0] * num_layers
        self.blocks: tuple[torch.Tensor, ...] = ()

    def walk(self, order: Sequence[int]) -> Iterator[int]:
        """The layers in this order."""
        yield from order

    def visit(self, number: int, ahead: Sequence[int] = ()) -> AbstractContextManager[None]:
        """They are there."""
        return nullcontext()

    def close(self) -> None:
        pass


class Stream:
    """The weights of a stack of layers: some stay on the device, the others take turns in the slots.

    Args:
        layers: the modules, whose frozen tensors become views of blocks on the device; those that are streamed have empty ones
            while nobody visits them.
        resident: numbers of the layers that stay.
        read: fills host memory with a layer's block; for the residents.
        source: of the others.

    Attributes:
        num_loads: how often each layer was brought into a slot.
    """

    def __init__(
        self, layers: Sequence[torch.nn.Module], layouts: Sequence[Layout], *, resident: Collection[int], read: Reader | None,
        source: Source | None, device: torch.device | str, num_slots: int = NUM_SLOTS,
        loading: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.device = torch.device(device)
        self.num_layers = len(layers)
        self.resident = frozenset(resident)
        self.num_loads = [0] * len(layers)
        self._source = source
        self._bindings = [Binding(layer, layout) for layer, layout in zip(layers, layouts, strict=True)]
        streamed = [number for number in range(len(layers)) if number not in self.resident]
        largest = max((layouts[number].size_bytes for number in streamed), default=0)
        self._slots = [_Slot(aligned_block(largest, self.device)) for _ in range(min(num_slots, len(streamed)))]
        for number in streamed:
            self._bindings[number].release(self.device)
        self._resident_blocks: list[torch.Tensor] = []
        self._keep(sorted(self.resident), read, loading)

    @property
    def blocks(self) -> tuple[torch.Tensor, ...]:
        """The memory that the layers' weights take on the device: slots, and the blocks of residents."""
        return *(slot.block for slot in self._slots), *self._resident_blocks

    @property
    def streamed_bytes(self) -> int:
        """What the layers take that come and go, where they wait."""
        return sum(each.layout.size_bytes for number, each in enumerate(self._bindings) if number not in self.resident)

    def walk(self, order: Sequence[int]) -> Iterator[int]:
        """Visit layers in this order; each is there while it is the one that was yielded last. What comes after the last is taken to
        be the same once more.
        """
        for position, number in enumerate(order):
            with self.visit(number, [*order[position + 1 :], *order]):
                yield number

    @contextmanager
    def visit(self, number: int, ahead: Sequence[int] = ()) -> Iterator[None]:
        """A layer's weights are in place inside.

        Args:
            ahead: the layers that are visited next, in order; what there is room for is on its way meanwhile.

        Raises:
            QloraError: the layer could not be read.
        """
        if number in self.resident:
            self._look_ahead(None, ahead)
            yield
            return
        slot = self._slot_of(number) or self._load(number, ahead, at_once=True)
        if slot.wait is not None:
            wait, slot.wait = slot.wait, None
            try:
                wait()
            except BaseException:
                slot.layer = None
                raise
        self._bindings[number].bind(slot.block)
        try:
            self._look_ahead(number, ahead)
            yield
        finally:
            self._bindings[number].release(self.device)

    def close(self) -> None:
        """Let go of the source."""
        if self._source is not None:
            self._source.close()

    def _keep(self, numbers: Sequence[int], read: Reader | None, loading: Callable[[int, int], None]) -> None:
        """Bring residents to blocks of their own."""
        on_host = self.device.type == "cpu"
        for done, number in enumerate(numbers, 1):
            size = self._bindings[number].layout.size_bytes
            block = aligned_block(size, self.device)
            if self.device.type != "meta":
                assert read is not None
                passing = block if on_host else aligned_block(size)
                read(number, passing)
                if not on_host:
                    block.copy_(passing)
            self._bindings[number].bind(block)
            self._resident_blocks.append(block)
            loading(done, len(numbers))

    def _slot_of(self, number: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == number), None)

    def _look_ahead(self, current: int | None, ahead: Sequence[int]) -> None:
        """Bring the next layers as far as slots can be had for them."""
        for number in dict.fromkeys(ahead):
            if number in self.resident or self._slot_of(number) is not None:
                continue
            if self._load(number, ahead, current) is None:
                return

    def _load(
        self, number: int, ahead: Sequence[int], current: int | None = None, *, at_once: bool = False
    ) -> _Slot | None:
        """Into a free slot, or the one whose layer is needed last; None where all are needed before this one.

        Args:
            current: the layer that is being visited, which keeps its slot.
            at_once: it is this layer that is to be visited.
        """
        def next_use(slot: _Slot) -> float:
            if slot.layer is None:
                return float("inf")
            return ahead.index(slot.layer) if slot.layer in ahead else float("inf")

        candidates = [slot for slot in self._slots if slot.layer is None or slot.layer != current]
        slot = max(candidates, key=next_use, default=None)
        wanted = -1 if at_once else ahead.index(number)
        if slot is None or next_use(slot) <= wanted:
            return None
        if slot.wait is not None:  # on its way for nothing: the order has changed
            wait, slot.wait, slot.layer = slot.wait, None, None
            wait()
        slot.layer, slot.wait = number, self._source.fetch(number, slot.block[: self._bindings[number].layout.size_bytes])
        self.num_loads[number] += 1
        return slot
