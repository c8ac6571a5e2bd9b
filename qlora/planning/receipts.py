"""What earlier runs took against what was planned for them, and the margin that follows from it.

A receipt is one line of JSON in `receipts.jsonl`, in the user's cache. Lines of other people can be read beside it.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qlora.errors import OutputError
from qlora.hardware import Device
from qlora.home import cache_home
from qlora.planning.cache import library_versions
from qlora.planning.roofline import Streaming
from qlora.units import MIB, format_bytes

# Before there are receipts: (share, bytes, why). scripts/score_planner.py prints the errors on 79 Tesla T4 runs; other cards and
# libraries differ, so the prior is several times as large. The MiB are for rounding while loading, which does not grow with the
# model. On a CPU nothing is rounded and no block is kept.
_PRIORS = {
    "cuda": (0.02, 32 * MIB, "the simulation was at most 0.35 % under on 79 runs of a Tesla T4, and this may be another card"),
    "cpu": (0.01, 0, "no allocator stands between the tensors and the RAM"),
}
_LEAST, _MOST = 0.005, 0.25
_ENOUGH = 5  # receipts that replace the prior altogether
_COVERAGE = 0.95
_LATEST = 5  # receipts that the speed is taken from: drivers and habits change
# A streamed run tells the speed of another one whose share of streamed layers and whose tokens per visit are this near.
_NEAR_SHARE, _NEAR_TOKENS = 0.05, 1.25
_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Receipt:
    """One trial of a plan, or one finished run. Sizes in bytes.

    Attributes:
        kind: "cuda" or "cpu"; `capability` is CUDA's, None on a CPU.
        allocator: "native", "expandable" or, on a CPU, "cpu".
        versions: of the libraries, see `qlora.planning.cache.library_versions`.
        settings: dotted name to value, those that decide memory and speed.
        planned, measured: peak of tensor memory by phase (torch: max_memory_allocated); {} where only the speed was measured.
        planned_reserved, measured_reserved: the same of what the allocator held; {} on a CPU.
        context_bytes: what CUDA took beside that, on a CPU what the program took beside its tensors; None where it was not
            measured.
        num_retries: how often the allocator gave blocks back to go on.
        flops_per_token: see `qlora.planning.speed`; makes speeds of different models comparable.
        key: the planning key, equal for equal plans.
        origin: the file that it came from, where it was measured by somebody else; see `Receipts.adopt`.
    """

    device: str
    kind: str
    model: str
    planned: dict[str, int]
    measured: dict[str, int]
    capability: tuple[int, int] | None = None
    allocator: str = "native"
    os: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    planned_reserved: dict[str, int] = field(default_factory=dict)
    measured_reserved: dict[str, int] = field(default_factory=dict)
    context_bytes: int | None = None
    num_retries: int = 0
    tokens_per_second: float | None = None
    flops_per_token: float | None = None
    key: str = ""
    origin: str = ""
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def streaming(self) -> Streaming | None:
        """How the run streamed, from its settings; None where all layers stayed on the device, as in every receipt of old."""
        return Streaming.of(self.settings)

    @property
    def compares_tensors(self) -> bool:
        """Whether it says how tensors were planned and measured. Receipts of a finished run on a CPU have its speed alone; older
        ones had the RAM of the whole program.
        """
        return bool(self.planned and self.measured) and "program" not in self.measured

    @property
    def excess(self) -> float:
        """By which share of the plan the run went over it; below 0 when it stayed under.

        Bytes that every margin has besides its share are not counted again.
        """
        spare = _PRIORS[self.kind][1]
        return (max(self.measured.values()) - spare) / max(self.planned.values()) - 1


@dataclass(frozen=True)
class Margin:
    """What is added to a plan: a share of its tensor memory, and bytes."""

    share: float
    bytes: int
    reason: str

    def of(self, tensor_bytes: int) -> int:
        """The margin of a plan whose tensors take `tensor_bytes`."""
        return math.ceil(self.share * tensor_bytes) + self.bytes


class Receipts:
    """The receipts that were found, in the order in which they were written; other people's before our own, which are the latest.

    Attributes:
        path: where `add` writes.
    """

    def __init__(self, receipts: Iterable[Receipt] = (), path: Path | None = None):
        self.path = path or default_path()
        self._receipts = sorted(receipts, key=lambda receipt: not receipt.origin)

    @classmethod
    def load(cls, *paths: Path | str) -> Receipts:
        """Those of this machine, or of the files named; the first is the one written to. A file may be missing."""
        files = [Path(path) for path in paths] or [default_path()]
        return cls((receipt for file in files for receipt in _read(file)), files[0])

    def __len__(self) -> int:
        return len(self._receipts)

    def __iter__(self) -> Any:
        return iter(self._receipts)

    def adopt(self, receipts: Iterable[Receipt], origin: str) -> int:
        """Count other people's receipts too, for cards that they have in common with this machine, from now on.

        Args:
            origin: where they came from; goes into each.

        Returns:
            How many of them were not there yet.

        Raises:
            OutputError: the file cannot be written.
        """
        known = {_content(receipt) for receipt in self._receipts}
        new = {content: receipt for receipt in receipts if (content := _content(receipt)) not in known}
        for receipt in new.values():
            self.add(replace(receipt, origin=origin))
        self._receipts.sort(key=lambda receipt: not receipt.origin)
        return len(new)

    def add(self, receipt: Receipt) -> None:
        """Keep a receipt, here and on disk. Runs that end at the same moment do not harm each other.

        Raises:
            OutputError: the file cannot be written.
        """
        self._receipts.append(receipt)
        line = json.dumps(asdict(receipt), default=str) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write at the end of the file is atomic on local disks; elsewhere a torn line is skipped when reading.
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            try:
                os.write(file, (("" if _ends_in_newline(file) else "\n") + line).encode())
            finally:
                os.close(file)
        except OSError as error:
            raise OutputError(
                f"The receipt of this run cannot be written to {self.path}: {error.strerror or error}.",
                "Free some space there, or set QLORA_CACHE to a folder you may write to.",
            ) from error

    def margin(self, device: Device, allocator: str | None = None) -> Margin:
        """What to add to plans for this device.

        The share is a conformal upper bound of the excess of its receipts: the ceil((n + 1) x 0.95)-th smallest of n, the
        largest while n is below 20 (split conformal prediction, https://arxiv.org/abs/1604.04173). It is mixed with a
        prior until there are five, and never below 0.5 % or above 25 %. Receipts for other library versions say something
        about another simulation: they can raise the prior, and count for nothing else.

        Args:
            allocator: only receipts of this one; None for any.
        """
        prior, spare, why = _PRIORS[device.kind]
        own = [r for r in self._of(device) if allocator in (None, r.allocator) and r.compares_tensors]
        now = _simulated(library_versions())
        current = [r.excess for r in own if _simulated(r.versions) == now]
        older = [r.excess for r in own if _simulated(r.versions) != now]
        if older and _bound(older) > prior:
            prior, why = _bound(older), f"{_runs(older)} of other library versions on {device.name} needed it"
        weight = min(1.0, len(current) / _ENOUGH)
        share = (1 - weight) * prior + weight * (_bound(current) if current else 0)
        reason = f"{_percent(share)}{f' and {format_bytes(spare)}' if spare else ''}: "
        if current:
            worst = max(current)
            side = "over" if worst > 0 else "under"
            reason += f"the worst of {_runs(current)} on {device.name} was {_percent(abs(worst))} {side} its plan"
        if weight < 1:
            reason += f"{'; ' if current else ''}{why}"
        return Margin(share, spare, reason)

    def context_bytes(self, device: Device) -> int | None:
        """The most that CUDA (on a CPU: the program) took for itself on this device, of the latest runs; None if it was never
        measured.
        """
        found = [r.context_bytes for r in self._of(device) if r.context_bytes is not None]
        return max(found[-_LATEST:]) if found else None

    def tokens_per_second(
        self, device: Device, model: str, flops_per_token: float, streaming: Streaming | None = None
    ) -> tuple[float, str] | None:
        """Speed of the latest runs on this device, of the same model if there are any, and what it rests on.

        Args:
            streaming: how the run in question streams. Only runs of the same model that streamed about alike count then, and runs
                that streamed never count where nothing is streamed.
        """
        timed = [r for r in self._of(device) if r.tokens_per_second and r.flops_per_token and _alike(r.streaming, streaming)]
        same = [r for r in timed if r.model == model][-_LATEST:]
        chosen = same if same or streaming is not None else timed[-_LATEST:]
        if not chosen:
            return None
        speed = statistics.median(r.tokens_per_second * r.flops_per_token for r in chosen) / flops_per_token
        whose = "this model" if same else "other models, by arithmetic"
        how = "" if streaming is None else ", streamed alike"
        return speed, f"measured on {device.name} in {_runs(chosen)} of {whose}{how}"

    def _of(self, device: Device) -> list[Receipt]:
        name = _plain_name(device.name)
        return [r for r in self._receipts if r.kind == device.kind and _plain_name(r.device) == name]


def default_path() -> Path:
    """Where this machine's receipts are kept."""
    return cache_home() / "receipts.jsonl"


def parse_receipt(values: Any) -> Receipt | None:
    """A receipt of plain values, such as a line of the file holds; None for what is none, or not a sound one."""
    names = {entry.name for entry in fields(Receipt)}
    try:
        known = {name: value for name, value in values.items() if name in names}
        receipt = Receipt(**{**known, "capability": tuple(known["capability"]) if known.get("capability") else None})
    except (AttributeError, TypeError, KeyError):
        return None
    return receipt if _is_sound(receipt) else None


# --- details ----------------------------------------------------------------------------------------------------------


def _alike(one: Streaming | None, other: Streaming | None) -> bool:
    """Whether the speed of one run says something of the other's; where tokens per visit are not known, it does not."""
    if one is None or other is None:
        return one is other
    if one.tokens_per_visit is None or other.tokens_per_visit is None or one.source != other.source:
        return False
    ratio = one.tokens_per_visit / other.tokens_per_visit
    return abs(one.share - other.share) <= _NEAR_SHARE and 1 / _NEAR_TOKENS <= ratio <= _NEAR_TOKENS


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _plain_name(device: str) -> str:
    """CUDA says "NVIDIA GeForce RTX 3060 Laptop GPU" where the table of cards says "GeForce RTX 3060 Laptop"."""
    return re.sub(r"^NVIDIA | GPU$| \d+GB$", "", device)


def _simulated(versions: Mapping[str, str]) -> dict[str, str | None]:
    """Those of the versions that decide what a run allocates."""
    return {name: versions.get(name) for name in _LIBRARIES}


def _bound(excesses: Sequence[float]) -> float:
    """The upper bound described in `Receipts.margin`."""
    rank = min(len(excesses), math.ceil((len(excesses) + 1) * _COVERAGE))
    return min(_MOST, max(_LEAST, sorted(excesses)[rank - 1]))


def _read(path: Path) -> list[Receipt]:
    """Damaged lines, and those that a later version writes in another way, are left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [receipt for receipt in map(_parse, lines) if receipt is not None]


def _parse(line: str) -> Receipt | None:
    try:
        return parse_receipt(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _content(receipt: Receipt) -> str:
    """What two receipts of the same run have in common, wherever they were found."""
    return json.dumps({**asdict(receipt), "origin": ""}, sort_keys=True, default=str)


def _is_sound(receipt: Receipt) -> bool:
    """A file may come from anywhere; what does not look like a run would spoil the margin."""
    sizes = [receipt.planned, receipt.measured, receipt.planned_reserved, receipt.measured_reserved]
    return (
        receipt.kind in _PRIORS
        and isinstance(receipt.device, str)
        and isinstance(receipt.origin, str)
        and all(isinstance(entry, Mapping) for entry in [*sizes, receipt.versions, receipt.settings])
        and all(_is_positive(size) for entry in sizes for size in entry.values())
        and all(value is None or _is_positive(value) for value in (receipt.tokens_per_second, receipt.flops_per_token))
        and (receipt.context_bytes is None or _is_positive(receipt.context_bytes))
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _ends_in_newline(file: int) -> bool:
    size = os.fstat(file).st_size
    if size == 0:
        return True
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1) == b"\n"


def _runs(receipts: Sequence[Any]) -> str:
    return f"{len(receipts)} run{'s' if len(receipts) != 1 else ''}"
