"""One line of metrics.jsonl for each step and each evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from qlora.guidance import effective_learning_rate
from qlora.hardware import Device, used_memory_bytes

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from qlora.training.monitor import Monitor
    from qlora.training.trainer import AdapterTrainer

_LARGEST = 700.0  # a loss whose exponential is still a number


class RowWriter(TrainerCallback):
    """Turns the trainer's events into the lines of metrics.jsonl.

    Attributes:
        seconds_before: training time of earlier sessions of this run.
        takes_rate: settings were changed by force, so the checkpoint's learning rate does not count.
        monitor: what fills in its own part of the rows; None where nobody looks.
    """

    def __init__(self, trainer: AdapterTrainer, on_row: Callable[[dict[str, Any]], None], device: Device):
        self.trainer, self.on_row, self.device = trainer, on_row, device
        self.seconds_before = 0.0
        self.takes_rate = False
        self.monitor: Monitor | None = None
        self.last_step_seconds = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter() - self.seconds_before
        if self.takes_rate:
            self.trainer.take_rate()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.begin_step()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.count_skipped_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.last_step_seconds = time.perf_counter() - self.trainer.step.started
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True  # so that the last step can be the best one

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: Mapping[str, float] | None = None, **_: Any,
    ) -> None:
        logs = logs or {}
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            step, rate = self.trainer.step, logs.get("learning_rate")
            lora = self.trainer.model.peft_config["default"]
            row.update(
                loss=logs["loss"], perplexity=math.exp(logs["loss"]) if logs["loss"] < _LARGEST else None,
                grad_norm=logs.get("grad_norm"), learning_rate=rate,
                effective_learning_rate=None if rate is None else effective_learning_rate(rate, lora.r, lora.lora_alpha),
                token_accuracy=logs.get("mean_token_accuracy", step.correct_tokens / max(1, step.trained_tokens)),
                tokens=step.tokens, trained_tokens=step.trained_tokens,
                tokens_per_second=round(step.tokens / max(1e-9, self.last_step_seconds), 1),
                seconds=round(time.perf_counter() - self.began, 3), memory_bytes=used_memory_bytes(self.device),
            )
        elif "eval_loss" in logs:
            row.update({key: logs[key] for key in ("eval_loss", "eval_perplexity", "eval_tokens")})
        else:
            return
        if self.monitor is not None:
            row.update(self.monitor.fields(row))
        self.on_row(row)
