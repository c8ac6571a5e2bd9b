"""What is remembered of an optimizer step while it is under way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora.training.saving import random_state

if TYPE_CHECKING:
    import torch


@dataclass
class Step:
    """The optimizer step under way; made anew at each step's begin.

    Attributes:
        inputs: its micro-batches so far, and `random` where the random numbers were before the first: what it takes to run it
            once more.
        losses: of micro-batches that have been done ahead of the trainer's asking.
        correct_tokens: of the trained ones, where the engine's loss counts them; TRL's tells by itself.
    """

    started: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    trained_tokens: int = 0
    correct_tokens: int = 0
    micro_batches: int = 0
    inputs: list[dict[str, Any]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    random: dict[str, Any] = field(default_factory=random_state)
