"""What a sweep is begun with, and what is refused where it goes on with something else: losses would not be of the same thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.data import fingerprint
from qlora.engine.store import identity_of
from qlora.errors import DataError, OutputError, ResumeError
from qlora.hardware import Device, find_device
from qlora.planning.budget import find_budget
from qlora.planning.receipts import Receipts
from qlora.precision import choose_precision
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.redact import redact_values
from qlora.sweeping.space import Range, Space
from qlora.sweeping.study import STUDY
from qlora.training.run_documents import differences
from qlora.training.run_folder import LOCK, RUNNING
from qlora.training.setup import find_model, find_tokenizer, library_versions, read_data
from qlora.units import MIB

TRIALS, DOCUMENT = "trials", "sweep.json"
_ELSEWHERE = "Put the old ones back, or name another folder with --out."


@dataclass(frozen=True)
class Grounds:
    """What all trials of a sweep stand on.

    Attributes:
        recipe: of the trials, but for what they set: within the sweep's memory budget, and without a push.
        facts: plain values by which a sweep is recognised when it goes on.
    """

    recipe: Recipe
    device: Device
    facts: dict[str, Any]


def look(recipe: Recipe, search: str, space: Space, seeds: tuple[int, ...], progress: Progress) -> Grounds:
    """Read rows and config once, before anything is trained, and fix the memory that every trial may take.

    The budget must be one for all: what is free changes while a sweep runs, and with it what would be planned.

    Raises:
        QloraError: machine, model or data cannot be used, or no rows are held out.
    """
    device = find_device(recipe.memory.device)
    base, config, architecture = find_model(recipe, progress)
    tokenizer, _ = find_tokenizer(recipe, base, architecture, progress)
    data = read_data(recipe, tokenizer, architecture.max_positions, progress)
    data.refuse_errors()
    if not data.validation:
        raise DataError("No rows are held out, and a sweep compares losses on held-out rows.",
                        "Set data.validation: 0.1, or to a file of rows that are not trained on.")
    own = recipe.model_copy(update={"hub": None}).replace({})
    if recipe.memory.budget == "auto":
        own = own.with_overrides([f"memory.budget={_budget_bytes(device) // MIB}MiB"])
    precision = choose_precision(recipe.model.dtype, device)
    model = identity_of(base, weights=recipe.model.weights, config=config, precision=precision, revision=recipe.model.revision,
                        seed=0, device_name=device.torch_name)
    facts = {
        "recipe": redact_values(recipe.model_dump(exclude_unset=True)), "search": search, "space": _plain(space),
        "seeds": list(seeds),
        "budget": own.memory.budget, "model": {"base": recipe.model.base, "source": model["source"], "config": model["config"]},
        "data": {"train": fingerprint(data.train), "held_out": fingerprint(data.validation), "num_train": len(data.train),
                 "num_held_out": len(data.validation)},
        "device": device.name, "versions": library_versions(),
    }
    return Grounds(own, device, facts)


def go_on(grounds: Grounds, before: Mapping[str, Any], recipe: Recipe, progress: Progress) -> Grounds:
    """The grounds of a sweep that is there already, with the budget that it began with.

    Raises:
        ResumeError: it was begun with another recipe, other values, rows or weights; names each.
    """
    now = grounds.facts
    try:
        changed = differences(before["recipe"], recipe)
        for key, what in (("search", "search"), ("space", "values that are searched"), ("seeds", "seeds")):
            if before[key] != now[key]:
                changed.append(f"{what}: {_said(before[key])}, now {_said(now[key])}")
        for key, what in (("train", "data.path: the rows to train on"), ("held_out", "data.validation: the held-out rows")):
            if before["data"][key] != now["data"][key]:
                changed.append(f"{what} are not those that it was begun with ({recipe.data.path})")
        if before["model"] != now["model"]:
            changed.append(f"model.base: the files of {recipe.model.base} are not those that it was begun with")
        if before["versions"] != now["versions"] or before["device"] != now["device"]:
            progress.note("Device or libraries are not those that this sweep was begun with: it goes on, but figures may differ in "
                          "the last digits.")
        budget = before["budget"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResumeError(f"{STUDY} is damaged or of another version: {type(error).__name__}: {error}.",
                          "Name another folder with --out.") from error
    if changed:
        raise ResumeError("This sweep was begun with something else:\n  " + "\n  ".join(changed), _ELSEWHERE)
    own = grounds.recipe if recipe.memory.budget != "auto" else grounds.recipe.with_overrides([f"memory.budget={budget}"])
    return Grounds(own, grounds.device, dict(before))


def refuse_foreign(folder: Path) -> None:
    """
    Raises:
        OutputError: the folder holds something that is not a sweep.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder.", "Name a new one with --out.")
    try:
        names = {path.name for path in folder.iterdir()} - {LOCK, RUNNING}
    except OSError as error:
        raise OutputError(f"{folder} cannot be looked into: {error.strerror or error}.", "Name another with --out.") from error
    if names and STUDY not in names and not (names <= {TRIALS, DOCUMENT, "sweep.md", "plots"} and TRIALS in names):
        raise OutputError(f"{folder} is not empty, and what is in it is no sweep.", "Name a new folder with --out.")


def _budget_bytes(device: Device) -> int:
    return find_budget(device, "auto", Receipts.load()).bytes


def _plain(space: Space) -> dict[str, Any]:
    """As JSON gives it back."""
    return {key: vars(values) if isinstance(values, Range) else list(values) for key, values in space.items()}


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_said(each)}" for key, each in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
