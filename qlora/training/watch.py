"""Look at the free memory between steps, and step down before another process makes a step fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from qlora.hardware import Device, free_memory_bytes, used_memory_bytes
from qlora.units import format_bytes

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from qlora.training.trainer import AdapterTrainer

_SECONDS_BETWEEN = 1.0


class MemoryWatch(TrainerCallback):
    """Steps down when what this process holds and what is free no longer add up to what the plan needs.

    Args:
        needed: bytes that the run takes at its highest on a rung, counted as `used_memory_bytes` counts.
    """

    def __init__(self, trainer: AdapterTrainer, device: Device, needed: Callable[[int], int]):
        self.trainer, self.device, self.needed = trainer, device, needed
        self._looked = -_SECONDS_BETWEEN
        self._warned = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN:
            return
        self._looked = now
        ladder = self.trainer.ladder
        within_reach = used_memory_bytes(self.device) + free_memory_bytes(self.device)
        if self.needed(ladder.rung) <= within_reach:
            return
        rungs = [rung for rung in range(ladder.rung + 1, ladder.num_rungs) if self.needed(rung) <= within_reach]
        short = f"another process has taken memory: {format_bytes(within_reach)} are within reach, and the plan needs " \
                f"{format_bytes(self.needed(ladder.rung))}"
        if rungs:
            self.trainer.go_to_rung(rungs[0], f"before step {state.global_step + 1}, because {short}")
        elif not self._warned:
            self._warned = True
            self.trainer.tell(f"Memory gets short before step {state.global_step + 1}: {short}. Nothing smaller would fit either, "
                              "so the run goes on as it is for as long as it can.")
