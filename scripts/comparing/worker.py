"""One contender in a process of its own. It trains up to where it is told, and waits.

Told on standard input, a line each: `steps N` trains so many steps, `stop` ends the process. It answers on standard output with
one line of JSON each; whatever the libraries print goes to standard error. Seconds of the start are counted from when the process
was asked for, on the clock that all processes of a machine share.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from comparing.contenders import CONTENDERS, OURS, Contender
from comparing.work import Work

_METERED_STEPS = 2  # the optimizer's state is there from the second on


def main() -> int:
    """Run the worker; returns 0."""
    options = _parse()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contender = next(each for each in CONTENDERS if each.name == options.contender)
    work = Work(**json.loads(options.work))
    os.chdir(work.folder)
    _import_all(contender)
    _answer(answers, event="imported", seconds=time.monotonic() - options.asked_at)
    if options.meter:
        _answer(answers, event="memory", **_metered(contender, work))
        return 0
    spent: dict[str, float] = {}
    trainer = make_trainer(contender, work, max_steps=10**6, spent=spent)
    _answer(answers, event="built", seconds=time.monotonic() - options.asked_at, stages=spent)
    trainer.add_callback(_gate(answers, options.asked_at))
    trainer.train()
    return 0


def make_trainer(contender: Contender, work: Work, max_steps: int, spent: dict[str, float] | None = None) -> Any:
    """A trainer of transformers' kind over the work's rows, in their order.

    Args:
        spent: gets the seconds of each stage, where they are known.
    """
    if contender.kind == OURS:
        from comparing.ours import make_trainer
    else:
        from comparing.plain import make_trainer
    trainer = make_trainer(contender, work, max_steps, {} if spent is None else spent)
    trainer.args.train_sampling_strategy = "sequential"
    return trainer


def _import_all(contender: Contender) -> None:
    """What the contender's program imports before it does anything."""
    if contender.kind == OURS:
        from qlora import _compat

        _compat.prepare_environment()
        _compat.quieten_libraries()
    for name in ("torch", *(contender.needs or ("transformers", "peft", "bitsandbytes", "qlora.training.trainer"))):
        importlib.import_module(name)


def _gate(answers: TextIO, asked_at: float) -> Any:
    """A callback that lets the trainer go on as far as it is told."""
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        left, began = 1, 0.0  # the first step is not waited for: it ends the start
        steps: list[dict[str, float]] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self.left == 0:
                self.left = _told(answers)
            self.began, self.cpu_began = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds, of_cpu = time.perf_counter() - self.began, time.process_time() - self.cpu_began
            self.steps.append({"seconds": seconds, "cpu_seconds": of_cpu, "ended": time.monotonic() - asked_at})
            self.left -= 1

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs and self.steps and "loss" not in self.steps[-1]:
                self.steps[-1]["loss"] = float(logs["loss"])
                if self.left == 0:
                    _answer(answers, event="block", steps=self.steps)
                    self.steps = []

    return Gate()


def _told(answers: TextIO) -> int:
    """The number of steps to go on with. There is nothing to tidy up at the end, so the process just ends."""
    word, _, number = sys.stdin.readline().strip().partition(" ")
    if word == "steps":
        return int(number)
    _answer(answers, event="end", peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    os._exit(0)


def _metered(contender: Contender, work: Work) -> dict[str, Any]:
    """The most that tensors took while loading and while training, in bytes."""
    import torch

    if torch.cuda.is_available():
        trainer = make_trainer(contender, work, _METERED_STEPS)
        loaded = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return {"load": loaded, "train": torch.cuda.max_memory_allocated()}
    from qlora.training.cpu_memory import TensorMeter

    meter = TensorMeter()
    with meter.watching():
        with meter.during("load"):
            trainer = make_trainer(contender, work, _METERED_STEPS)
        with meter.during("train"):
            trainer.train()
    return dict(meter.allocated)


def _answer(answers: TextIO, **words: Any) -> None:
    answers.write(json.dumps(words) + "\n")
    answers.flush()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender")
    parser.add_argument("--work", required=True, help="JSON")
    parser.add_argument("--asked-at", type=float, required=True, help="time.monotonic() of whoever asks")
    parser.add_argument("--meter", action="store_true", help="measure tensors instead, in a few steps")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
