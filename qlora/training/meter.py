"""What a run really takes, phase by phase, and the receipt that remembers it beside what was planned."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora.hardware import Device, context_bytes, peak_allocated_bytes, peak_memory_bytes, reset_peak_memory
from qlora.planning.cache import library_versions
from qlora.planning.receipts import Receipt
from qlora.planning.speed import flops_per_token
from qlora.training.fitting import allocator_name

if TYPE_CHECKING:
    from qlora.training.setup import Setup

# Names of the phases as a plan has them, by the flow's own.
PHASE_OF = {"load": "load", "evaluate before": "eval", "train": "train", "evaluate after": "eval"}
PROGRAM = "program"  # on a CPU there is one figure: the RAM of the whole process


@dataclass
class MemoryMeter:
    """Highest memory by phase, in bytes.

    Attributes:
        allocated: of torch's tensors on a GPU; on a CPU the RAM of the process, as phase "program".
        reserved: what torch's allocator held of the GPU; empty on a CPU.
    """

    device: Device
    allocated: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Measure what runs inside as one phase; a phase may come several times."""
        reset_peak_memory(self.device)
        try:
            yield
        finally:
            peak, name = peak_memory_bytes(self.device), PHASE_OF.get(phase, phase)
            if self.device.kind == "cuda":
                self.allocated[name] = max(self.allocated.get(name, 0), peak_allocated_bytes(self.device))
                self.reserved[name] = max(self.reserved.get(name, 0), peak)
            else:
                self.allocated[PROGRAM] = max(self.allocated.get(PROGRAM, 0), peak)

    @property
    def peak_bytes(self) -> int:
        """The most that the device had to give: reserved by torch on a GPU, RAM on a CPU."""
        return max((*self.reserved.values(), *(self.allocated.values() if not self.reserved else ())), default=0)


def planned_phases(setup: Setup) -> dict[str, int]:
    """What the plan says of that which a meter measures."""
    plan = setup.plan
    if plan.kind == "cpu":
        return {PROGRAM: plan.host_peak_bytes}
    return {phase: plan.phases[phase] for phase in dict.fromkeys(PHASE_OF.values()) if phase in plan.phases}


def make_receipt(setup: Setup, meter: MemoryMeter, tokens_per_second: float) -> Receipt:
    """The run's line in receipts.jsonl."""
    plan, device = setup.plan, setup.device
    retries = 0
    if device.kind == "cuda":
        import torch

        retries = torch.cuda.memory_stats(0).get("num_alloc_retries", 0)
    planned = planned_phases(setup)
    # Answers are written in the phases of evaluation, so those are held against the larger of the two.
    if "eval" in planned:
        planned["eval"] = max(planned["eval"], plan.phases.get("generate", 0))
    return Receipt(
        device=device.name, kind=device.kind, model=plan.model, planned=planned, measured=dict(meter.allocated),
        capability=device.capability, allocator=allocator_name(device), os=platform.system(), versions=library_versions(),
        settings={key: value for key, value in plan.settings.items() if key.partition(".")[0] in ("lora", "memory", "train")},
        planned_reserved={"run": plan.reserved_bytes} if meter.reserved else {}, measured_reserved=dict(meter.reserved),
        context_bytes=_beside_tensors(setup, meter), num_retries=retries, tokens_per_second=round(tokens_per_second, 1),
        flops_per_token=flops_per_token(setup.architecture, plan.settings),
    )



def _beside_tensors(setup: Setup, meter: MemoryMeter) -> int | None:
    """What CUDA took for itself; on a CPU what the process took beside the tensors that were planned."""
    if setup.device.kind == "cuda":
        return context_bytes(setup.device)
    return max(0, meter.peak_bytes - max(setup.plan.phases.values()))
