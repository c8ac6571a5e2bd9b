"""This project as a contender: the functions that `qlora train` calls, over the work's rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comparing.contenders import Contender
from comparing.work import Work

from qlora.progress import Progress


def make_trainer(contender: Contender, work: Work, max_steps: int, spent: dict[str, float]) -> Any:
    """Plan, build and assemble; all that is not part of the work is for the plan to decide.

    Args:
        spent: gets the seconds of each stage.
    """
    from datasets import Dataset

    from qlora.recipe import build_recipe
    from qlora.training.building import build_model
    from qlora.training.setup import prepare
    from qlora.training.trainer import build_trainer

    settings = {
        "data.format": "text", "data.max_length": work.length, "data.validation": 0.05, "lora.r": work.rank,
        "lora.alpha": work.rank,
        "train.micro_batch": work.micro_batch, "train.accumulation": 1, "train.learning_rate": work.learning_rate,
        "train.schedule": "constant", "train.warmup": 0, "train.weight_decay": 0, "train.optimizer": "adamw",
        "train.seed": work.seed,
        "train.eval_every": 0, "train.save_every": 0, "train.max_steps": max_steps, **contender.settings,
    }
    recipe = build_recipe(overrides=[f"{name}={_text(value)}" for name, value in settings.items()], model=str(work.checkpoint),
                          data=str(work.text_file))
    progress = _Timed(spent, {str(work.checkpoint): "the base", str(work.text_file): "the rows"})
    setup = prepare(recipe, progress)
    model, engine = build_model(setup, progress)
    rows = work.rows()
    return build_trainer(
        model, setup.tokenizer, Dataset.from_dict({"input_ids": rows, "labels": rows}), None,
        folder=Path(work.folder) / contender.name, settings=setup.plan.settings,
        precision=setup.precision, device=setup.device, num_steps=max_steps, engine=engine,
    )


class _Timed(Progress):
    """Notes how long each stage takes; in one that others are inside of, these are counted again. Paths get names."""

    def __init__(self, spent: dict[str, float], names: Mapping[str, str]):
        self._spent, self._names = spent, names

    @contextmanager
    def stage(self, text: str, *, in_bytes: bool = False, bar: bool = True) -> Iterator[Callable[[int, int], None]]:
        began = time.perf_counter()
        yield lambda done, total: None
        for path, name in self._names.items():
            text = text.replace(path, name)
        self._spent[text] = self._spent.get(text, 0.0) + time.perf_counter() - began


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
