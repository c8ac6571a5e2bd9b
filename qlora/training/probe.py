"""Try the plan out before the long run: the worst batch that this very data can make goes through everything a run does.

Two optimizer steps, a batch of evaluation, a batch of answers and a checkpoint, under the cap of the plan. Afterwards weights and
random numbers are what they were, so a run that was tried out equals one that was not, to the last bit.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import safetensors.torch
import torch

from qlora.errors import DivergedError
from qlora.generation import answer, longest_answer, rows_at_once
from qlora.training.recovery import Ladder, is_out_of_memory, release
from qlora.training.saving import random_state, set_random_state, write_state
from qlora.training.stages import in_smaller_batches
from qlora.training.trainer import AdapterTrainer, as_dataset, build_trainer

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from qlora.data import TokenRow
    from qlora.engine.install import Engine
    from qlora.training.setup import Setup

NUM_STEPS = 2  # optimizer state is there from the second on
_NUM_MICRO_BATCHES = 2  # gradients are there from the second on
WRITTEN_TOKENS = 2  # the prompt is made longer by the rest of an answer, instead of writing it word by word


class Meter(Protocol):
    """`qlora.training.meter.MemoryMeter`, or what measures in its place on a CPU."""

    def during(self, phase: str) -> AbstractContextManager[None]: ...


def probe(
    setup: Setup, model: PeftModel, engine: Engine, ladder: Ladder, folder: Path, meter: Meter, tell: Callable[[str], None]
) -> None:
    """Go through everything with the longest rows, one rung of the ladder lower each time that memory runs out.

    Phases are measured by their plain names as planned, and as "train@1" and so on on lower rungs.

    Args:
        folder: the run folder; what is written there is removed again.

    Raises:
        HardwareError: memory runs out on the last rung too.
        OutputError, OSError: the checkpoint cannot be written.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = safetensors.torch.save({name: p.data for name, p in trainable.items()})  # bytes: no tensors that would be measured
    state, was_training = random_state(), model.training
    try:
        while True:
            rung = ladder.rung
            try:
                _go_through(
                    setup, model, engine, ladder, folder, lambda phase: meter.during(f"{phase}@{rung}" if rung else phase), tell
                )
            except DivergedError:
                return  # training will meet it, and say in which step
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                release(error)
            else:
                return
            tell(ladder.step_down("on the longest rows, which are tried out first"))
    finally:
        model.zero_grad()
        for name, tensor in safetensors.torch.load(weights).items():
            trainable[name].data.copy_(tensor)
        model.train(was_training)
        gc.collect()
        if setup.device.kind == "cuda":
            torch.cuda.empty_cache()
        set_random_state(state)


def _go_through(
    setup: Setup, model: PeftModel, engine: Engine, ladder: Ladder, folder: Path, during: Callable[[str], AbstractContextManager[None]],
    tell: Callable[[str], None],
) -> None:
    scratch = folder / ".trial"
    with during("train"):
        trainer = _trainer(setup, model, engine, ladder, folder)
        trainer.train()
    try:
        if setup.data.validation:
            with during("eval"):
                trainer.measure(as_dataset(longest(setup.data.validation, _rows_at_once(setup, engine))))
        if setup.data.samples:
            with during("generate"):
                _generate(setup, model, tell)
        with during("save"):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            write_state(trainer, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the run's own trainer wraps it again
        trainer.accelerator.free_memory()


def _trainer(setup: Setup, model: PeftModel, engine: Engine, ladder: Ladder, folder: Path) -> AdapterTrainer:
    """The run's own trainer, over the worst batch again and again. At a learning rate of 0 nothing can get out of hand."""
    settings = setup.plan.settings
    # Where the engine takes several micro-batches through a layer at once, it is all of them that need room.
    accumulation = settings["train.accumulation"]
    if engine.schedule is None or engine.schedule.at_once == 1:
        accumulation = min(_NUM_MICRO_BATCHES, accumulation)
    trainer = build_trainer(
        model, setup.tokenizer, _worst_batches(setup, NUM_STEPS * accumulation), None, folder=folder, ladder=ladder,
        settings={**settings, "train.accumulation": accumulation, "train.max_steps": NUM_STEPS, "train.epochs": 1,
                  "train.learning_rate": 0.0, "train.eval_every": 0, "train.report_to": ()},
        precision=setup.precision, device=setup.device, num_steps=NUM_STEPS,
        engine=engine,
    )
    trainer.may_step_down = False  # a lower rung is tried from the beginning
    trainer.args.train_sampling_strategy = "sequential"  # shuffled, a batch might have the longest row several times
    return trainer


def _rows_at_once(setup: Setup, engine: Engine) -> int:
    """Of evaluation: a micro-batch, or as many as the engine takes through a layer at once."""
    settings = setup.plan.settings
    num_batches = (engine.schedule.at_once or settings["train.accumulation"]) if engine.schedule is not None else 1
    return settings["train.micro_batch"] * num_batches


def _worst_batches(setup: Setup, count: int) -> Dataset:
    """A micro-batch of the longest rows, or of the fullest packs, `count` times."""
    settings, rows = setup.plan.settings, setup.data.train
    if not settings["data.packing"]:
        return as_dataset(longest(rows, settings["train.micro_batch"]) * count)
    packs = as_dataset(rows, pack_to=setup.data.max_length)
    lengths = [len(ids) for ids in packs["input_ids"]]
    fullest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[: settings["train.micro_batch"]]
    return packs.select(fullest * count)


def longest(rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
    """The `count` longest rows; some of them twice where there are not so many."""
    ranked = sorted(rows, key=lambda row: len(row.input_ids), reverse=True)
    return [ranked[i % len(ranked)] for i in range(count)]


def answer_tokens(setup: Setup) -> int:
    """How long the answers are that a run writes: as the longest reference, and a little more."""
    return longest_answer([sample.reference for sample in setup.data.samples], setup.tokenizer)


def _generate(setup: Setup, model: PeftModel, tell: Callable[[str], None]) -> None:
    """A batch of the longest prompts, each as long as it is when its answer is almost written."""
    num_new = answer_tokens(setup)
    written = min(WRITTEN_TOKENS, num_new)
    prompts = sorted((sample.prompt_ids for sample in setup.data.samples), key=len, reverse=True)
    length = len(prompts[0])

    def attempt(num_tokens: int) -> list[str]:
        grown = [_grow(prompt, length + num_new - written) for prompt in prompts[: rows_at_once(length, num_new, num_tokens)]]
        return answer(model, setup.tokenizer, grown, max_new_tokens=written, stop_ids=[], tokens_per_batch=num_tokens)

    in_smaller_batches(attempt, setup.plan.settings["memory.generation_tokens"], tell)


def _grow(prompt: Sequence[int], length: int) -> list[int]:
    """The prompt again and again, to that length."""
    return (list(prompt) * (length // len(prompt) + 1))[:length]
