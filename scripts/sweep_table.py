#!/usr/bin/env python3
"""Rank and alpha, measured on small models with three seeds: the tables in qlora/sweeping/README.md.

    scripts/sweep_table.py FOLDER                       run the sweeps that are missing in FOLDER, and print the tables
    scripts/sweep_table.py FOLDER --write               and put them into the page
    scripts/sweep_table.py FOLDER --only gsm8k          one of them: quickstart, gsm8k or few

quickstart needs nothing; the others train stories260K on GSM8K, from the folder of shared test material beside the checkout or in
QLORA_SHARED. On one core all three take about a quarter of an hour; stopped and started again, they go on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pages import Place

from qlora import _compat
from qlora.recipe import Recipe, build_recipe, load_recipe
from qlora.sweeping.results import SweepResult

ROOT = Path(__file__).parents[1]
PLACE = Place(ROOT / "qlora" / "sweeping" / "README.md", "measured", "scripts/sweep_table.py FOLDER --write")
_SHARED = Path(os.environ.get("QLORA_SHARED", ROOT.parent / "shared"))
_MAX_TOKENS = 170  # of a GSM8K row for stories260K, whose vocabulary of 512 makes rows long
_ALWAYS = ("memory.device=cpu", "train.sample_rows=0", "train.save_every=0", "train.save_minutes=0")


@dataclass(frozen=True)
class Case:
    """One sweep."""

    title: str
    grid: tuple[str, ...]


CASES = {
    "quickstart": Case("The embedded base on 216 rows of the quickstart, one epoch",
                       ("lora.r=4,8,16,32", "lora.alpha=r,2r,4r")),
    "gsm8k": Case("stories260K on 96 short rows of GSM8K, three epochs; held out are 40 rows of its test set",
                  ("lora.r=4,8,16,32", "lora.alpha=r,2r,4r")),
    "few": Case("stories260K on 16 rows of GSM8K, 30 epochs, the last weights kept: does a large rank learn few rows by heart?",
                ("lora.r=4,16,64", "lora.alpha=r,16")),
}


def recipe_of(name: str, folder: Path) -> Recipe:
    """The recipe of a case; its rows are written into the folder where they are a part of others."""
    if name == "quickstart":
        return load_recipe(ROOT / "recipes" / "quickstart.yaml", [*_ALWAYS, "data.max_rows=240", "train.epochs=1"])
    train, held_out = _short_rows("train", 96, folder), _short_rows("test", 40, folder)
    settings = {"epochs": 3, "learning_rate": 5e-3} if name == "gsm8k" else {"epochs": 30, "learning_rate": 5e-3, "keep": "last"}
    data = {"path": str(train), "validation": str(held_out), **({"max_rows": 16} if name == "few" else {})}
    return build_recipe(name, overrides=_ALWAYS, model=str(_SHARED / "models" / "stories260K"), data=data, train=settings)


def _short_rows(split: str, count: int, folder: Path) -> Path:
    """The first rows of GSM8K that are short for the model."""
    from transformers import AutoTokenizer

    path = folder / f"gsm8k-{split}.jsonl"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(_SHARED / "models" / "stories260K")
        lines = (_SHARED / "data" / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        short = [line for line in lines if len(tokenizer(" ".join(json.loads(line).values())).input_ids) <= _MAX_TOKENS]
        path.write_text("\n".join(short[:count]) + "\n", encoding="utf-8")
    return path


def measure(name: str, folder: Path) -> SweepResult:
    """Run the sweep of a case, or read it where it is there."""
    from qlora.console import ConsoleProgress
    from qlora.sweeping import read_order, sweep

    order = read_order(recipe_of(name, folder), grid=CASES[name].grid, out=str(folder / name), keep="none")
    return sweep(order, ConsoleProgress())


def section(name: str, result: SweepResult) -> str:
    """Markdown."""
    from qlora.sweeping import table

    # Not the time: small models and another program beside them say nothing about it.
    lines = [[cell for cell, column in zip(row, table.head(result), strict=True) if column != "time"]
             for row in (table.head(result), *table.rows(result))]
    lines.insert(1, ["---"] * len(lines[0]))
    lines = [f"### {CASES[name].title}", "", *(f"| {' | '.join(cells)} |" for cells in lines)]
    libraries = ("python", "torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {result.facts['versions'][name]}" for name in libraries)
    lines += ["", table.before_line(result), *(f"{line.rstrip('.')}." for line in table.winner_lines(result)), "",
              f"{result.facts['device']}; {versions}."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the sweeps are kept")
    parser.add_argument("--only", choices=CASES, action="append", help="leave the others out")
    parser.add_argument("--write", action="store_true", help="put the tables into qlora/sweeping/README.md")
    options = parser.parse_args()
    _compat.prepare_environment()
    _compat.quieten_libraries()
    _compat.hide_loading_bars()
    options.folder.mkdir(parents=True, exist_ok=True)
    made = "\n\n".join(section(name, measure(name, options.folder)) for name in options.only or CASES)
    sys.stdout.write(made + "\n")
    if options.write:
        PLACE.write(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
