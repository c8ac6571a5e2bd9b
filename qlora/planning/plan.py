"""A plan is plain data: what will run, why, and what is known of its memory before anything is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Decision:
    """One setting with its value and where the value came from.

    `source` is "given" (a person wrote it), "derived" (follows from other values or from the data), "rule" (one of
    `qlora.guidance`) or "default".
    """

    value: Any
    source: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a run does. Sizes in bytes.

    `parts` holds what is known to the byte without running anything: base, embeddings, head, adapters, gradients and
    optimizer. Activations are not among them, so their sum is what a run needs at the very least.
    """

    model: str
    device: str
    budget_bytes: int
    decisions: dict[str, Decision]
    parts: dict[str, int]
    num_steps: int

    @property
    def settings(self) -> dict[str, Any]:
        """The value of every decided setting by its dotted name."""
        return {key: decision.value for key, decision in self.decisions.items()}

    @property
    def least_bytes(self) -> int:
        """Weights, gradients and optimizer state: the part of the peak that no setting of length or batch changes."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """The plan as plan.json holds it."""
        document = asdict(self)
        decisions = document.pop("decisions")
        document["settings"] = {key: decision["value"] for key, decision in decisions.items()}
        document["sources"] = {key: decision["source"] for key, decision in decisions.items()}
        document["reasons"] = {key: decision["reason"] for key, decision in decisions.items()}
        document["least_bytes"] = self.least_bytes
        return document
