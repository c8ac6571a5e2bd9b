"""How good a model is on held-out rows: loss per token, perplexity, exact match, and match but for case and punctuation."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER = re.compile(r"(?P<sign>[-+]?)(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.(?P<part>[0-9]+))?")


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


def normalised(text: str) -> str:
    """An answer as SQuAD compares it (https://arxiv.org/abs/1606.05250; its evaluation script, version 1.1): in lower case,
    without punctuation, without the articles a, an and the, with single spaces. Three things differ, each so that answers of other
    kinds than names are told apart as they should be: a word that is a number keeps its sign and its decimal point, and loses thousands
    separators and needless zeros ("1,000.0" is "1000", "-1.5" is not "15"); a word that is nothing but punctuation is kept where
    the answer has no other; and punctuation and case are those of Unicode.
    """
    words = unicodedata.normalize("NFKC", text).casefold().split()
    made = [each for word in words for each in _without_punctuation(word).split() if each not in _ARTICLES]
    return " ".join(made) if made else " ".join(words)


def _without_punctuation(word: str) -> str:
    bare = word.strip("".join(sign for sign in set(word) if _is_punctuation(sign) and sign not in "-.")).rstrip(".")
    number = _NUMBER.fullmatch(bare)
    if number and (number["whole"] or number["part"]):
        whole, part = (number["whole"] or "").replace(",", "").lstrip("0") or "0", (number["part"] or "").rstrip("0")
        shown = f"{whole}.{part}" if part else whole
        return shown if shown == "0" else number["sign"].strip("+") + shown
    return "".join(sign for sign in word if not _is_punctuation(sign))


def _is_punctuation(sign: str) -> bool:
    """Unicode's, and the signs that ASCII has beside it, as in SQuAD's list."""
    return unicodedata.category(sign).startswith("P") or sign in "$+<=>^`|~"


def exact_hits(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Which answers equal their reference once the space around both is dropped."""
    return [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]


def normalised_hits(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Which answers equal their reference once both are `normalised`."""
    return [normalised(answer) == normalised(reference) for answer, reference in zip(answers, references, strict=True)]


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Share of answers equal to their reference once the space around both is dropped; None for no rows."""
    if len(answers) != len(references):
        raise AssertionError("an answer for every reference")
    if not references:
        return None
    return sum(exact_hits(answers, references)) / len(references)
