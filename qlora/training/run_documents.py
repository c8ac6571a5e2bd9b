"""What a run writes down of itself, and what an unfinished one is held to when it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from qlora.durable import write_text
from qlora.errors import OutputError, ResumeError
from qlora.planning.plan import Plan
from qlora.recipe import Recipe
from qlora.redact import redact_values
from qlora.training.run_folder import PLAN, PROGRESS, RESOLVED

_FRESH = "To start anew beside it, add --fresh."

# Settings that a run may be gone on with after a change: they steer where things go, when they are kept and how much memory
# may be used, not what is learnt. Data and base are held by their content, which may have moved.
_FREE_SECTIONS = {"output", "hub"}
_FREE_SETTINGS = {"train.report_to", "train.try_out", "train.save_every", "train.save_minutes", "memory.budget", "data.path", "model.base"}


@dataclass
class RunProgress:
    """progress.json: what is known so far of a run, over all its sessions.

    Attributes:
        checkpoint: step of the newest checkpoint ever written, 0 for none: what resuming must find, or say is missing.
        before: the evaluation before training, so that it is made once.
        probe: what the probe of the worst batch measured.
        seconds: time by phase.
        events: plain lines of what happened on the way, for the report.
        sessions: how often the run was started or gone on with.
    """

    folder: Path
    checkpoint: int = 0
    before: dict[str, Any] | None = None
    probe: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    sessions: int = 0

    @classmethod
    def load(cls, folder: Path) -> RunProgress:
        """What the file says; the defaults where there is none. Keys that are not known are ignored.

        Raises:
            ResumeError: the file is damaged.
        """
        path = folder / PROGRESS
        if not path.exists():
            return cls(folder)
        document = _read_json(path)
        known = {item.name for item in fields(cls)} - {"folder"}
        progress = cls(folder, **{key: value for key, value in document.items() if key in known})
        wrong = [
            name for name, types in (("checkpoint", int), ("before", dict | None), ("probe", dict | None),
                                     ("seconds", dict), ("events", list), ("sessions", int))
            if not isinstance(getattr(progress, name), types)
        ]
        if wrong:
            raise ResumeError(f"{path} is damaged: {wrong[0]} is {getattr(progress, wrong[0])!r}.", _FRESH)
        return progress

    def save(self) -> None:
        """Write the file anew.

        Raises:
            OutputError: it cannot be written; the one before is still there.
        """
        document = asdict(self)
        del document["folder"]
        write_json(self.folder / PROGRESS, document)


@dataclass(frozen=True)
class Saved:
    """The documents of an unfinished run.

    Attributes:
        resolved: resolved.json as it is.
        recipe: its recipe with every default filled in, by section and setting.
    """

    resolved: dict[str, Any]
    recipe: dict[str, Any]
    plan: Plan
    progress: RunProgress


def read_saved(folder: Path) -> Saved | None:
    """What an unfinished run wrote down; None if it was killed before it had written everything, which is before any work.

    Raises:
        ResumeError: a file is damaged, or is missing although there are checkpoints.
    """
    missing = [name for name in (RESOLVED, PLAN, PROGRESS) if not (folder / name).exists()]
    if missing:
        if next((folder / "checkpoints").glob("checkpoint-*"), None) is None:
            return None
        raise ResumeError(f"{folder} holds checkpoints, but {missing[0]} is missing, so what they belong to is not known.",
                          f"Put the file back. {_FRESH}")
    resolved, plan = _read_json(folder / RESOLVED), _read_json(folder / PLAN)
    try:
        recipe = _in_full(resolved["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{folder / RESOLVED} is damaged or of another version: {_brief(error)}.", _FRESH) from error
    try:
        saved_plan = Plan.from_json(plan)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(f"{folder / PLAN} is damaged or of another version: {_brief(error)}.", _FRESH) from error
    return Saved(resolved, recipe, saved_plan, RunProgress.load(folder))


def differences(saved_recipe: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """One line for each setting that is not as it was: "lora.r: 16, now 32". Those that do not change the result are left out.

    Args:
        saved_recipe: settings by section; defaults may be filled in or not.
    """
    # A secret that somebody wrote into a setting is not in what was saved.
    before, now = _settings(_in_full(saved_recipe)), _settings(redact_values(recipe.model_dump()))
    return [
        f"{key}: {_shown(before.get(key))}, now {_shown(now.get(key))}"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key) and not _is_free(key, before.get(key), now.get(key))
    ]


def _is_free(key: str, before: Any, now: Any) -> bool:
    """Whether a change from one to the other leaves the result as it is, or is judged elsewhere by content."""
    if key == "data.validation":
        return all(isinstance(value, str) and value != "auto" for value in (before, now))
    return key in _FREE_SETTINGS or key.partition(".")[0] in _FREE_SECTIONS


def _in_full(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return Recipe.model_validate(recipe).model_dump()


def _settings(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in (values or {}).items()}


def _shown(value: Any) -> str:
    """As a person would write it in a recipe."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).replace("\n...", "").strip()


def _brief(error: Exception) -> str:
    """Kind and text of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# --- files -------------------------------------------------------------------------------------------------------------


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Readable JSON without secrets, complete and on the disk or not there at all; what was there before stays until then.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_text(path, json.dumps(redact_values(document), indent=2, ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.",
                          "Make room on that disk, or set output.dir to a folder you may write to.") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ResumeError: names the file, and what is wrong with it.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResumeError(f"{path} cannot be read: {error.strerror or error}.", _FRESH) from error
    except (ValueError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged: {_brief(error)}.", _FRESH) from error
    if not isinstance(document, dict):
        raise ResumeError(f"{path} is damaged: it holds a {type(document).__name__}, not a mapping.", _FRESH)
    return document
