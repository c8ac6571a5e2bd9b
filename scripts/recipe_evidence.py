#!/usr/bin/env python3
"""Evidence for the table in recipes/README.md: what each recipe is planned to take, and what it took.

    .venv/bin/python scripts/recipe_evidence.py plan                     plan every recipe that has changed; no card, no network
    .venv/bin/python scripts/recipe_evidence.py run runs/qwen3-4b-8gb    add a finished run: qlora train recipes/qwen3-4b-8gb.yaml
    .venv/bin/python scripts/update_docs.py                              then write the table

A recipe of a model from the Hub is planned for the card that its head names, and for rows of 2,048 tokens, as
`qlora plan --model` does it: the rows beside the recipes are samples. The others are planned for this machine, with their rows. A
run counts where it was of the recipe as it stands, with no setting replaced but output.dir, hub.repo or model.weights=random. Both
files of lines are in scripts/evidence; a line whose recipe has changed since counts no longer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

RECIPES, EVIDENCE = ROOT / "recipes", ROOT / "scripts" / "evidence"
PLANNED, RUN = EVIDENCE / "recipes-planned.jsonl", EVIDENCE / "recipes-run.jsonl"
_MAY_DIFFER = ("output=", "output.dir=", "hub=", "hub.repo=", "model.weights=random")


def digest(path: Path) -> str:
    """Of what a recipe says; comments may change."""
    return hashlib.sha256(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), sort_keys=True).encode()).hexdigest()[:16]


def lines_of(file: Path) -> dict[str, dict[str, Any]]:
    """The last line of each recipe, of those that are about the recipe as it is now."""
    texts = file.read_text(encoding="utf-8").splitlines() if file.exists() else ()
    lines = {line["recipe"]: line for line in map(json.loads, texts)}
    return {name: line for name, line in lines.items()
            if (RECIPES / name).is_file() and line["digest"] == digest(RECIPES / name)}


def plan_line(path: Path) -> dict[str, Any]:
    """What is planned for a recipe."""
    from update_docs import card_gigabytes

    from qlora.hardware import describe_machine, device_from_card
    from qlora.planning.cache import library_versions
    from qlora.recipe import load_recipe
    from qlora.training.planner import plan_model, plan_recipe
    from qlora.units import GIB

    recipe, gigabytes = load_recipe(path), card_gigabytes(path)
    if gigabytes is None:
        plan = plan_recipe(recipe, device=describe_machine("cpu"))
    else:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
        overrides = [f"{section}.{key}={json.dumps(value)}" for section, values in sections.items()
                     if section in ("lora", "train", "memory") for key, value in values.items() if key != "budget"]
        plan = plan_model(recipe.model.base, device=device_from_card(None, gigabytes * GIB), overrides=overrides)
    return {
        "recipe": path.name, "digest": digest(path), "device": plan.device, "fits": plan.fits, "peak_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes, "phases": plan.phases, "max_length": plan.settings["data.max_length"],
        "tokens_per_second": plan.tokens_per_second, "versions": library_versions(), "date": _now(),
    }


def run_line(folder: Path) -> dict[str, Any]:
    """What a finished run took."""
    from qlora.results.report import load_report

    found = load_report(folder)
    words = shlex.split(found.command)
    paths = [Path(word) for word in words if word.endswith(".yaml")]
    if not paths or not (RECIPES / paths[0].name).is_file():
        raise SystemExit(f"{folder} is no run of a recipe in recipes/: {found.command or 'built in Python'}")
    others = [word for word in words[words.index(str(paths[0])) + 1:] if not word.startswith(_MAY_DIFFER)]
    if others:
        raise SystemExit(f"{folder} is not of the recipe as it stands: it replaced {' '.join(others)}.")
    path = RECIPES / paths[0].name
    common = [phase for phase in found.planned_phases if phase in found.measured_phases]
    if not common:
        raise SystemExit(f"{folder} has no planned and measured figures of the same phases.")
    random = found.settings["model.weights"].value == "random"
    return {
        "recipe": path.name, "digest": digest(path), "device": found.device.name, "kind": found.device.kind,
        "planned_bytes": max(found.planned_phases[phase] for phase in common),
        "measured_bytes": max(found.measured_phases[phase] for phase in common),
        "planned": dict(found.planned_phases), "measured": dict(found.measured_phases), "process_bytes": found.peak_bytes,
        "budget_bytes": found.budget_bytes, "tokens_per_second": found.training.tokens_per_second,
        "num_steps": found.training.num_steps,
        "loss": None if random or not (found.before and found.after) else [found.before.loss, found.after.loss],
        "random_weights": random, "max_length": found.data.max_length, "seconds": round(found.total_seconds, 1),
        "command": f"qlora train recipes/{path.name}{' model.weights=random' if random else ''}",
        "versions": found.versions, "date": found.finished_at,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "run"))
    parser.add_argument("folder", nargs="?", type=Path, help="of a finished run")
    options = parser.parse_args()
    if (options.what == "run") != (options.folder is not None):
        parser.error("run wants the folder of a finished run, and plan none")
    from qlora import _compat

    _compat.prepare_environment()
    _compat.quieten_libraries()
    EVIDENCE.mkdir(exist_ok=True)
    if options.what == "run":
        line = run_line(options.folder)
        _append(RUN, line)
        print(f"{line['recipe']}: planned {line['planned_bytes']:,} bytes of tensors, measured {line['measured_bytes']:,}")
        return 0
    known = lines_of(PLANNED)
    for path in sorted(RECIPES.glob("*.yaml")):
        if path.name not in known:
            line = plan_line(path)
            _append(PLANNED, line)
            print(f"{path.name}: {line['peak_bytes']:,} of {line['budget_bytes']:,} bytes", flush=True)
    return 0


def _append(file: Path, line: dict[str, Any]) -> None:
    """The new line in the place of those of the same recipe."""
    texts = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    lines = [*(kept for kept in map(json.loads, texts) if kept["recipe"] != line["recipe"]), line]
    lines.sort(key=lambda each: each["recipe"])
    file.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
