#!/usr/bin/env python3
"""What looking at a run costs: the same training with and without looks, in turns, and the time that looks take inside.

    python scripts/bench_monitor.py                                    the quickstart's model and rows
    python scripts/bench_monitor.py --config CONFIG.json --steps 20    a model of a config, with random weights
    python scripts/bench_monitor.py --device cuda

Prints a Markdown table. On a CPU the time is that of the processor, so that other programs do not count. A look is timed from
inside; its share of a run is that of a step divided by the steps between two looks that `train.monitor_every: auto` takes at the
least (10), which is what runs of up to 500 steps spend; longer ones look less often. The norms of the frozen weights are taken
once a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora import _compat

_compat.prepare_environment()
_compat.quieten_libraries()

import torch

from qlora.planning.choose import _STEPS_BETWEEN_LOOKS
from qlora.planning.plan import Decision
from qlora.progress import Progress
from qlora.recipe import build_recipe
from qlora.training.building import build_model
from qlora.training.run import frozen_norms, watch_adapters
from qlora.training.setup import Setup, prepare
from qlora.training.stages import assemble, verify

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timed:
    """Seconds of one training run, steps one by one, of all its looks, and of the check of the base before it."""

    steps: list[float]
    looks: float
    verify: float


def main() -> int:
    """Print the table; returns 0."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(recipe(arguments, Path(folder)))
        turns = [(run(setup, arguments.steps, 0, Path(folder)), run(setup, arguments.steps, 1, Path(folder)))
                 for _ in range(arguments.repeat)]
    off = [statistics.median(alone.steps[1:]) for alone, _ in turns]
    on = [statistics.median(watched.steps[1:]) for _, watched in turns]
    inside = [watched.looks / len(watched.steps) for _, watched in turns]
    step, look, norms = map(statistics.median, (off, inside, [watched.verify - alone.verify for alone, watched in turns]))
    more = statistics.median(b - a for a, b in zip(off, on, strict=True))
    settings = setup.plan.settings
    name = arguments.config.stem if arguments.config else setup.recipe.model.base
    print(f"{name}, {setup.architecture.num_layers} layers, "
          f"r {settings['lora.r']}, {settings['train.batch']} rows a step ({settings['train.micro_batch']} at once), "
          f"{setup.device.name}, {arguments.threads} threads, median of {arguments.repeat} turns of {arguments.steps} steps\n")
    print("| | time | of a step | of a run at auto |\n| --- | --- | --- | --- |")
    print(f"| a step | {1000 * step:.1f} ms | | |")
    for name, seconds in (("a look, timed inside", look), ("a step with a look, less one without", more)):
        share = 100 * seconds / step
        print(f"| {name} | {1000 * seconds:.2f} ms | {share:.2f} % | {share / _STEPS_BETWEEN_LOOKS:.2f} % |")
    print(f"| norms of the frozen weights, once | {1000 * max(0.0, norms):.0f} ms | | |")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="a config.json; its model gets random weights and a stand-in tokenizer")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a turn")
    parser.add_argument("--repeat", type=int, default=5, help="turns of each kind")
    parser.add_argument("--batch", type=int, default=None, help="rows of a step")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def recipe(arguments: argparse.Namespace, folder: Path) -> Any:
    """The quickstart's recipe, over another model where one is asked for."""
    model: dict[str, Any] = {"base": "builtin:tiny"}
    if arguments.config:
        base = folder / "model"
        base.mkdir()
        config = json.loads(arguments.config.read_text(encoding="utf-8"))
        (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model = {"base": str(base), "weights": "random"}
    train = {"learning_rate": 3e-3, "sample_rows": 0, "eval_every": 0} | ({"batch": arguments.batch} if arguments.batch else {})
    data = {"path": str(_ROOT / "recipes" / "data" / "quickstart.jsonl"), "validation": 0.1}
    return build_recipe(model=model, data=data, train=train, memory={"device": arguments.device}, output=str(folder / "run"))


def run(setup: Setup, steps: int, every: int, folder: Path) -> Timed:
    """Train from the beginning, with a look every so many steps."""
    clock = time.process_time if setup.device.kind == "cpu" else time.perf_counter
    chosen = {"train.max_steps": steps, "train.monitor_every": every}
    decisions = setup.plan.decisions | {key: Decision(value, "given", "given") for key, value in chosen.items()}
    setup = replace(setup, plan=replace(setup.plan, decisions=decisions, num_steps=steps))
    model, engine = build_model(setup, Progress())
    norms, rows = frozen_norms(setup, model), []
    started = clock()
    verify(setup, model, engine, norms.beside)
    verified = clock() - started

    def on_row(row: dict[str, Any]) -> None:
        if "loss" in row:
            ends.append(clock())
            rows.append(row)

    trainer = assemble(setup, model, engine, folder, on_row=on_row)
    watch_adapters(setup, trainer, norms, rows, lambda line: None)
    monitor = trainer.row_writer.monitor
    if monitor:
        monitor.clock = clock
    ends = [clock()]
    trainer.train()
    engine.close()
    return Timed([after - before for before, after in zip(ends, ends[1:])], monitor.seconds if monitor else 0.0, verified)


if __name__ == "__main__":
    sys.exit(main())
