"""Turn every `auto` of a recipe into a value, in the order in which the values depend on each other.

Whatever a person fixes stays fixed, and the rest is fitted around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qlora import guidance
from qlora.engine.placement import Placement
from qlora.errors import RecipeError
from qlora.guidance import Choice
from qlora.hardware import Device
from qlora.planning.placements import placements_for, residents_for
from qlora.planning.plan import Decision
from qlora.planning.search import Found, Options, last_ranks
from qlora.precision import Precision
from qlora.recipe import Recipe
from qlora.units import GIB

_BATCH = 16
_MIN_STEPS = 20
_NUM_EVALUATIONS = 5
_NUM_LOOKS, _STEPS_BETWEEN_LOOKS = 50, 10  # enough points for a plot; and at least so many steps apart
# Products of this many rows by thousands of columns keep every core of a GPU busy; more at once is hardly faster, and the room
# is better spent on keeping activations. What is left after that may go to rows, up to the second number.
_SATURATED_TOKENS, _SPARE_TOKENS = 2048, 8192
_CPU_ROWS = 8
_WORTH_KEEPING = 500_000_000  # parameters, from which on quantising takes longer than a person likes to wait

# Why the memory engine does nothing in some respect, and why it does something.
_PLAIN = {
    "streaming": "the model fits without it", "resident_layers": "all {layers} stay on the device",
    "streamed_layers": "all {layers} stay on the device", "stream_from": "nothing is streamed",
    "visit_micro_batches": "a layer is visited once a step, forward and back",
    "embedding_device": "beside the layers", "head_format": "as the loss wants it, in 16 bits",
    "offload_activations": "there is room for them on the device", "offload_adapters": "there is room for them on the device",
    "fused_lora": "PEFT's own backward pass fits", "dequantise_once": "a layer is not used often enough in a visit",
    "mlp_tile": "whole rows fit", "loss_chunk": "TRL's loss projects tokens in tiles, and never stores the logits of a batch",
}
_ENGINE = {
    "streaming": "the layers do not all fit on the device", "resident_layers": "as many as fit beside the rest",
    "visit_micro_batches": "RAM does not hold the hidden states of more",
    "streamed_layers": "the others take turns in two slots", "stream_from": "RAM holds them, and is faster than a disk",
    "embedding_device": "its rows are looked up where they are, and the table stays off the device",
    "head_format": "brought to the device tile by tile, because whole it does not fit beside the rest",
    "offload_activations": "hidden states wait in RAM for the backward pass",
    "offload_adapters": "they do not fit on the device either", "fused_lora": "keeps about half of what PEFT's backward pass does",
    "dequantise_once": "several micro-batches go through a layer in one visit",
    "mlp_tile": "the inner activations of an MLP do not fit for all tokens at once",
    "loss_chunk": "fewer logits at once than TRL's tiles",
}
_ON_CPU = {  # taken there wherever memory does not ask for more
    "loss_chunk": "on a CPU two products with the head a step, where TRL's loss takes three",
    "fused_lora": "on a CPU a backward pass of fewer operators is faster",
}


@dataclass(frozen=True)
class Facts:
    """What the choices rest on: the machine, the model and the data, all looked at before.

    Numbers of rows are None where there is no data. `attentions` are what the model class can run, best first. `streamable` says
    that layers can be brought to the device one by one, `stream_from` where they would wait.
    """

    device: Device
    budget_bytes: int
    budget_reason: str
    precision: Precision
    num_parameters: int
    num_layers: int
    attentions: tuple[str, ...]
    num_train_rows: int | None
    num_validation_rows: int | None
    max_length: int
    max_length_reason: str
    data_format: str
    data_format_reason: str
    tied_embeddings: bool = False
    streamable: bool = False
    stream_from: str = "disk"


def find_options(recipe: Recipe, facts: Facts) -> tuple[Options, Choice]:
    """What the search may choose from, and the number of rows of an optimizer step.

    Raises:
        RecipeError: fixed values that contradict each other.
    """
    on_gpu = facts.device.kind == "cuda"
    batch = _batch(recipe, facts)
    if recipe.lora.r != "auto":
        ranks: tuple[int, ...] = (recipe.lora.r,)
    else:
        most = _rank(facts).value
        ranks = tuple(r for r in (16, 32, 64) if r <= most)
    paged = ("paged_adamw_8bit",) if on_gpu else ()
    optimizer, checkpointing = recipe.train.optimizer, recipe.memory.checkpointing
    micro_batches = _micro_batches(recipe, facts, batch.value)
    rows_are_free = "auto" == recipe.train.micro_batch == recipe.train.accumulation and not recipe.data.packing
    spare = range(micro_batches[-1] + 1, min(_SPARE_TOKENS // facts.max_length, batch.value) + 1)
    options = Options(
        ranks=ranks,
        micro_batches=micro_batches,
        spare_micro_batches=tuple(n for n in spare if batch.value % n == 0) if rows_are_free and on_gpu else (),
        checkpointing=(True, False) if checkpointing == "auto" else (checkpointing,),
        optimizers=(*paged, "adamw_8bit", "adamw") if optimizer == "auto" else (optimizer,),
        max_length=facts.max_length,
        last_ranks=last_ranks(ranks[0]) if recipe.lora.r == "auto" else (),
        placements=placements_for(
            recipe, on_gpu=on_gpu, tied_embeddings=facts.tied_embeddings, num_layers=facts.num_layers,
            streamable=facts.streamable, stream_from=facts.stream_from, scaled_loss=facts.precision.autocast,
        ),
        num_resident=residents_for(recipe, facts.num_layers),
    )
    return options, batch


def choose(recipe: Recipe, facts: Facts, found: Found, batch: Choice) -> tuple[dict[str, Decision], int | None]:
    """A decision for every setting of the recipe but hub and output, and the number of optimizer steps.

    Args:
        found: what the search for memory settled.
        batch: from `find_options`.
    """
    decisions = _as_written(recipe)
    chosen: dict[str, tuple[Any, str, str]] = {}
    candidate, on_gpu = found.candidate, facts.device.kind == "cuda"

    chosen["model.dtype"] = (facts.precision.compute, "rule", facts.precision.reason)
    chosen["model.attention"] = _attention(facts)
    chosen["data.format"] = (facts.data_format, "derived", facts.data_format_reason)
    held_out = f"{facts.num_validation_rows:,} rows" if facts.num_validation_rows is not None else "5 %"
    chosen["data.validation"] = (held_out, "rule", "5 % of the rows, at least 8 and at most 256")
    chosen["data.max_length"] = (facts.max_length, "derived", facts.max_length_reason)
    chosen["memory.device"] = (facts.device.kind, "derived", f"{facts.device.name}")
    chosen["memory.budget"] = (f"{facts.budget_bytes / GIB:.2f}GiB", "derived", facts.budget_reason)
    chosen["memory.checkpointing"] = (candidate.checkpointing, "derived", found.reasons.get("checkpointing", ""))

    rank = _rank(facts)
    reason = rank.reason if candidate.r == rank.value else found.reasons.get("r", "")
    chosen["lora.r"] = (candidate.r, "rule" if candidate.r == rank.value else "derived", reason)
    alpha = guidance.choose_alpha(recipe.lora.alpha, candidate.r)
    if isinstance(recipe.lora.alpha, str):
        chosen["lora.alpha"] = (alpha.value, "rule", alpha.reason)
    rate = guidance.choose_learning_rate(candidate.r, alpha.value)
    chosen["train.learning_rate"] = (rate.value, "rule", rate.reason)
    chosen["train.optimizer"] = (candidate.optimizer, "derived", found.reasons.get("optimizer", ""))

    chosen["train.batch"] = (batch.value, batch.rule, batch.reason)
    chosen["train.micro_batch"] = _micro_batch(recipe, found)
    accumulation = _whole(batch.value, candidate.micro_batch, "micro_batch")
    chosen["train.accumulation"] = (accumulation, "derived", "batch / micro_batch")
    num_steps = _num_steps(recipe, facts.num_train_rows, candidate.micro_batch, accumulation)
    evaluations = _evaluations(facts, num_steps)
    chosen["train.eval_every"] = evaluations
    every = recipe.train.eval_every if recipe.train.eval_every != "auto" else evaluations[0]
    chosen["train.save_every"] = _checkpoints(every, num_steps)
    chosen["train.monitor_every"] = _looks(num_steps)

    if facts.num_train_rows is None:  # nothing is known of these, and nothing hangs on them
        for key in ("data.format", "data.validation", "train.eval_every", "train.save_every", "train.monitor_every"):
            chosen[key] = (chosen[key][0], "default", chosen[key][2])
    for key, (value, source, reason) in chosen.items():
        if decisions[key].value in ("auto", "conservative", "standard", "aggressive"):
            decisions[key] = Decision(value, source, reason)
    if recipe.data.max_length != "auto" and isinstance(recipe.data.max_length, str):
        reason = f"{recipe.data.max_length}: {facts.max_length_reason}"
        decisions["data.max_length"] = Decision(facts.max_length, "derived", reason)
    decisions |= _placed(recipe, facts, candidate.placement)
    return decisions, num_steps


def _placed(recipe: Recipe, facts: Facts, placement: Placement) -> dict[str, Decision]:
    """What the memory engine does, setting by setting."""
    plain = Placement().to_settings(facts.num_layers)
    decisions = {}
    for key, value in placement.to_settings(facts.num_layers).items():
        name = key.partition(".")[2]
        if recipe.is_given(key) and getattr(recipe.memory, name) != "auto":
            decisions[key] = Decision(value, "given", "given")
        elif key == "memory.stream_from" and placement.streams and value == "disk":
            decisions[key] = Decision(value, "derived", "RAM does not hold them")
        elif value == plain[key]:
            decisions[key] = Decision(value, "default", _PLAIN[name].format(layers=facts.num_layers))
        else:
            for_speed = _ON_CPU if facts.device.kind == "cpu" and value is not True else {}
            decisions[key] = Decision(value, "derived", for_speed.get(name) or _ENGINE[name])
    if placement.streams and not recipe.is_given("train.sample_rows"):
        decisions["train.sample_rows"] = Decision(0, "derived", "each token of an answer would take every layer to the device once more")
    if recipe.memory.cache_base == "auto":
        plain = recipe.model.weights == "pretrained" and not recipe.model.trust_remote_code
        keeps = placement.streams or (plain and facts.num_parameters >= _WORTH_KEEPING)
        reason = ("streamed layers come from there" if placement.streams else "the next start takes seconds" if keeps
                  else "loading it is quick enough")
        decisions["memory.cache_base"] = Decision(keeps, "derived", reason)
    return decisions


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


def _rank(facts: Facts) -> Choice:
    """The largest rank that the rules give; on a CPU memory is no rule."""
    memory = facts.budget_bytes if facts.device.kind == "cuda" else None
    return guidance.choose_rank(facts.num_train_rows, facts.num_parameters, memory)


def _attention(facts: Facts) -> tuple[str, str, str]:
    if facts.attentions[0] == "sdpa":
        return "sdpa", "rule", "torch's own kernels; never stores the length x length scores on a GPU"
    return facts.attentions[0], "derived", "the model class has no other; it stores the length x length scores"


def _batch(recipe: Recipe, facts: Facts) -> Choice:
    """Rows of an optimizer step: given, the product of what is given, or by rule; a multiple of what is given."""
    fixed = {name: getattr(recipe.train, name) for name in ("batch", "micro_batch", "accumulation")
             if getattr(recipe.train, name) != "auto"}
    if "batch" in fixed:
        return Choice(fixed["batch"], "given", "given")
    if {"micro_batch", "accumulation"} <= fixed.keys():
        return Choice(fixed["micro_batch"] * fixed["accumulation"], "micro_batch x accumulation", "derived")
    value, reason = _BATCH, f"{_BATCH} rows steady the gradient"
    if facts.num_train_rows is not None:
        rows = max(1, facts.num_train_rows)
        largest = 2 ** int(math.log2(max(1, rows * recipe.train.epochs / _MIN_STEPS)))
        value = min(_BATCH, largest, rows)
        if value < _BATCH:
            reason = f"fewer than {_BATCH}, so that {rows} rows make about {_MIN_STEPS} steps"
    for name in ("micro_batch", "accumulation"):
        if name in fixed:
            value = max(1, round(value / fixed[name])) * fixed[name]
            reason = f"the multiple of {name} {fixed[name]} nearest to what the data asks for"
    return Choice(value, reason, "rule")


def _micro_batches(recipe: Recipe, facts: Facts, batch: int) -> tuple[int, ...]:
    """Rows at once to choose from: what divides the batch, up to what speed has use for."""
    if recipe.train.micro_batch != "auto":
        _whole(batch, recipe.train.micro_batch, "micro_batch")
        if recipe.train.accumulation != "auto":
            _whole(batch, recipe.train.micro_batch * recipe.train.accumulation, "micro_batch x train.accumulation")
        return (recipe.train.micro_batch,)
    if recipe.train.accumulation != "auto":
        return (_whole(batch, recipe.train.accumulation, "accumulation"),)
    if recipe.data.packing:
        return (1,)  # a packed sequence is full already
    most = _CPU_ROWS if facts.device.kind == "cpu" else max(1, _SATURATED_TOKENS // facts.max_length)
    return tuple(rows for rows in range(1, min(most, batch) + 1) if batch % rows == 0)


def _micro_batch(recipe: Recipe, found: Found) -> tuple[int, str, str]:
    rows = found.candidate.micro_batch
    if recipe.data.packing:
        return rows, "rule", "a packed sequence is full already"
    return rows, "derived", found.reasons.get("micro_batch", "batch / accumulation")


def _whole(batch: int, part: int, name: str) -> int:
    if batch % part:
        raise RecipeError(f"train.batch is {batch}, which train.{name} {part} does not divide.",
                          f"Make train.batch a multiple of {part}, or leave train.{name} out.")
    return batch // part


def _num_steps(recipe: Recipe, num_rows: int | None, micro_batch: int, accumulation: int) -> int | None:
    """Optimizer steps as the trainer counts them: a last, partial window of an epoch is a step too."""
    if num_rows is None:
        return recipe.train.max_steps
    per_epoch = math.ceil(math.ceil(num_rows / micro_batch) / accumulation)
    steps = max(1, math.ceil(per_epoch * recipe.train.epochs))
    return steps if recipe.train.max_steps is None else recipe.train.max_steps


def _evaluations(facts: Facts, num_steps: int | None) -> tuple[int, str, str]:
    if num_steps is None:
        return 0, "derived", "there is no data yet"
    if not facts.num_validation_rows:
        return 0, "derived", "there are no held-out rows"
    every = max(1, math.ceil(num_steps / _NUM_EVALUATIONS))
    return every, "rule", f"about {_NUM_EVALUATIONS} evaluations a run; this one has {num_steps:,} steps"


def _checkpoints(eval_every: int, num_steps: int | None) -> tuple[int, str, str]:
    if eval_every:
        return eval_every, "derived", "at each evaluation, so that the best one is on disk"
    if num_steps is None:
        return 0, "derived", "there is no data yet"
    every = max(1, math.ceil(num_steps / _NUM_EVALUATIONS))
    return every, "rule", f"about {_NUM_EVALUATIONS} checkpoints a run; this one has {num_steps:,} steps"


def _looks(num_steps: int | None) -> tuple[int, str, str]:
    if num_steps is None:
        return 0, "derived", "there is no data yet"
    every = max(_STEPS_BETWEEN_LOOKS, math.ceil(num_steps / _NUM_LOOKS))
    if every > _STEPS_BETWEEN_LOOKS:
        return every, "rule", f"about {_NUM_LOOKS} looks a run; this one has {num_steps:,} steps"
    return every, "rule", f"at most one step of {_STEPS_BETWEEN_LOOKS}, so that looking costs next to nothing"
