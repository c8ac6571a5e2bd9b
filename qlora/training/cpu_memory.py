"""Measure what tensors take on a CPU, phase by phase, with torch's profiler.

A process's RAM also holds Python, the libraries and what malloc keeps; a plan for a CPU speaks of tensors alone, so tensors
are what has to be measured. Counted is what torch's CPU allocator hands out: every tensor, and every buffer that a kernel
takes from it. Buffers that a library takes by malloc (MKL's, for one) are in neither.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from qlora import _compat

_MARK = "phase: "
_END_OF_TIME = 2**63


@dataclass
class TensorMeter:
    """Highest tensor memory by phase, in bytes; used like `qlora.training.meter.MemoryMeter`, inside `watching`.

    Attributes:
        allocated: known when `watching` has ended, in the order in which the phases began.
        reserved: empty; the CPU's allocator keeps nothing back.
        left: what was still there at each phase's end.
        already_bytes: of tensors that were made before `watching` began and belong to what is measured.
    """

    allocated: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    already_bytes: int = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count all that happens inside. It must begin before the first tensor that is to be counted is made."""
        _compat.silence_profiler()
        gc.collect()  # else old garbage that is released inside would count as less than nothing
        profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with profiler:
            try:
                yield
            finally:
                gc.collect()  # an exception's frames still hold tensors; their phases have ended already
        _compat.give_back_freed_memory()  # to read the profile takes some by itself
        self._read(profiler)
        del profiler
        _compat.give_back_freed_memory()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What runs inside belongs to this phase; a phase may come several times."""
        with record_function(_MARK + phase):
            yield

    def _read(self, profiler: profile) -> None:
        events = profiler.profiler.kineto_results.events()
        phases = sorted(_phase(event) for event in events if event.name().startswith(_MARK))
        changes = sorted((event.start_ns(), i, event.nbytes()) for i, event in enumerate(events) if event.name() == "[memory]")
        total, rest = self.already_bytes, iter([*changes, (_END_OF_TIME, 0, 0)])
        when, _, size = next(rest)
        for start, end, name in phases:
            while when < start:
                total, (when, _, size) = total + size, next(rest)
            peak = total
            while when < end:
                total, (when, _, size) = total + size, next(rest)
                peak = max(peak, total)
            self.allocated[name], self.left[name] = max(peak, self.allocated.get(name, 0)), total


def _phase(event: Any) -> tuple[int, int, str]:
    return event.start_ns(), event.start_ns() + event.duration_ns(), event.name().removeprefix(_MARK)
