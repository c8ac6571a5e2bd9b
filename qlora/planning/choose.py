"""Turn every `auto` of a recipe into a value, in the order in which the values depend on each other.

Whatever a person fixes stays fixed, and the rest is fitted around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qlora import guidance
from qlora.errors import RecipeError
from qlora.hardware import Device, usable_bytes
from qlora.planning.plan import Decision
from qlora.precision import Precision
from qlora.recipe import Recipe
from qlora.units import GIB, format_bytes, parse_size

_BATCH = 16
_MIN_STEPS = 20
_NUM_EVALUATIONS = 5


@dataclass(frozen=True)
class Facts:
    """What the choices rest on: the machine, the model and the data, all looked at before."""

    device: Device
    precision: Precision
    num_parameters: int
    num_train_rows: int
    num_validation_rows: int
    max_length: int
    max_length_reason: str
    data_format: str
    data_format_reason: str


def budget_of(recipe: Recipe, device: Device) -> int:
    """Bytes the run may take: the recipe's budget, or all of the device.

    Raises:
        HardwareError: the GPU is smaller than the budget.
    """
    if recipe.memory.budget == "auto":
        return device.memory_bytes
    return usable_bytes(device, parse_size(recipe.memory.budget))


def choose(recipe: Recipe, facts: Facts) -> tuple[dict[str, Decision], int]:
    """A decision for every setting of the recipe but hub and output, and the number of optimizer steps.

    Raises:
        RecipeError: fixed values that contradict each other.
    """
    decisions = _as_written(recipe)
    chosen: dict[str, tuple[Any, str, str]] = {}
    on_gpu = facts.device.kind == "cuda"
    budget_bytes = budget_of(recipe, facts.device)

    chosen["model.dtype"] = (facts.precision.compute, "rule", facts.precision.reason)
    chosen["model.attention"] = ("sdpa", "rule", "torch's own kernels; never stores the length x length scores on a GPU")
    chosen["data.format"] = (facts.data_format, "derived", facts.data_format_reason)
    chosen["data.validation"] = (f"{facts.num_validation_rows:,} rows", "rule", "5 % of the rows, at least 8 and at most 256")
    chosen["data.max_length"] = (facts.max_length, "derived", facts.max_length_reason)
    chosen["memory.device"] = (facts.device.kind, "derived", f"{facts.device.name}")
    size = f"{format_bytes(budget_bytes)}, all of the {'card' if on_gpu else 'RAM'}"
    chosen["memory.budget"] = (f"{budget_bytes / GIB:.2f}GiB", "derived", size)
    checkpointing = "recomputing saves memory, which a GPU is short of" if on_gpu else "off on a CPU: RAM is plentiful, time is not"
    chosen["memory.checkpointing"] = (on_gpu, "rule", checkpointing)

    rank = guidance.choose_rank(facts.num_train_rows, facts.num_parameters, budget_bytes if on_gpu else None)
    chosen["lora.r"] = (rank.value, "rule", rank.reason)
    r = recipe.lora.r if recipe.lora.r != "auto" else rank.value
    alpha = guidance.choose_alpha(recipe.lora.alpha, r)
    if isinstance(recipe.lora.alpha, str):
        chosen["lora.alpha"] = (alpha.value, "rule", alpha.reason)
    rate = guidance.choose_learning_rate(r, alpha.value)
    chosen["train.learning_rate"] = (rate.value, "rule", rate.reason)
    chosen["train.optimizer"] = _optimizer(budget_bytes, on_gpu)

    batch, micro_batch, accumulation = _batch(recipe, facts, budget_bytes)
    chosen["train.batch"], chosen["train.micro_batch"], chosen["train.accumulation"] = batch, micro_batch, accumulation
    num_steps = _num_steps(recipe, facts.num_train_rows, micro_batch[0], accumulation[0])
    evaluations = _evaluations(facts, num_steps)
    chosen["train.eval_every"] = evaluations
    every = recipe.train.eval_every if recipe.train.eval_every != "auto" else evaluations[0]
    chosen["train.save_every"] = _checkpoints(every, num_steps)

    for key, (value, source, reason) in chosen.items():
        if decisions[key].value in ("auto", "conservative", "standard", "aggressive"):
            decisions[key] = Decision(value, source, reason)
    return decisions, num_steps


def _as_written(recipe: Recipe) -> dict[str, Decision]:
    decisions = {}
    for section in ("model", "data", "lora", "train", "memory"):
        values = getattr(recipe, section)
        for name, field in type(values).model_fields.items():
            given = recipe.is_given(f"{section}.{name}")
            reason = "given" if given else f"default: {_clause(field.description)}"
            decisions[f"{section}.{name}"] = Decision(getattr(values, name), "given" if given else "default", reason)
    return decisions


def _clause(help: str) -> str:
    """The first sentence of a setting's help, to go on with after a colon; names such as AdamW keep their capitals."""
    sentence = help.split(". ")[0].rstrip(".")
    first = sentence.split()[0]
    keeps = first in ("Python", "AdamW's") or first.isupper()
    return sentence if keeps else sentence[0].lower() + sentence[1:]


def _optimizer(budget_bytes: int, on_gpu: bool) -> tuple[str, str, str]:
    if on_gpu and budget_bytes < 8 * GIB:
        return "adamw_8bit", "rule", "8-bit state leaves more of a small card to activations"
    return "adamw", "rule", "the state of LoRA weights is small; full precision costs little"


def _batch(recipe: Recipe, facts: Facts, budget_bytes: int) -> tuple[tuple[int, str, str], ...]:
    """batch = micro_batch x accumulation, with up to two of the three fixed by the recipe."""
    fixed = {name: getattr(recipe.train, name) for name in ("batch", "micro_batch", "accumulation")
             if getattr(recipe.train, name) != "auto"}
    rows = max(1, facts.num_train_rows)
    if "batch" in fixed:
        batch = (fixed["batch"], "given", "given")
    elif {"micro_batch", "accumulation"} <= fixed.keys():
        batch = (fixed["micro_batch"] * fixed["accumulation"], "derived", "micro_batch x accumulation")
    else:
        passes = rows * recipe.train.epochs
        largest = 2 ** int(math.log2(max(1, passes / _MIN_STEPS)))
        value = min(_BATCH, largest, rows)
        reason = f"{_BATCH} rows steady the gradient" if value == _BATCH else f"fewer than {_BATCH}, so that {rows} rows make about {_MIN_STEPS} steps"
        for name in ("micro_batch", "accumulation"):
            if name in fixed:
                value = max(1, round(value / fixed[name])) * fixed[name]
                reason = f"the multiple of {name} {fixed[name]} nearest to what the data asks for"
        batch = (value, "rule", reason)
    if "micro_batch" in fixed:
        micro = (fixed["micro_batch"], "given", "given")
    elif "accumulation" in fixed:
        micro = (_whole(batch[0], fixed["accumulation"], "accumulation"), "derived", "batch / accumulation")
    elif recipe.data.packing:
        micro = (1, "rule", "a packed sequence is full already")
    else:
        limit, reason = _micro_limit(facts, budget_bytes)
        micro = (max(d for d in range(1, min(limit, batch[0]) + 1) if batch[0] % d == 0), "rule", reason)
    accumulation = (_whole(batch[0], micro[0], "micro_batch"), "derived", "batch / micro_batch")
    if "accumulation" in fixed:
        accumulation = (fixed["accumulation"], "given", "given")
    return batch, micro, accumulation


def _whole(batch: int, part: int, name: str) -> int:
    if batch % part:
        raise RecipeError(f"train.batch is {batch}, which train.{name} {part} does not divide.",
                          f"Make train.batch a multiple of {part}, or leave train.{name} out.")
    return batch // part


def _micro_limit(facts: Facts, budget_bytes: int) -> tuple[int, str]:
    """Rows at once by the memory at hand; small on purpose, since accumulation gives the same gradient."""
    if facts.device.kind == "cpu":
        return 8, "8 rows keep the cores of a CPU busy"
    for at_least, rows in ((24, 4), (12, 2)):
        if budget_bytes >= at_least * GIB * 0.95:  # a "24 GB" card reports a little less
            return rows, f"{rows} rows at once with {format_bytes(budget_bytes)}; accumulation makes up the rest"
    return 1, f"one row at once with {format_bytes(budget_bytes)}; accumulation makes up the rest"


def _num_steps(recipe: Recipe, num_rows: int, micro_batch: int, accumulation: int) -> int:
    """Optimizer steps as the trainer counts them: a last, partial window of an epoch is a step too."""
    per_epoch = math.ceil(math.ceil(num_rows / micro_batch) / accumulation)
    steps = max(1, math.ceil(per_epoch * recipe.train.epochs))
    return steps if recipe.train.max_steps is None else recipe.train.max_steps


def _evaluations(facts: Facts, num_steps: int) -> tuple[int, str, str]:
    if not facts.num_validation_rows:
        return 0, "derived", "there are no held-out rows"
    every = max(1, math.ceil(num_steps / _NUM_EVALUATIONS))
    return every, "rule", f"about {_NUM_EVALUATIONS} evaluations a run; this one has {num_steps:,} steps"


def _checkpoints(eval_every: int, num_steps: int) -> tuple[int, str, str]:
    if eval_every:
        return eval_every, "derived", "at each evaluation, so that the best one is on disk"
    every = max(1, math.ceil(num_steps / _NUM_EVALUATIONS))
    return every, "rule", f"about {_NUM_EVALUATIONS} checkpoints a run; this one has {num_steps:,} steps"
