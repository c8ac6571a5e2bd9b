"""This machine, or a card that is not in it: which device a run uses, how much memory it has and how much is free."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import HardwareError
from qlora.hardware.driver import GpuFacts, gpu_facts, on_windows, own_gpu_bytes
from qlora.hardware.host import count_threads, cpu_name, host_memory
from qlora.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from qlora.catalog.cards import Card


@dataclass(frozen=True)
class Device:
    """One device and the host around it. Sizes in bytes; `capability` is CUDA's (major, minor), None on a CPU.

    On a CPU, `memory_bytes` is the machine's RAM; on a GPU, what CUDA calls its total.

    Attributes:
        used_by_others_bytes: GPU memory that other programs and the desktop hold now.
        display: a desktop is drawn by this GPU.
        windows: Windows or WSL, where memory that is short spills into host RAM instead of failing.
        bandwidth, tflops: GB/s, and dense 16-bit TFLOP/s accumulated in fp32, where a table has them.
        present: it is in this machine; False for a card that is only planned for.
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
    used_by_others_bytes: int = 0
    display: bool = False
    windows: bool = False
    bandwidth: float | None = None
    tflops: float | None = None
    present: bool = True

    @property
    def lasting(self) -> dict[str, Any]:
        """What does not change while other programs come and go, for questions that are remembered."""
        return {key: value for key, value in asdict(self).items() if "free" not in key and "used" not in key}

    @property
    def torch_name(self) -> str:
        """What torch calls it; a run uses one GPU, the first one visible."""
        return "cuda:0" if self.kind == "cuda" else "cpu"


def find_device(wanted: str = "auto") -> Device:
    """The GPU if there is one, else the CPU; or the one that is asked for.

    Raises:
        HardwareError: a GPU is asked for and torch sees none.
    """
    import torch

    host = _host(torch.get_num_threads())
    if wanted != "cpu" and torch.cuda.is_available():
        facts = gpu_facts()  # before CUDA starts here, so that our own context does not count as somebody else's
        free_bytes, total_bytes = torch.cuda.mem_get_info(0)
        name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
        if facts is None or facts.name != name:  # no driver library, or CUDA counts the cards differently
            others = total_bytes - free_bytes - torch.cuda.memory_reserved(0)
            facts = GpuFacts(name, total_bytes, others, capability, display=False, windows=on_windows())
        return Device(
            kind="cuda", name=name, memory_bytes=total_bytes, free_bytes=free_bytes,
            has_bf16=torch.cuda.is_bf16_supported(including_emulation=False), capability=capability,
            used_by_others_bytes=max(0, facts.others_bytes), display=facts.display, windows=facts.windows, **host,
        )
    if wanted == "cuda":
        raise HardwareError(f"memory.device is cuda, but no GPU can be used: {_why_no_gpu()}", "Set memory.device: cpu.")
    return _cpu(host)


def describe_machine(wanted: str = "auto") -> Device:
    """What `find_device` says, without importing torch, for commands that should answer at once.

    The driver's own library is asked instead of CUDA. Where it cannot tell, torch is loaded after all.

    Raises:
        HardwareError: a GPU is asked for and there is none.
    """
    facts = gpu_facts() if wanted != "cpu" and _torch_has_cuda() else None
    if facts is not None:
        return Device(
            kind="cuda", name=facts.name, memory_bytes=facts.memory_bytes,
            free_bytes=facts.memory_bytes - facts.others_bytes, has_bf16=facts.capability >= (8, 0),
            capability=facts.capability, used_by_others_bytes=facts.others_bytes, display=facts.display,
            windows=facts.windows, **_host(count_threads()),
        )
    if wanted == "cuda" or (wanted == "auto" and _torch_has_cuda() and shutil.which("nvidia-smi")):
        return find_device(wanted)
    return _cpu(_host(count_threads()))


def device_from_card(card: Card | None, vram_bytes: int | None = None) -> Device:
    """A GPU that need not be here, in a host like this one.

    Args:
        card: from `qlora.catalog.cards`; None for any current card (capability 8.9) that is sold with `vram_bytes`.
        vram_bytes: with a card: use no more than this of it.

    Raises:
        HardwareError: more memory is asked for than the card has.
    """
    host = dict(windows=on_windows(), present=False, **_host(count_threads()))
    if card is None:
        assert vram_bytes is not None, "either a card or a size"
        memory_bytes = cuda_bytes(vram_bytes)
        name = f"a card of {vram_bytes / GIB:.3g} GB" if vram_bytes >= GIB else f"a card of {format_bytes(vram_bytes)}"
        return Device("cuda", name, memory_bytes, memory_bytes, has_bf16=True, capability=(8, 9), **host)
    memory_bytes = cuda_bytes(card.memory_mib * MIB)
    if vram_bytes is not None and vram_bytes > memory_bytes * 1.1:
        raise HardwareError(
            f"{format_bytes(vram_bytes)} are asked for, but {card.name} has {format_bytes(memory_bytes)}.",
            "Leave the size out, or name at most what the card has.",
        )
    memory_bytes = min(memory_bytes, vram_bytes or memory_bytes)
    return Device(
        "cuda", card.name, memory_bytes, memory_bytes, has_bf16=card.has_bf16, capability=card.capability,
        bandwidth=card.bandwidth, tflops=card.tflops, **host,
    )


def cuda_bytes(sold_bytes: int) -> int:
    """What CUDA sees of a card that is sold with `sold_bytes`, or shown so by nvidia-smi: the driver keeps a part.

    300 MiB + 0.8 %, at most 8 %: tests/test_cards.py holds it against the totals in published out-of-memory messages.
    """
    return sold_bytes - round(min(0.08 * sold_bytes, 300 * MIB + 0.008 * sold_bytes))


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


def _torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, read from its version file."""
    if "torch" in sys.modules:
        return sys.modules["torch"].version.cuda is not None
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None


def _cpu(host: dict[str, Any]) -> Device:
    return Device("cpu", cpu_name(), host["host_bytes"], host["host_free_bytes"], has_bf16=True, **host)


def _host(num_threads: int) -> dict[str, Any]:
    total_bytes, free_bytes = host_memory()
    return dict(host_bytes=total_bytes, host_free_bytes=free_bytes, num_threads=num_threads)


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


def peak_allocated_bytes(device: Device) -> int:
    """Most memory of torch's tensors on a GPU since `reset_peak_memory`."""
    import torch

    return torch.cuda.max_memory_allocated(0) if device.kind == "cuda" else 0


def used_memory_bytes(device: Device) -> int:
    """Memory this process holds now, counted as in `peak_memory_bytes`."""
    if device.kind == "cuda":
        import torch

        return torch.cuda.memory_reserved(0)
    import psutil

    return psutil.Process().memory_info().rss


def free_memory_bytes(device: Device) -> int:
    """Memory that nobody holds now: of the GPU, or of the RAM that this process may use."""
    if device.kind == "cuda":
        import torch

        return torch.cuda.mem_get_info(0)[0]
    return host_memory()[1]


def context_bytes(device: Device) -> int | None:
    """What CUDA itself takes of the GPU in this process, kernels loaded so far included; None where nobody can tell."""
    if device.kind != "cuda":
        return None
    import torch

    own = own_gpu_bytes()
    return None if own is None else max(0, own - torch.cuda.memory_reserved(0))
