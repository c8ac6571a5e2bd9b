"""How much of the time in which weights are copied to a GPU passes beside computation.

scripts/prove_streaming.py imports this in a process that then runs the program.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Interval = tuple[int, int]


def watch(path: str, *, step: int) -> None:
    """Let torch's profiler watch one optimizer step of the run that follows, and write what came of it as JSON when the next one
    begins, so there must be one.
    """
    from torch.profiler import ProfilerActivity, profile

    from qlora.training.trainer import AdapterTrainer

    plain, running = AdapterTrainer.begin_step, []

    def begin_step(self: AdapterTrainer) -> None:
        plain(self)
        if running and self.state.global_step >= step:
            profiler = running.pop()
            profiler.__exit__(None, None, None)
            Path(path).write_text(json.dumps(found(profiler.profiler.kineto_results.events())), encoding="utf-8")
        elif self.may_step_down and self.state.global_step + 1 == step:  # the trial's trainer may not
            running.append(profile(activities=[ProfilerActivity.CUDA]).__enter__())

    AdapterTrainer.begin_step = begin_step


def found(events: Iterable[Any]) -> dict[str, Any]:
    """Of a profile's events: seconds of copies to the device and of kernels, and the share of the first that the second cover."""
    copies, kernels = [], []
    for event in events:
        if "CUDA" not in str(event.device_type()):
            continue
        interval = event.start_ns(), event.start_ns() + event.duration_ns()
        name = event.name()
        if name.startswith("Memcpy HtoD"):
            copies.append(interval)
        elif not name.startswith(("Memcpy", "Memset")):
            kernels.append(interval)
    copies, kernels = union(copies), union(kernels)
    copying, beside = _length(copies), _length(common(copies, kernels))
    return {"copy_seconds": copying / 1e9, "kernel_seconds": _length(kernels) / 1e9, "hidden_seconds": beside / 1e9,
            "hidden_share": round(beside / copying, 4) if copying else None}


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that do not meet, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def common(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """The time that is in both, of intervals as `union` gives them."""
    both, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            both.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return both


def _length(intervals: list[Interval]) -> int:
    return sum(end - start for start, end in intervals)
