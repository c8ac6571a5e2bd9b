"""What NVIDIA's driver says about the card, asked through its management library: needs neither CUDA nor torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuFacts:
    """What the driver says about the GPU that CUDA would use first. Sizes in bytes."""

    name: str
    memory_bytes: int
    others_bytes: int
    capability: tuple[int, int]
    display: bool
    windows: bool


def gpu_facts() -> GpuFacts | None:
    """Ask NVIDIA's management library, which needs neither CUDA nor torch; None where there is no driver or no card."""
    return _ask_driver(_read_gpu)


def own_gpu_bytes() -> int | None:
    """GPU memory of this process as the driver counts it, CUDA's context included; None where it does not tell."""
    return _ask_driver(_own_bytes)


def cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, such as (12, 4); None where it does not tell."""
    number = _ask_driver(lambda nvml, _: nvml.nvmlSystemGetCudaDriverVersion_v2())
    return None if number is None else (number // 1000, number % 1000 // 10)


def _ask_driver(question: Callable[[Any, Any], Any]) -> Any:
    """`question(pynvml, handle of the card)`, or None where it cannot be asked."""
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handle = _first_gpu(nvml)
        return None if handle is None else question(nvml, handle)
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _first_gpu(nvml: Any) -> Any:
    """The card that CUDA numbers 0: the first that CUDA_VISIBLE_DEVICES names, else the fastest. None if all are hidden."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":  # CUDA's own order puts the fastest first
        handles.sort(
            key=lambda h: (nvml.nvmlDeviceGetCudaComputeCapability(h), nvml.nvmlDeviceGetMemoryInfo(h).total), reverse=True
        )
    return handles[int(first)] if first.isdigit() and int(first) < len(handles) else None


def _read_gpu(nvml: Any, handle: Any) -> GpuFacts:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        memory_bytes = memory.total - memory.reserved  # the driver's own part, which CUDA does not count either
    except nvml.NVMLError:  # a driver from before 2022
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        memory_bytes = memory.total
    name = nvml.nvmlDeviceGetName(handle)
    display = _or_none(nvml, nvml.nvmlDeviceGetDisplayActive, handle)
    wddm = sys.platform == "win32" and _or_none(nvml, nvml.nvmlDeviceGetCurrentDriverModel, handle) in (None, 0)
    return GpuFacts(
        name=name.decode() if isinstance(name, bytes) else name,
        memory_bytes=memory_bytes,
        others_bytes=max(0, memory_bytes - memory.free - (_own_bytes(nvml, handle) or _torch_bytes())),
        capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        display=on_windows() if display is None else bool(display),
        windows=wddm or (sys.platform != "win32" and on_windows()),
    )


def _own_bytes(nvml: Any, handle: Any) -> int | None:
    """None on Windows, and in a container that numbers its processes anew."""
    for process in _or_none(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ():
        if process.pid == os.getpid() and process.usedGpuMemory is not None:
            return process.usedGpuMemory
    return None


def _torch_bytes() -> int:
    """What torch's allocator in this process holds of the GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.memory_reserved(0) if torch is not None and torch.cuda.is_initialized() else 0


def _or_none(nvml: Any, question: Callable[[Any], Any], handle: Any) -> Any:
    try:
        return question(handle)
    except nvml.NVMLError:
        return None


def on_windows() -> bool:
    """Windows, or Linux inside it (WSL)."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()
