#!/usr/bin/env python3
"""Write the tables of recipes/README.md: the recipes from their headers, what they take from scripts/evidence, the settings from
qlora/settings.py.

Run it after a recipe, its evidence (scripts/recipe_evidence.py) or a setting has changed: `python scripts/update_docs.py`. With
`--check` nothing is written, and the exit code is 1 where a table is out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pages import Place
from recipe_evidence import PLANNED, RUN, lines_of

from qlora.settings import describe_settings
from qlora.units import format_bytes

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
README = RECIPES / "README.md"


def header(path: Path) -> dict[str, str]:
    """Parts of a recipe's leading comment: `title`, and the text behind each label (`Card`, `Run`, ...)."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    parts = {"title": lines[0] if lines else ""}
    for line in lines[1:]:
        match = re.match(r"([A-Z][a-z]+)\s{2,}(\S.*)", line)
        if match:
            parts[match[1]] = match[2]
    return parts


def recipes_table() -> str:
    """One row per recipe, the smallest card first."""
    rows = []
    for path in recipes():
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        base = model if isinstance(model, str) else model["base"]
        card = f"{gigabytes} GB" if (gigabytes := card_gigabytes(path)) else "none"
        rows.append((f"[{path.name}]({path.name})", base, card, header(path)["title"].rstrip(".")))
    return _table(("recipe", "model", "card", "what for"), rows)


def recipes() -> list[Path]:
    """The recipes here, the smallest card first."""
    return sorted(sorted(RECIPES.glob("*.yaml")), key=lambda path: card_gigabytes(path) or 0)


def card_gigabytes(path: Path) -> int | None:
    """The card that a recipe's header names; None for a recipe that needs none."""
    size = re.search(r"(\d+) GB", header(path).get("Card", ""))
    return int(size[1]) if size else None


def evidence_table() -> str:
    """One row per recipe: what is planned, and what was measured where it has been run."""
    planned, run = lines_of(PLANNED), lines_of(RUN)
    titles = ("recipe", "rows of", "planned, of the budget", "measured, of tensors", "on", "tokens/s", "loss on held-out rows")
    return _table(titles, [_evidence(path.name, planned.get(path.name), run.get(path.name)) for path in recipes()])


def _evidence(name: str, plan: dict[str, Any] | None, run: dict[str, Any] | None) -> tuple[str, ...]:
    length = (run or plan or {}).get("max_length")
    rows = f"{length:,} tokens" if length else ""
    promised = f"{format_bytes(plan['peak_bytes'])} of {format_bytes(plan['budget_bytes'])}" if plan else "not planned"
    if plan and not plan["fits"]:
        promised += ", does not fit"
    if run is None:
        return (f"[{name}]({name})", rows, promised, "not yet measured", "", "", "")
    error = 100 * (run["planned_bytes"] / run["measured_bytes"] - 1)
    loss = "weights were random" if run["random_weights"] else ""
    if run["loss"]:
        loss = f"{run['loss'][0]:.3f} to {run['loss'][1]:.3f}"
    return (f"[{name}]({name})", rows, promised, f"{format_bytes(run['measured_bytes'])} (plan {error:+.1f} %)", run["device"],
            f"{run['tokens_per_second']:,.0f}", loss)


def settings_table() -> str:
    """One row per setting, in the order of qlora/settings.py."""
    rows = [(f"`{doc.key}`", f"`{doc.default}`" if doc.default != "required" else "required", doc.expects, doc.help)
            for doc in describe_settings()]
    return _table(("setting", "default", "takes", "what it does"), rows)


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    escaped = [tuple(cell.replace("|", "\\|").replace("<", "&lt;") for cell in row) for row in rows]
    lines = [titles, ("---",) * len(titles), *escaped]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tables() -> dict[Place, str]:
    """Each table and where it belongs."""
    made = {"recipes": recipes_table(), "evidence": evidence_table(), "settings": settings_table()}
    return {Place(README, name, "scripts/update_docs.py"): table for name, table in made.items()}


def out_of_date() -> list[str]:
    """Names of the tables that are not as they would be written."""
    return [place.name for place, table in tables().items() if place.text() != table]


def main() -> int:
    if "--check" in sys.argv[1:]:
        old = out_of_date()
        print(f"out of date: {', '.join(old)}; run python scripts/update_docs.py" if old else "up to date")
        return int(bool(old))
    changed = [place.name for place, table in tables().items() if place.write(table)]
    print(f"{README.name}: {', '.join(changed) or 'no change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
