"""What a run really takes, phase by phase, and the receipt that remembers it beside what was planned."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qlora.hardware import Device, context_bytes, peak_allocated_bytes, peak_memory_bytes, reset_peak_memory
from qlora.planning.cache import library_versions
from qlora.planning.receipts import Receipt
from qlora.planning.speed import flops_per_token
from qlora.training.fitting import allocator_name

if TYPE_CHECKING:
    from qlora.planning.plan import Plan
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


def planned_phases(plan: Plan, measured: Mapping[str, int]) -> dict[str, int]:
    """What the plan says of the phases that were measured."""
    return {phase: plan.phases[phase] for phase in measured if phase in plan.phases}


def trial_receipt(setup: Setup, allocated: Mapping[str, int], reserved: Mapping[str, int]) -> Receipt:
    """The line in receipts.jsonl that a trial leaves: what it planned for each phase, and what it took."""
    measured = {phase: size for phase, size in allocated.items() if phase in setup.plan.phases}
    return replace(
        _receipt(setup), planned=planned_phases(setup.plan, measured), measured=measured,
        planned_reserved={"run": setup.plan.reserved_bytes} if reserved else {},
        measured_reserved={phase: size for phase, size in reserved.items() if phase in setup.plan.phases},
        context_bytes=context_bytes(setup.device),
    )


def run_receipt(setup: Setup, meter: MemoryMeter, tokens_per_second: float) -> Receipt:
    """The line that a finished run leaves: its speed, and what it took beside its tensors; on a GPU its phases as well."""
    plan = setup.plan
    receipt = replace(
        _receipt(setup), context_bytes=_beside_tensors(setup, meter), tokens_per_second=round(tokens_per_second, 1) or None,
        flops_per_token=flops_per_token(setup.architecture, plan.settings),
    )
    if setup.device.kind != "cuda":
        return receipt
    import torch

    measured = {phase: size for phase, size in meter.allocated.items() if phase in plan.phases}
    planned = planned_phases(plan, measured)
    # Answers are written in the phases of evaluation, so those are held against the larger of the two.
    planned["eval"] = max(plan.phases.get("eval", 0), plan.phases.get("generate", 0))
    return replace(
        receipt, planned={phase: planned[phase] for phase in measured}, measured=measured,
        planned_reserved={"run": plan.reserved_bytes}, measured_reserved=dict(meter.reserved),
        num_retries=torch.cuda.memory_stats(0).get("num_alloc_retries", 0),
    )


def _receipt(setup: Setup) -> Receipt:
    plan, device = setup.plan, setup.device
    return Receipt(
        device=device.name, kind=device.kind, model=plan.model, planned={}, measured={}, capability=device.capability,
        allocator=allocator_name(device), os=platform.system(), versions=library_versions(),
        settings={key: value for key, value in plan.settings.items() if key.partition(".")[0] in ("lora", "memory", "train") or key == "data.max_length"},
    )


def _beside_tensors(setup: Setup, meter: MemoryMeter) -> int | None:
    """What CUDA took for itself; on a CPU what the process took beside the tensors that were planned."""
    if setup.device.kind == "cuda":
        return context_bytes(setup.device)
    return max(0, meter.peak_bytes - max(setup.plan.phases.values()))
