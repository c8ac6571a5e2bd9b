"""A plan as a recipe: what was given and what was decided, each with its reason, in a file that `qlora train` takes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qlora.errors import OutputError
from qlora.redact import redact
from qlora.results.facts import shown_path
from qlora.settings import SECTIONS
from qlora.units import format_bytes

if TYPE_CHECKING:
    from qlora.planning.plan import Plan
    from qlora.recipe import Recipe

_PLACEHOLDER = "my-rows.jsonl"


def refuse_existing(path: Path, *, force: bool) -> None:
    """Find out before any work whether a recipe may be written there.

    Raises:
        OutputError: the file is there and `force` is off, its folder is not there, or it is a folder.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", f"Name a file in it: {path / 'my.yaml'}.")
    if not path.parent.is_dir():
        raise OutputError(f"There is no folder {path.parent} for {path.name}.", "Make it first, or name another.")
    if path.exists() and not force:
        raise OutputError(f"{path} is there already, and nothing is overwritten unasked.",
                          "Name another file, or add --force to replace it.")


def write_frozen(plan: Plan, path: Path, *, recipe: Recipe | None = None, command: str = "", force: bool = False) -> None:
    """Write the recipe that trains exactly what was planned.

    Args:
        recipe: what was planned; None where only a model was named, and the rows are still to come.
        command: the command that made the plan, for the header.

    Raises:
        OutputError: the plan does not fit, or the file is there already or cannot be written.
    """
    if not plan.fits:
        raise OutputError(f"{path} was not written, because the plan does not fit.",
                          "Take one of the alternatives above, or name a larger card.")
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(frozen_recipe(plan, path, recipe=recipe, command=command))
    except FileExistsError:
        refuse_existing(path, force=force)
        raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.", "Name a place you may write to.") from error


def frozen_recipe(plan: Plan, path: Path, *, recipe: Recipe | None = None, command: str = "") -> str:
    """The text of that recipe. File names are relative to the folder of `path`."""
    folder = path.absolute().parent
    values: dict[str, dict[str, tuple[Any, str]]] = {section: {} for section in SECTIONS}
    left_out = _left_out(plan, has_rows=recipe is not None)
    for key, decision in plan.decisions.items():
        section, _, name = key.partition(".")
        known = section in SECTIONS and name in SECTIONS[section].model_fields
        if known and decision.source != "default" and (decision.source, key) not in left_out:
            values[section][name] = (decision.value, "" if decision.source == "given" else decision.reason)
    values["data"].setdefault("path", (_PLACEHOLDER, "put your own file here"))
    for section in ("output", "hub"):
        given = getattr(recipe, section, None)
        written = given.model_dump(exclude_unset=True) if given else {}
        values[section].update({name: (value, "") for name, value in written.items()})
    lines = _header(plan, path, command)
    for section, cls in SECTIONS.items():
        if values[section]:
            lines += ["", f"{section}:"]
        for name, field in cls.model_fields.items():
            if name in values[section]:
                value, reason = values[section][name]
                if field.json_schema_extra["path"]:
                    value = _relative(value, folder)
                lines.append(f"  {name}: {_scalar(value)}{'  # ' + ' '.join(reason.split()) if reason else ''}")
    return "\n".join(lines) + "\n"


def _left_out(plan: Plan, *, has_rows: bool) -> set[tuple[str, str]]:
    """Decisions that a recipe is better without, by source and key."""
    left_out = {("rule", "data.validation")}  # it counts rows; what a recipe takes is a share or a file
    if plan.kind == "cpu":
        left_out.add(("derived", "memory.budget"))  # the RAM that happened to be free
    if not has_rows:  # decided on nothing
        left_out |= {("derived", key) for key in ("data.format", "train.eval_every", "train.save_every")}
        left_out.add(("given", "data.path"))
    return left_out


def _header(plan: Plan, path: Path, command: str) -> list[str]:
    run = shlex.join(["qlora", "train", str(path)])
    rows = [
        ("Card", f"{plan.device}: at its highest the run takes {format_bytes(plan.peak_bytes)} of "
                 f"{format_bytes(plan.budget_bytes)}, in the phase {plan.peak_phase}."),
        ("Host", f"{format_bytes(plan.host_peak_bytes)} of RAM, {format_bytes(plan.disk_bytes)} of disk for what the run "
                 "leaves."),
        ("Plan", redact(command)), ("Run", run), ("Override", f"{run} train.epochs=2"),
    ]
    lines = [f"# {plan.model}: a plan that fits, with every setting that was decided and why.", "#"]
    lines += [f"# {name:<9} {text}" for name, text in rows if text]
    return ["#!/usr/bin/env -S qlora train", *(" ".join(line.split("\n")) for line in lines)]


def _relative(value: Any, folder: Path) -> Any:
    """A file or folder as seen from the recipe's folder, where `load_recipe` looks for it; a Hub id as it is."""
    if isinstance(value, str) and Path(value).expanduser().exists():
        return shown_path(str(Path(value).expanduser().absolute()), folder)
    return value


def _scalar(value: Any) -> str:
    """One value on one line of YAML; 32.0 as 32."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True).removesuffix("...\n").strip()
