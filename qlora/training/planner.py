"""What `qlora plan` and `qlora models` ask: plans for a recipe, for a model alone, for several cards, for the whole catalog.

A question that was asked before is answered from the cache, before any heavy library is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qlora.catalog import catalog_entry, catalog_ids, find_id
from qlora.errors import ModelError
from qlora.hardware import Device, describe_machine
from qlora.home import cache_home
from qlora.planning.budget import find_budget
from qlora.planning.cache import remembered
from qlora.planning.plan import PARTS, PHASES, Plan
from qlora.planning.receipts import Receipts
from qlora.progress import Progress
from qlora.recipe import Recipe, build_recipe

# Rows where nobody says how long theirs are.
_USUAL_LENGTH = 2048


def plan_recipe(recipe: Recipe, *, device: Device | None = None, progress: Progress | None = None) -> Plan:
    """The plan of a recipe with its data.

    Args:
        device: plan for this one; None is the machine that the program runs on.

    Raises:
        QloraError: a recipe, model or data that cannot be used.
    """
    def work_out() -> dict[str, Any]:
        from qlora.training.setup import prepare

        try:
            setup = prepare(recipe, progress, device=device, look_around=True)
        except ModelError as error:
            hint = f"Without its tokenizer: `qlora plan --model {recipe.model.base}` plans for rows of {_USUAL_LENGTH:,} tokens."
            raise ModelError(error.problem, f"{error.fix}\n{hint}" if "tokenizer" in error.problem else error.fix) from error
        setup.data.refuse_errors()
        return setup.plan.to_json()

    question = {"verb": "recipe", "recipe": recipe.model_dump(mode="json"), "device": _device_question(recipe, device)}
    files = [_state_of(recipe.model.base), _state_of(recipe.data.path), _state_of(recipe.data.validation)]
    return _answer({**question, "files": files} if None not in files else None, work_out)


def plan_model(
    model: str, *, device: Device, overrides: Sequence[str] = (), progress: Progress | None = None, sketch: bool = False
) -> Plan:
    """The plan of a model without data: rows of 2,048 tokens, or of as many as the model takes and the budget holds, unless
    data.max_length says otherwise.

    Args:
        overrides: `section.setting=value`.
        sketch: see `qlora.training.fitting.make_plan`.

    Raises:
        QloraError: an unknown model, one that cannot be trained, or a budget below what the card takes for itself.
    """
    recipe = build_recipe(overrides=overrides, model=model, data="none")

    def work_out() -> dict[str, Any]:
        return _plan_without_data(recipe, device, progress, sketch).to_json()

    question = {"verb": "model", "recipe": recipe.model_dump(mode="json"), "device": _device_question(recipe, device), "sketch": sketch}
    state = _state_of(recipe.model.base)
    return _answer({**question, "files": state} if state is not None else None, work_out)


def compare(plan_for: Callable[[Device], Plan], devices: Sequence[Device], progress: Progress | None = None) -> list[Plan]:
    """One plan for each device."""
    plans = []
    with (progress or Progress()).stage(f"Planning for {len(devices)} cards") as update:
        for done, device in enumerate(devices, 1):
            plans.append(plan_for(device))
            update(done, len(devices))
    return plans


def plan_catalog(device: Device, progress: Progress | None = None) -> list[Plan]:
    """A plan for every model of the catalog, from the smallest to the largest; those that cannot be trained say why in
    their notes.
    """
    ids = sorted(catalog_ids(), key=lambda id: catalog_entry(id).parameters)
    plans = []
    with (progress or Progress()).stage(f"Planning {len(ids)} models") as update:
        for done, id in enumerate(ids, 1):
            try:
                plans.append(plan_model(id, device=device, sketch=True))
            except ModelError as error:
                plans.append(_impossible(id, device, error))
            update(done, len(ids))
    return plans


# --- details -----------------------------------------------------------------------------------------------------------


def _plan_without_data(recipe: Recipe, device: Device, progress: Progress | None, sketch: bool) -> Plan:
    from qlora.architecture import select_targets
    from qlora.precision import choose_precision
    from qlora.training.fitting import Job, Rows, make_plan
    from qlora.training.setup import find_model

    _, config, architecture = find_model(recipe, progress or Progress())
    wanted = recipe.data.max_length
    if isinstance(wanted, int):
        length, reason = wanted, "given"
    else:
        length = min(_USUAL_LENGTH, architecture.max_positions or _USUAL_LENGTH)
        reason = "no data yet; data.max_length=N plans for other rows"
    rows = Rows(
        num_train=None, num_validation=None, max_length=length, max_length_reason=reason, ragged=True, format="messages",
        format_reason="no data yet", shrinkable=wanted == "auto",
    )
    job = Job(recipe, device, choose_precision(recipe.model.dtype, device), config, architecture,
              select_targets(architecture, recipe.lora.targets), rows)
    return make_plan(job, None if sketch else progress, look_around=True, sketch=sketch)


def _answer(question: dict[str, Any] | None, work_out: Callable[[], dict[str, Any]]) -> Plan:
    started = time.perf_counter()
    document = work_out() if question is None else remembered(cache_home() / "plans", question, work_out)
    return replace(Plan.from_json(document), seconds=round(time.perf_counter() - started, 3))


def _device_question(recipe: Recipe, device: Device | None) -> dict[str, Any]:
    """What a plan depends on of the device: not what happens to be free, but the budget that follows from it."""
    known = device or describe_machine(recipe.memory.device)
    receipts = cache_home() / "receipts.jsonl"
    seen = receipts.stat().st_size if receipts.exists() else 0
    return {**known.lasting, "budget": asdict(find_budget(known, recipe.memory.budget, Receipts.load())), "receipts": seen}


def _state_of(name: Any) -> Any:
    """What tells whether a model or data set is still the same; None where only the Hub could tell."""
    if not isinstance(name, str) or name in ("auto", "none") or name.startswith("builtin:"):
        return "fixed"
    path = Path(name).expanduser()
    if path.is_file():
        return [str(path), path.stat().st_size, path.stat().st_mtime_ns]
    if path.is_dir():
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(path.iterdir())]
    return find_id(name)


def _impossible(model: str, device: Device, error: ModelError) -> Plan:
    """The row of a model that cannot be trained, for tables."""
    return Plan(
        model=model, device=device.name, kind=device.kind, budget_bytes=find_budget(device, "auto").bytes, fits=False,
        phases=dict.fromkeys(PHASES, 0), parts=dict.fromkeys(PARTS, 0), reserved_bytes=0, host_peak_bytes=0, disk_bytes=0,
        decisions={}, num_steps=None, notes=(error.problem,),
    )
