"""This machine: which device a run uses, how much memory it has and how much of that is free."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass

from qlora.errors import HardwareError
from qlora.units import format_bytes


@dataclass(frozen=True)
class Device:
    """One device and the host around it. Sizes in bytes; `capability` is CUDA's (major, minor), None on a CPU.

    On a CPU, `memory_bytes` is the machine's RAM.
    """

    kind: str
    name: str
    memory_bytes: int
    free_bytes: int
    host_bytes: int
    host_free_bytes: int
    num_threads: int
    has_bf16: bool
    capability: tuple[int, int] | None = None

    @property
    def torch_name(self) -> str:
        """What torch calls it; a run uses one GPU, the first one visible."""
        return "cuda:0" if self.kind == "cuda" else "cpu"


def find_device(wanted: str = "auto") -> Device:
    """The GPU if there is one, else the CPU; or the one that is asked for.

    Raises:
        HardwareError: a GPU is asked for and torch sees none.
    """
    import psutil
    import torch

    ram = psutil.virtual_memory()
    host = dict(host_bytes=ram.total, host_free_bytes=ram.available, num_threads=torch.get_num_threads())
    if wanted != "cpu" and torch.cuda.is_available():
        free_bytes, total_bytes = torch.cuda.mem_get_info(0)
        return Device(
            kind="cuda", name=torch.cuda.get_device_name(0), memory_bytes=total_bytes, free_bytes=free_bytes,
            has_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
            capability=torch.cuda.get_device_capability(0), **host,
        )
    if wanted == "cuda":
        raise HardwareError(f"memory.device is cuda, but no GPU can be used: {_why_no_gpu()}", "Set memory.device: cpu.")
    return Device(
        kind="cpu", name=_cpu_name(), memory_bytes=ram.total, free_bytes=ram.available, has_bf16=True, **host
    )


def gpu_is_hidden() -> str | None:
    """Why an NVIDIA card that is in this machine cannot be used, or None when there is nothing to say."""
    return None if shutil.which("nvidia-smi") is None else _why_no_gpu()


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA. Install the CUDA build of torch for your driver."
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every card."
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no card; `nvidia-smi` shows whether the driver does."


def _cpu_name() -> str:
    """The processor's model name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # Not Linux: the standard library's answer below is all there is.
    return platform.processor() or platform.machine()


def usable_bytes(device: Device, budget_bytes: int) -> int:
    """The part of a budget that the device has. A card sold as "8 GB" reports a little less, so a budget up to a tenth
    above what is there means all of it.

    Raises:
        HardwareError: a GPU that is smaller than the budget by more than that.
    """
    if device.kind == "cuda" and budget_bytes > device.memory_bytes * 1.1:
        raise HardwareError(
            f"memory.budget is {format_bytes(budget_bytes)}, but {device.name} has {format_bytes(device.memory_bytes)}.",
            "Leave memory.budget at auto, or name at most what the card has.",
        )
    return min(budget_bytes, device.memory_bytes)


def limit_memory(device: Device, budget_bytes: int) -> None:
    """Hold the run to `budget_bytes` of the GPU, so that a plan for a small card is true on a larger one.

    The cap counts what torch's allocator takes, without the CUDA context. On a CPU there is no such cap.
    """
    if device.kind == "cuda":
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / device.memory_bytes), 0)


def reset_peak_memory(device: Device) -> None:
    """Start counting the peak anew, so that it is the run's own and not that of what came before it."""
    if device.kind == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(0)
    elif sys.platform == "linux":
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as switch:
                switch.write("5")  # proc(5): resets VmHWM
        except OSError:
            pass  # A sandbox may forbid it; the peak then counts from the start of the process, which is never too low.


def peak_memory_bytes(device: Device) -> int:
    """Most memory since `reset_peak_memory`: reserved by torch on a GPU, resident in RAM on a CPU."""
    if device.kind == "cuda":
        import torch

        return torch.cuda.max_memory_reserved(0)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def used_memory_bytes(device: Device) -> int:
    """Memory this process holds now, counted as in `peak_memory_bytes`."""
    if device.kind == "cuda":
        import torch

        return torch.cuda.memory_reserved(0)
    import psutil

    return psutil.Process().memory_info().rss
