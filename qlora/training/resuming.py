"""Go on with a run that was broken off: find its newest good checkpoint, and make sure that it is the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.data import fingerprint
from qlora.errors import HardwareError, ResumeError
from qlora.planning.budget import find_budget
from qlora.planning.plan import Plan
from qlora.planning.receipts import Receipts
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.training.checkpoints import Checkpoint, CheckpointStore
from qlora.training.run_documents import RunProgress, differences, read_saved
from qlora.training.run_folder import refuse_links
from qlora.training.setup import library_versions
from qlora.units import format_bytes

if TYPE_CHECKING:
    from qlora.training.recovery import Ladder
    from qlora.training.setup import Setup

# What a checkpoint's tensors hang on: with another value they have other shapes or another meaning.
_FIXED = ("lora.r", "train.optimizer")
_FACTS = {
    "train_rows": str, "validation_rows": str, "base": str, "versions": dict, "device": str, "rung": int, "metrics_bytes": int,
}


@dataclass(frozen=True)
class Begun:
    """A run that is gone on with. `plan` is the one it began with, None where settings were changed by force."""

    checkpoint: Checkpoint
    plan: Plan | None
    saved_plan: Plan
    record: RunProgress
    forced: bool


def begin_again(folder: Path, recipe: Recipe, progress: Progress, *, force: bool) -> Begun | None:
    """The newest checkpoint of an unfinished run; None where the run had not come to one, and begins again.

    Args:
        force: go on although settings have changed.

    Raises:
        ResumeError: no checkpoint is good, or settings have changed.
        OutputError: the folder holds links, which could lead outside of it.
    """
    refuse_links(folder)
    saved = read_saved(folder)
    store = open_store(folder)
    store.sweep()
    checkpoint, damage = store.newest()
    for line in damage:
        progress.note(line)
    if saved is None or checkpoint is None:
        if damage or store.ever_written() or (saved is not None and saved.progress.checkpoint):
            raise ResumeError(
                f"{folder} is a run that was broken off, and it has no good checkpoint left"
                + (f": {'; '.join(damage)}." if damage else "."),
                "Put a good copy of its checkpoints/ folder back, or add --fresh: it starts anew beside it.",
            )
        progress.note(f"{folder} was broken off before its first checkpoint, so it begins again.")
        return None
    for name, kind in _FACTS.items():
        if not isinstance(checkpoint.facts.get(name), kind):
            raise ResumeError(f"{checkpoint.path} does not say its {name!r}; another version of the program may have written it.",
                              "Go on with the version that wrote it, or add --fresh to start anew beside it.")
    changed = differences(saved.recipe, recipe)
    if changed and not force:
        raise ResumeError(
            f"{folder} is a run that was broken off, and it was begun with other settings:\n  " + "\n  ".join(changed),
            "To go on, run it with the settings it was begun with. --fresh starts a new run beside it; --force goes on with the "
            "new settings, and the result is then that of neither.",
        )
    for line in changed:
        progress.note(f"Changed by --force: {line}")
    progress.note(f"Going on with {folder} from step {checkpoint.step:,} of {saved.plan.num_steps:,}.")
    return Begun(checkpoint, None if changed else saved.plan, saved.plan, saved.progress, forced=force)


def open_store(folder: Path) -> CheckpointStore:
    """Where the checkpoints of a run are."""
    return CheckpointStore(folder / "checkpoints")


def facts_of(setup: Setup, base: str) -> dict[str, Any]:
    """What a checkpoint remembers of the run that it belongs to."""
    return {
        "train_rows": setup.data.fingerprint, "validation_rows": fingerprint(setup.data.validation), "base": base,
        "versions": library_versions(), "device": setup.device.name,
    }


def refuse_another_run(begun: Begun, setup: Setup, progress: Progress) -> None:
    """Hold the data and what was decided against what the checkpoint was written with.

    Raises:
        ResumeError: they differ.
    """
    decided, before = setup.plan.settings, begun.saved_plan.settings
    for key in _FIXED:
        if decided[key] != before[key]:
            raise ResumeError(f"{key} was {before[key]} when this run was begun and is {decided[key]} now; its checkpoints hold "
                              "weights and optimizer state for the former.", f"Set {key}={before[key]}, or add --fresh.")
    now = facts_of(setup, "")
    held = {"train_rows": "data.path: the rows to train on", "validation_rows": "data.validation: the held-out rows"}
    for key, what in held.items():
        if begun.checkpoint.facts[key] != now[key]:
            problem = f"{what} are not those that this run was begun with ({setup.recipe.data.path})."
            _refuse_unless(begun.forced, problem, progress)
    _tell_of_other_versions(begun.checkpoint.facts["versions"], now["versions"], progress)
    if begun.checkpoint.facts["device"] != now["device"]:
        progress.note(f"This run was begun on {begun.checkpoint.facts['device']}; on {now['device']} it goes on, but it does not "
                      "come to the same numbers to the last bit.")


def refuse_another_base(begun: Begun, base: str, progress: Progress) -> None:
    """Hold the frozen base, as it was built, against the one that the checkpoint was trained on.

    Raises:
        ResumeError: it has other numbers.
    """
    if begun.checkpoint.facts["base"] != base:
        _refuse_unless(begun.forced, "model.base: the weights of the base are not those that this run was begun with.", progress)


def fit_what_is_free(setup: Setup, ladder: Ladder, progress: Progress) -> None:
    """The plan is from when the run began; what is free now may be less.

    Raises:
        HardwareError: not even the smallest plan fits.
    """
    room = find_budget(setup.device, setup.recipe.memory.budget, Receipts.load()).bytes
    if setup.plan.peak_bytes <= room or ladder.peak_bytes <= room:
        return
    rung = ladder.lowest_that_fits(room)
    if rung is None:
        raise HardwareError(
            f"This run was planned for {format_bytes(setup.plan.budget_bytes)} of {setup.device.name} and needs "
            f"{format_bytes(ladder.smallest_peak_bytes)} at the least, but only {format_bytes(room)} can be had now.",
            "Free some memory (close other programs that use the device), or raise memory.budget, and run it again.",
        )
    progress.note(ladder.go_to(rung, f"because only {format_bytes(room)} can be had now"))


def _refuse_unless(forced: bool, problem: str, progress: Progress) -> None:
    if not forced:
        raise ResumeError(problem, "Put the old ones back, or add --fresh to start anew beside it; --force goes on all the same.")
    progress.note(f"Changed, and gone on with by --force: {problem}")


def _tell_of_other_versions(before: Mapping[str, str], now: Mapping[str, str], progress: Progress) -> None:
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if names:
        changed = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in names)
        progress.note(f"Other versions than when this run was begun ({changed}): it goes on, but whether it comes to the same "
                      "numbers to the last bit is not known.")
