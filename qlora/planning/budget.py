"""How much memory a run may take: what the device has, less what is not ours to use.

On a GPU the budget is everything that the run's process takes, CUDA's context included. On a CPU it is what the run's
tensors take: the program around them is counted as `Plan.host_peak_bytes`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora.errors import HardwareError, RecipeError
from qlora.hardware import Device, usable_bytes
from qlora.units import MIB, format_bytes, parse_size

if TYPE_CHECKING:
    from qlora.planning.receipts import Receipts

# Resident size of a whole training process without its tensors: Python, torch, transformers, TRL, PEFT, bitsandbytes and
# datasets. tests/test_budget.py measures it in a child process and fails when it is far off.
PROGRAM_BYTES = 640 * MIB

# Kept free for what others take while the run lasts. Windows: 200 to 500 MB are reported for its desktop, more on laptops
# (see also NVIDIA's note on system memory fallback, driver 536.40, which turns a shortage into a slow run); elsewhere the
# lower half of that. A server card has no desktop. RAM: a twentieth, so that the system need not push programs out.
_WINDOWS_RESERVE_BYTES = 512 * MIB
_DISPLAY_RESERVE_BYTES = 256 * MIB
_RAM_RESERVE_SHARE = 0.05

# What others use is rounded up to whole steps, so that a plan that is asked for twice is the same plan.
_STEP_BYTES = {"cuda": 64 * MIB, "cpu": 512 * MIB}

# What CUDA takes for itself once kernels have run, by lowest compute capability: (MiB, where it was seen). Kernels are
# loaded when they are first used, so it grows during a run; a receipt of this machine replaces the table.
_CONTEXTS = (
    ((12, 0), 727, "0.59 to 0.71 GiB on an RTX 5090, driver 595"),
    ((9, 0), 512, "no measurement published; between its neighbours"),
    ((8, 0), 300, "about 300 MB since CUDA 11.7 (pytorch#107667); 133 MiB on an RTX A2000, 256 MiB idle on an RTX 3090"),
    ((0, 0), 141, "40 runs on a Tesla T4, published with fitcheck-llm 0.3.1"),
)
_CONTEXT_GROWTH = 1.15  # on what the table has: drivers and library versions differ


@dataclass(frozen=True)
class Budget:
    """What a run may take, in bytes.

    Attributes:
        total_bytes: what the device has; `others_bytes` of it are in use by other programs now, and `reserve_bytes` are
            kept free. Both are 0 where a person stated the size.
        context_bytes: the part of `bytes` that CUDA takes; 0 on a CPU.
        bytes: what the run may take in all, the context included.
        reason: one line.
    """

    total_bytes: int
    others_bytes: int
    reserve_bytes: int
    context_bytes: int
    reason: str
    bytes: int


def find_budget(device: Device, wanted: str = "auto", receipts: Receipts | None = None) -> Budget:
    """The budget of a run on `device`.

    Args:
        wanted: "auto" for what is free, or a size with a unit.
        receipts: earlier runs on this machine, for what CUDA's context takes here.

    Raises:
        HardwareError: more than the card has is asked for, or nothing is left once CUDA itself is there.
        RecipeError: `wanted` is not a size.
    """
    if wanted != "auto":
        return _stated(device, usable_bytes(device, parse_size(wanted)), parse_size(wanted), receipts)
    if not device.present:
        total = device.memory_bytes
        return _checked(device, Budget(
            total, 0, 0, _context(device, receipts), f"{device.name}: CUDA sees about {format_bytes(total)} of it", total
        ))
    if device.kind == "cpu":
        return _free_ram(device, receipts)
    others, reserve = _used_by_others(device), _gpu_reserve(device)
    spent = [f"{format_bytes(others)} in use by others"] if others else []
    spent += [f"{format_bytes(reserve)} kept for the desktop"] if reserve else []
    less = f", less {' and '.join(spent)}" if spent else ""
    return _checked(device, Budget(
        device.memory_bytes, others, reserve, _context(device, receipts),
        f"{device.name} has {format_bytes(device.memory_bytes)}{less}", device.memory_bytes - others - reserve,
    ))


def read_vram(text: str) -> tuple[int, str | None]:
    """Bytes of a card's memory as people type it, and how it was read if that needs saying: "8" is 8 GB.

    Raises:
        RecipeError: not a size, or not above zero.
    """
    text = text.strip()
    number = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if number and float(number[1]) <= 0:
        raise RecipeError(f'"{text}" is not above zero, and nothing fits into it.', 'Write a size such as "8GB".')
    if number is None or number[2]:
        return parse_size(text), None
    hint = f' Write "{number[1]}MB" for MiB.' if float(number[1]) >= 256 else ""
    return parse_size(f"{number[1].lstrip('+')}GB"), f"{text} was read as {number[1].lstrip('+')} GB.{hint}"


# --- details ----------------------------------------------------------------------------------------------------------


def _stated(device: Device, size: int, asked: int, receipts: Receipts | None) -> Budget:
    reason = f"{format_bytes(size)}, as asked"
    if size < asked:
        reason = f"all {format_bytes(size)} that {device.name} has of the {format_bytes(asked)} asked for"
    free = device.memory_bytes - _used_by_others(device)
    if device.present and free < size:
        reason += f"; only {format_bytes(free)} are free now"
    return _checked(device, Budget(device.memory_bytes, 0, 0, _context(device, receipts), reason, size))


def program_bytes(device: Device, receipts: Receipts | None) -> int:
    """RAM of the program without a run's tensors: as earlier runs on this CPU had it, at least `PROGRAM_BYTES`."""
    seen = receipts.context_bytes(device) if receipts is not None and device.kind == "cpu" else None
    return max(PROGRAM_BYTES, seen or 0)


def _free_ram(device: Device, receipts: Receipts | None) -> Budget:
    others = _used_by_others(device)
    free = device.memory_bytes - others
    reserve = program_bytes(device, receipts) + int(_RAM_RESERVE_SHARE * device.memory_bytes)
    return _checked(device, Budget(
        device.memory_bytes, others, reserve, 0,
        f"{format_bytes(free)} of RAM are free, less {format_bytes(reserve)} for the program and the system", free - reserve,
    ))


def _used_by_others(device: Device) -> int:
    """In whole steps. In RAM, what this process has taken for the program so far is not counted as somebody else's."""
    used = device.used_by_others_bytes
    if device.kind == "cpu":
        import psutil

        used = device.memory_bytes - device.free_bytes - min(PROGRAM_BYTES, psutil.Process().memory_info().rss)
    step = _STEP_BYTES[device.kind]
    return min(device.memory_bytes, max(0, -(-used // step) * step))


def _gpu_reserve(device: Device) -> int:
    if device.windows:
        return _WINDOWS_RESERVE_BYTES
    return _DISPLAY_RESERVE_BYTES if device.display else 0


def _context(device: Device, receipts: Receipts | None) -> int:
    if device.kind != "cuda":
        return 0
    measured = receipts.context_bytes(device) if receipts is not None else None
    if measured is not None:
        return measured
    mib = next(mib for capability, mib, _ in _CONTEXTS if (device.capability or (8, 9)) >= capability)
    return int(mib * _CONTEXT_GROWTH) * MIB


def _checked(device: Device, budget: Budget) -> Budget:
    if budget.bytes > budget.context_bytes:
        return budget
    if budget.context_bytes:
        problem = (
            f"The budget is {format_bytes(max(0, budget.bytes))} ({budget.reason}), but CUDA alone takes "
            f"{format_bytes(budget.context_bytes)} on {device.name}."
        )
    else:
        problem = f"Nothing is left for the run: {budget.reason}."
    raise HardwareError(
        problem, "Close other programs that use this memory." if budget.others_bytes else "Give the run more than that."
    )
