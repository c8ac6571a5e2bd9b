#!/usr/bin/env python3
"""Write the tables of recipes/README.md: the recipes from their headers, the settings from qlora/settings.py.

Run it after a recipe or a setting has changed: `python scripts/update_docs.py`. With `--check` nothing is written, and
the exit code is 1 where a table is out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

from qlora.settings import describe_settings

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
    for path in sorted(RECIPES.glob("*.yaml")):
        parts = header(path)
        size = re.search(r"\d+ GB", parts.get("Card", ""))
        card = size[0] if size else "none"
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        base = model if isinstance(model, str) else model["base"]
        cells = f"[{path.name}]({path.name})", base, card, parts["title"].rstrip(".")
        rows.append((int(card.split()[0]) if size else 0, cells))
    rows.sort(key=lambda row: row[0])
    return _table(("recipe", "model", "card", "what for"), [cells for _, cells in rows])


def settings_table() -> str:
    """One row per setting, in the order of qlora/settings.py."""
    rows = [(f"`{doc.key}`", f"`{doc.default}`" if doc.default != "required" else "required", doc.expects, doc.help)
            for doc in describe_settings()]
    return _table(("setting", "default", "takes", "what it does"), rows)


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    escaped = [tuple(cell.replace("|", "\\|").replace("<", "&lt;") for cell in row) for row in rows]
    lines = [titles, ("---",) * len(titles), *escaped]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def updated(text: str) -> str:
    """`text` with the lines between each pair of markers replaced."""
    for name, table in (("recipes", recipes_table()), ("settings", settings_table())):
        start, end = f"<!-- {name}: written by scripts/update_docs.py -->", f"<!-- end of {name} -->"
        before, found_start, rest = text.partition(start)
        _, found_end, after = rest.partition(end)
        if not found_start or not found_end:
            raise SystemExit(f"{README.name} lacks the markers {start} and {end}.")
        text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def main() -> int:
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if "--check" in sys.argv[1:]:
        print("up to date" if new == old else f"{README.name} is out of date: run python scripts/update_docs.py")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    print(f"{README.name}: {'rewritten' if new != old else 'no change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
