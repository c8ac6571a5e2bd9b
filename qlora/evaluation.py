"""How good a model is on held-out rows: loss per token, perplexity, exact match."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """One look at the held-out rows.

    `loss` is the mean negative log-likelihood in nats over all trained tokens of all rows (not a mean of batch means);
    `exact_match` the share of rows whose greedy answer equals the reference, None when no row was answered.
    """

    loss: float
    num_tokens: int
    exact_match: float | None = None
    num_answers: int = 0
    answers: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite rather than an error where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        """The figures, with perplexity and without the answers."""
        document = asdict(self)
        document.pop("answers")
        return {**document, "perplexity": self.perplexity}

    def to_record(self) -> dict[str, Any]:
        """Everything, for `from_record`."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Evaluation:
        """What `to_record` gave."""
        return cls(**{**record, "answers": tuple(record["answers"])})


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Share of answers equal to their reference once the space around both is dropped; None for no rows."""
    if len(answers) != len(references):
        raise AssertionError("an answer for every reference")
    if not references:
        return None
    return sum(a.strip() == r.strip() for a, r in zip(answers, references)) / len(references)
