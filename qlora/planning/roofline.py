"""How fast a run is whose layers are streamed: the time to compute a layer against the time to bring the next one.

In a step each layer is visited twice, forward and backward, for all micro-batches at once. Two or more slots on the device hold
streamed layers; while one is computed, the next is loaded into a slot that is free. A pass is followed layer by layer here, so
slots that keep their layers where forward turns into backward, and resident layers between streamed ones, count as they are.
What memory all of that needs is not looked at.

GB are 1e9 bytes here, as on the data sheets of cards and disks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.catalog.cards import find_card
from qlora.engine.placement import resident_numbers
from qlora.errors import HardwareError
from qlora.hardware import Device
from qlora.units import MIB


@dataclass(frozen=True)
class Link:
    """How fast bytes come to the device, in GB/s (infinite where nothing has to move), and a phrase that says by which way."""

    gigabytes_per_second: float
    basis: str


# GB/s that copies from page-locked host memory to the card reach on a link of this generation and width. 3.0: 11 on an RTX 4090
# in such a slot (bitsandbytes, branch QLORA-2, docs/streaming_analysis), 13.1 on an RTX 2080 Ti (usadellab/Helixer issue 22),
# 9.7 on a rented Tesla T4; x8 6.2 (experts4bit-qlora). 4.0: 23.9 to 26.4 on eight RTX 4090 (NVIDIA/nvbandwidth issue 15); x8
# 12.9 to 13.3 on an RTX 4060 (krrishnarraj/clpeak issue 205). 5.0: 27 on one RTX 5090, 56 on eight of them in a server
# (tinygrad/open-gpu-kernel-modules issue 29); the lower counts. 5.0 x8 has the raw rate of 4.0 x16.
_EFFECTIVE = {(3, 8): 6.2, (3, 16): 11.0, (4, 8): 12.8, (4, 16): 24.0, (5, 8): 24.0, (5, 16): 27.0}
_SLOWEST = (3, 8)

# GB/s of a disk that nobody has measured: an NVMe drive of PCIe 3.0, and one behind SATA. Newer drives read faster, but a plain
# way through the page cache reached no more than 3.4 to 4.5 from an array that gives 49 (bitsandbytes, GDS_BENCHMARK.md).
NVME_GB_S, SATA_GB_S = 3.5, 0.5

_ASSUMED_DISK = Link(NVME_GB_S, f"{NVME_GB_S:g} GB/s from disk, assumed of an NVMe drive")
NUM_SLOTS = 2  # as in engine/stream.py, which is not imported here because it loads torch
_HIDDEN = 0.99  # loads that cost less than a hundredth of the step are called hidden


@dataclass(frozen=True)
class Streaming:
    """How a run streams.

    Attributes:
        source: "ram" or "disk", where streamed layers come from.
        tokens_per_visit: of all micro-batches of a visit together; None where the settings do not tell.
    """

    resident_layers: int
    streamed_layers: int
    source: str
    tokens_per_visit: int | None

    @property
    def share(self) -> float:
        """Of all layers, those that are streamed."""
        return self.streamed_layers / (self.resident_layers + self.streamed_layers)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Streaming | None:
        """What settings by dotted name say; None where all layers stay on the device. They may come from a file of receipts."""
        streamed, resident = settings.get("memory.streamed_layers"), settings.get("memory.resident_layers")
        if not _is_count(streamed) or streamed == 0:
            return None
        visit = settings.get("memory.visit_micro_batches", "all")
        micro_batches = settings.get("train.accumulation", 1) if visit == "all" else visit
        factors = [settings.get("train.micro_batch"), micro_batches, settings.get("data.max_length")]
        tokens = math.prod(factors) if all(_is_count(factor) and factor for factor in factors) else None
        source = "ram" if settings.get("memory.stream_from") == "ram" else "disk"
        return cls(resident if _is_count(resident) else 0, streamed, source, tokens)


@dataclass(frozen=True)
class StreamedSpeed:
    """What streaming makes of a speed.

    Attributes:
        resident_tokens_per_second: of the same step with all layers on the device.
        share: of that speed which is left, from 0 to 1.
        hidden_from_tokens: tokens per visit from which loads cost less than 1 % of the step; 0 where there is nothing to hide.
        bound: "compute", "link" or "disk": what the step waits for.
        basis: one line that says all of this.
    """

    tokens_per_second: float
    resident_tokens_per_second: float
    share: float
    hidden_from_tokens: int
    basis: str
    bound: str


def link_of(device: Device) -> Link:
    """The link of a device to host memory, by the generation and lanes of its card.

    A slot of an older generation, or one with fewer lanes, is slower than what the card could do, and is not seen here. Cards in
    no table count as behind the slowest usual link.
    """
    if device.kind == "cpu":
        return Link(math.inf, "a CPU uses layers where they lie in RAM")
    try:
        card = find_card(device.name, memory_mib=device.memory_bytes / MIB)
    except HardwareError:
        assumed = link_rate(*_SLOWEST)
        return Link(assumed.gigabytes_per_second, f"{assumed.basis}, the slowest usual link, assumed of {device.name}")
    return link_rate(*card.pcie)


def link_rate(generation: int, lanes: int) -> Link:
    """What a PCIe link of this generation and width gives in practice. One that is not in the table counts as the next slower one
    in it; below all of them, as its share of the slowest.
    """
    known = [rate for (least, width), rate in _EFFECTIVE.items() if least <= generation and width <= lanes]
    slowest_generation, slowest_lanes = _SLOWEST
    below = _EFFECTIVE[_SLOWEST] * min(1.0, lanes / slowest_lanes * 2.0 ** (generation - slowest_generation))
    rate = max(known, default=below)
    return Link(rate, f"{rate:g} GB/s over PCIe {generation}.0 x{lanes}")


def streamed_speed(
    *,
    resident_tokens_per_second: float,
    forward_share: float,
    backward_share: float,
    num_layers: int,
    streamed_layers: int,
    streamed_bytes: float,
    tokens_per_visit: int,
    link: Link,
    num_slots: int = NUM_SLOTS,
    source: str = "ram",
    disk_gb_s: float | None = None,
) -> StreamedSpeed:
    """How fast a step is when some of its layers are streamed.

    Args:
        resident_tokens_per_second: of the same step with all layers on the device and with activations recomputed, as streaming
            does.
        forward_share, backward_share: of the time of that step, what goes into the layers' forward pass, and into their backward
            pass with the forward pass that is done again there. The rest is the head's, where nothing is loaded: the slots hold
            the layers that come next.
        streamed_bytes: of all streamed layers together, which are taken to be alike.
        tokens_per_visit: that pass through a layer each time it is there: micro-batch x accumulation x length.
        source: "ram" or "disk", where layers wait.
        disk_gb_s: how fast the disk is read; None takes an NVMe drive's rate, and the basis says so.

    Source of the model: roofline, https://doi.org/10.1145/1498765.1498785, with two visits a step.
    """
    assert 0 < streamed_layers <= num_layers and num_slots >= 2 and tokens_per_visit > 0
    assert forward_share > 0 and backward_share > 0 and forward_share + backward_share <= 1 + 1e-9
    slowest = link
    if source == "disk":
        disk = Link(disk_gb_s, f"{disk_gb_s:g} GB/s from disk") if disk_gb_s else _ASSUMED_DISK
        slowest = min(link, disk, key=lambda way: way.gigabytes_per_second)
    load = streamed_bytes / streamed_layers / (slowest.gigabytes_per_second * 1e9)
    stay = set(resident_numbers(num_layers, num_layers - streamed_layers))
    positions = [number for number in range(num_layers) if number not in stay]
    mirrored = [num_layers - 1 - position for position in reversed(positions)]

    def share(tokens: int) -> float:
        step = tokens / resident_tokens_per_second
        head = step * (1 - forward_share - backward_share)
        forward = pass_seconds(num_layers, positions, step * forward_share / num_layers, load, num_slots, num_slots)
        backward = pass_seconds(num_layers, mirrored, step * backward_share / num_layers, load, num_slots, num_slots)
        return round(step / (forward + head + backward), 9)  # sums of many layers are not exact

    here, hidden = share(tokens_per_visit), _smallest(lambda tokens: share(tokens) >= _HIDDEN)
    bound = "compute" if here >= _HIDDEN else "link" if slowest is link else "disk"
    basis = _basis(here, hidden, tokens_per_visit, bound, f"{streamed_layers} of {num_layers} layers streamed", slowest.basis)
    return StreamedSpeed(here * resident_tokens_per_second, resident_tokens_per_second, here, hidden, basis, bound)


def pass_seconds(
    num_layers: int, streamed: Sequence[int], compute_seconds: float, load_seconds: float, num_slots: int, num_loaded: int
) -> float:
    """Time of one pass over a stack, its layers in order.

    Args:
        streamed: positions of the streamed layers, ascending.
        compute_seconds, load_seconds: of one layer.
        num_loaded: streamed layers that are in their slots when the pass begins, the first ones.
    """
    order = {position: index for index, position in enumerate(streamed)}
    now, copying_until = 0.0, 0.0
    done: list[float] = []  # when each streamed layer was computed, which frees its slot
    for position in range(num_layers):
        index = order.get(position)
        if index is not None and index >= num_loaded:
            slot_is_free = done[index - num_slots] if index >= num_slots else 0.0
            copying_until = max(copying_until, slot_is_free) + load_seconds
            now = max(now, copying_until)
        now += compute_seconds
        if index is not None:
            done.append(now)
    return now


# --- details ----------------------------------------------------------------------------------------------------------


def _basis(share: float, hidden: int, tokens: int, bound: str, layers: str, way: str) -> str:
    if hidden == 0:
        return f"as fast as with all layers on the device: {layers}, {way}"
    bounded = "" if bound == "compute" else f", bound by the {bound}"
    return (
        f"{100 * share:.0f} % of the speed with all layers on the device{bounded}: {layers} ({way}), which hides from "
        f"{hidden:,} tokens a visit, and there are {tokens:,}"
    )


def _smallest(holds: Any) -> int:
    """The smallest number of tokens that is enough, 0 where one is; more tokens never make it worse."""
    low, high = 0, 1
    while not holds(high):
        low, high = high, high * 2
    if high == 1:
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
