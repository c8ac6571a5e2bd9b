"""The computer around the device: its RAM, its processor, and the limits that a container sets."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path


def count_threads() -> int:
    """What torch would take: OMP_NUM_THREADS, else the cores."""
    import psutil

    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else psutil.cpu_count(logical=False) or os.cpu_count() or 1


def host_memory() -> tuple[int, int]:
    """RAM in bytes, (total, free now), that this process may use: the machine's, or less where a container limits it."""
    import psutil

    ram = psutil.virtual_memory()
    groups = list(_control_groups(Path("/")))
    return min([ram.total] + [limit for limit, _ in groups]), min([ram.available] + [free for _, free in groups])


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) in bytes of every Linux control group around this process that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if not kinds:
            base, limit_name, used_name, cache_name = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            base, limit_name, used_name = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_name = "total_inactive_file"
        else:
            continue
        own = root / base / path.strip("/")
        for folder in [own, *(parent for parent in own.parents if parent.is_relative_to(root / base))]:
            try:
                limit, used = (int((folder / name).read_text(encoding="utf-8")) for name in (limit_name, used_name))
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
            except (OSError, ValueError):
                continue  # "max", which is no limit; or a path of the host that a container does not see
            yield limit, max(0, limit - used + int(stat.get(cache_name, 0)))


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # Not Linux: the standard library's answer below is all there is.
    return platform.processor() or platform.machine()
