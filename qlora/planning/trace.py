"""Record what a computation allocates and releases, by the lifetime of its storages.

The computation runs on the meta device, where tensors have shapes but no memory, or on a real one to hold the two against
each other. Works with whatever model, loss and optimizer runs inside, because it looks at the storages that operators
return and not at the code.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora.planning.shapes import ShapeCache

aten = torch.ops.aten

# What transformers' masking_utils asks a mask with; other questions (is the loss finite?) end in other operators.
_ASKS_FOR_ALL = ("aten.all.default", "aten.eq.Scalar")

# Sizes in bytes of the buffers that a kernel takes for itself while it runs, from the operator's arguments.
Temporaries = Mapping[Any, Callable[..., Sequence[int]]]


class Event(NamedTuple):
    """One allocation or release.

    Attributes:
        storage: number of the storage; the release of a storage has the number of its allocation.
        size_bytes: bytes allocated, or minus the bytes released.
        op: the operator that allocated, "aten.mm.default".
        phase: what was going on: "load", "train", ...
        part: what the storage is for: "base", "adapters", "activations", ...
    """

    storage: int
    size_bytes: int
    op: str
    phase: str
    part: str


class Recorder(TorchDispatchMode):
    """Records while it is entered (`with recorder:`).

    On meta a number cannot be read off a tensor. Where code asks for one (`.item()`, `if loss > 0`), it is told 1 or
    True; a boolean mask selects everything. Both are the worst case for memory.

    Args:
        device_type: storages elsewhere are not counted.
        temporaries: what kernels take inside, by operator; alive together with the operator's outputs.
        ragged: what code is told that asks whether a mask covers all (`mask.all()`, `mask.sum() == mask.numel()`): with
            ragged rows it does not, and attention needs its mask.
    """

    def __init__(self, device_type: str = "meta", temporaries: Temporaries | None = None, *, ragged: bool = False):
        super().__init__()
        self.ragged = ragged
        self.events: list[Event] = []
        self.num_ops = 0
        self._device_type = device_type
        self._shapes = ShapeCache() if device_type == "meta" else None
        self._temporaries = temporaries or {}
        self._alive: dict[int, tuple[int, str, weakref.ref]] = {}
        self._next = 0
        self._phase, self._part = "train", "activations"
        self._parts: dict[int, str] = {}
        self._held: dict[int, tuple[int, str, str]] = {}

    @contextmanager
    def during(self, phase: str | None = None, part: str | None = None) -> Iterator[None]:
        """Events inside belong to this phase, storages allocated inside to this part."""
        before = self._phase, self._part
        self.switch(phase, part)
        try:
            yield
        finally:
            self._phase, self._part = before

    def switch(self, phase: str | None = None, part: str | None = None) -> None:
        """From now on; for places where a `with` cannot stand, such as hooks."""
        self._phase, self._part = phase or self._phase, part or self._part

    def track(self, tensor: torch.Tensor | None, part: str) -> None:
        """Count a storage that exists already, or say what a counted one is for."""
        if tensor is None or tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is None:
            self._allocated(storage, "static", part)
        else:
            self._parts[known[0]] = part

    def hold(self, size_bytes: int, op: str, part: str) -> int:
        """An allocation that no tensor stands for, such as a library's workspace; the number is for `drop`."""
        number = self._append(size_bytes, op, part)
        self._held[number] = size_bytes, op, part
        return number

    def drop(self, storage: int) -> None:
        """Release what `hold` took."""
        size, op, part = self._held.pop(storage)
        self.events.append(Event(storage, -size, op, self._phase, part))

    def trace(self) -> list[Event]:
        """The events so far, each storage under the part that it turned out to be for."""
        parts = self._parts
        return [event._replace(part=parts[event.storage]) if event.storage in parts else event for event in self.events]

    def __enter__(self) -> Recorder:
        gc.disable()  # cycles that are collected at random times would move releases; a step leaves no tensor in one
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        gc.enable()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.num_ops += 1
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return self._number(args[0])
        if func is aten.index.Tensor and args[0].is_meta:
            args = (args[0], [part for index in args[1] for part in _worst_case(index)])
        out = self._shapes.call(func, args, kwargs) if self._shapes else func(*args, **kwargs)
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device_type:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._alive:
                    self._allocated(storage, _name(func), self._part)
        hidden = self._temporaries.get(func)
        if hidden is not None:
            for storage in [self.hold(size, f"{func} (inside)", "workspace") for size in hidden(*args, **kwargs) if size]:
                self.drop(storage)
        return out

    def _allocated(self, storage: torch.UntypedStorage, op: str, part: str) -> None:
        size, key = storage.nbytes(), storage._cdata
        number = self._append(size, op, part)

        def released(_: weakref.ref) -> None:
            self._alive.pop(key, None)
            self.events.append(Event(number, -size, op, self._phase, part))

        self._alive[key] = number, op, weakref.ref(storage, released)

    def _number(self, tensor: torch.Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            asks_for_all = self._alive[tensor.untyped_storage()._cdata][1] in _ASKS_FOR_ALL
            return not (self.ragged and asks_for_all)
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _append(self, size_bytes: int, op: str, part: str) -> int:
        self._next += 1
        self.events.append(Event(self._next, size_bytes, op, self._phase, part))
        return self._next


@functools.cache
def _name(func: Any) -> str:
    return str(func)


def _worst_case(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask that selects everything, as the indices that it stands for, one for each of its dimensions."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [torch.empty(index.numel(), dtype=torch.long, device=index.device) for _ in range(index.ndim)]
