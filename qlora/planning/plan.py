"""A plan is plain data: what will run, why, and the memory that it takes in every phase. Sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

PHASES = ("load", "train", "eval", "generate", "save", "merge")
PARTS = (
    "base", "embeddings", "head", "adapters", "gradients", "optimizer", "activations", "loss", "workspace", "context", "margin",
)


@dataclass(frozen=True)
class Decision:
    """One setting with its value and where the value came from.

    `source` is "given" (a person wrote it), "derived" (follows from other values, from the data or from the memory at
    hand), "rule" (one of `qlora.guidance`) or "default".
    """

    value: Any
    source: str
    reason: str


@dataclass(frozen=True)
class Alternative:
    """Something near that fits, found by the same simulation.

    Attributes:
        change: what is different, one line: "rows of up to 1,536 tokens".
        overrides: what to add to the command: ("data.max_length=1536",).
    """

    change: str
    overrides: tuple[str, ...]
    model: str
    device: str
    peak_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class Fallback:
    """What a run goes on with when memory runs short: the same rows a step, fewer of them at once.

    Attributes:
        micro_batch: rows at once.
        accumulation: micro-batches of a step, each part of a planned one counted as one.
        checkpointing: activations are computed anew in the backward pass.
        peak_bytes: what the run needs with it, counted as `Plan.peak_bytes` is.
    """

    micro_batch: int
    accumulation: int
    checkpointing: bool
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run does, and what it needs.

    Attributes:
        device: its name; `kind` is "cuda" or "cpu".
        budget_bytes: what the run may take in all on the device. On a GPU the CUDA context is part of it.
        phases: highest tensor memory by phase, what torch reports as max_memory_allocated.
        parts: what the peak consists of, with the context and the margin; their sum is `peak_bytes`.
        reserved_bytes: what torch's caching allocator is expected to hold at its highest, without a cap.
        host_peak_bytes: RAM of the whole process at its highest.
        disk_bytes: what a run leaves on disk at its largest; the model's own files are not counted.
        decisions: every setting by its dotted name.
        num_steps: optimizer steps; None where there is no data.
        alternatives: nearest plans that fit; empty where this one does.
        fallbacks: what the run steps down to, one after the other, when memory runs short; each needs less than the one before.
        tokens_per_second: an estimate; `speed_basis` says what it rests on.
        longest_length: tokens of the longest rows that fit at all, one at a time and with activations computed anew.
        seconds: what planning took.
    """

    model: str
    device: str
    kind: str
    budget_bytes: int
    fits: bool
    phases: dict[str, int]
    parts: dict[str, int]
    reserved_bytes: int
    host_peak_bytes: int
    disk_bytes: int
    decisions: dict[str, Decision]
    num_steps: int | None
    alternatives: tuple[Alternative, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    tokens_per_second: float | None = None
    speed_basis: str = ""
    notes: tuple[str, ...] = ()
    longest_length: int | None = None
    seconds: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """The value of every decided setting by its dotted name."""
        return {key: decision.value for key, decision in self.decisions.items()}

    @property
    def peak_bytes(self) -> int:
        """What the run needs at its highest, context and margin included."""
        return sum(self.parts.values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs most; the first of equals."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def largest_part(self) -> str:
        """What takes most of the peak."""
        return max(self.parts, key=self.parts.__getitem__)

    def to_json(self) -> dict[str, Any]:
        """The plan as plan.json and `qlora plan --json` have it; settings by the last part of their name."""
        document = asdict(self)
        decisions = document.pop("decisions")
        document["peak_bytes"], document["peak_phase"] = self.peak_bytes, self.peak_phase
        for name, key in (("settings", "value"), ("sources", "source"), ("reasons", "reason")):
            document[name] = {dotted.rpartition(".")[2]: decision[key] for dotted, decision in decisions.items()}
        document["sections"] = {dotted.rpartition(".")[2]: dotted.partition(".")[0] for dotted in decisions}
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        values = {field.name: document[field.name] for field in fields(cls) if field.name in document}
        values["decisions"] = {
            f"{section}.{name}": Decision(document["settings"][name], document["sources"][name], document["reasons"][name])
            for name, section in document["sections"].items()
        }
        values["alternatives"] = tuple(
            Alternative(**{**entry, "overrides": tuple(entry["overrides"])}) for entry in document["alternatives"]
        )
        values["fallbacks"] = tuple(Fallback(**entry) for entry in document.get("fallbacks", ()))
        values["notes"] = tuple(document["notes"])
        return cls(**values)
