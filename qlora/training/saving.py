"""What a checkpoint holds, and when one is written.

The files are those that transformers' trainer resumes from, so that its own code restores them: adapter, optimizer, schedule,
random numbers, counters. It would write them in place and half; here they go where `qlora.training.checkpoints` wants them.
"""

from __future__ import annotations

import errno
import io
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from qlora.errors import DivergedError, OutputError
from qlora.training.recovery import is_out_of_memory, release

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from qlora.training.trainer import AdapterTrainer

ADAPTER = "adapter_model.safetensors"


def random_state() -> dict[str, Any]:
    """Where all the generators of random numbers are, in the form of the trainer's rng_state.pth."""
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Back to where `random_state` found them."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def write_state(trainer: AdapterTrainer, folder: Path) -> None:
    """Everything that the trainer needs to go on from here. A memory error on the way is answered once, by making room.

    Raises:
        OSError: a file cannot be written.
        DivergedError: a weight is not finite; nothing is written.
    """
    refuse_non_finite(trainer.model)
    try:
        _write_files(trainer, folder)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release(error)
    else:
        return
    try:
        _write_files(trainer, folder)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OSError(errno.ENOMEM, "memory ran out while writing") from error


def _write_files(trainer: AdapterTrainer, folder: Path) -> None:
    save_adapter_files(trainer.model, folder)
    _save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    _save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
    if trainer.accelerator.scaler is not None:
        _save(trainer.accelerator.scaler.state_dict(), folder / "scaler.pt")
    _save(random_state(), folder / "rng_state.pth")
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


def save_adapter_files(model: PeftModel, folder: Path) -> None:
    """The adapter as PEFT writes it.

    Raises:
        OSError: it cannot be written.
    """
    # The adapter's own tensors alone: PEFT would else ask every 4-bit layer for its state, and streamed ones have none at hand.
    adapter = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        model.save_pretrained(str(folder), state_dict=adapter, save_embedding_layers=False)
    except SafetensorError as error:  # it tells a full disk in words only
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put the weights of a checkpoint into the model; their type stays the model's."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / ADAPTER))


def _save(state: Any, path: Path) -> None:
    """By way of memory: torch's own file writer reports a full disk as an error of its archive."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getbuffer())


def refuse_non_finite(model: PeftModel) -> None:
    """A broken adapter is never saved as if it were good.

    Raises:
        DivergedError: names the first weight that is not finite.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise DivergedError(
                f"The adapter weight {name} is not finite, so it was not saved.",
                "Checkpoints before this are intact. Lower train.learning_rate and start again with --fresh.",
            )


class Saver(TrainerCallback):
    """Decides when a checkpoint is due, and has it written once everything of that step is known.

    Args:
        write: makes a checkpoint of the trainer as it is now; OutputError where it cannot.
        tell: told one line when a checkpoint could not be written; training goes on, and the next one is tried.
        every: steps between checkpoints; 0 for none but the last.
        minutes: time between them, whatever the steps; 0 for any.
        is_best: whether the evaluation that has just been made is the best so far and to be kept.
        wants_to_stop: whether somebody asked the run to stop after this step.
    """

    def __init__(
        self, write: Callable[[], None], *, tell: Callable[[str], None], every: int, minutes: float,
        is_best: Callable[[], bool], wants_to_stop: Callable[[], bool],
    ):
        self.write, self.tell, self.every, self.minutes = write, tell, every, minutes
        self.is_best, self.wants_to_stop = is_best, wants_to_stop
        self._due = False
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        stop = self.wants_to_stop()
        if stop:
            control.should_training_stop = True
        waited = self.minutes and time.monotonic() - self._last >= 60 * self.minutes
        at_interval = self.every and state.global_step % self.every == 0
        self._due = bool(stop or waited or at_interval or state.global_step >= state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **_: Any,
    ) -> None:
        if "loss" in (logs or {}) and not control.should_evaluate:
            self._write_if_due()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._due = self._due or self.is_best()
        self._write_if_due()

    def _write_if_due(self) -> None:
        if not self._due:
            return
        self._due = False
        try:
            self.write()
        except OutputError as error:
            if self.wants_to_stop():
                raise
            self.tell(f"{error.problem} Training goes on, and the next checkpoint is tried again.")
        self._last = time.monotonic()
