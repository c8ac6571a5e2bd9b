#!/usr/bin/env python3
"""A recipe in Python: the same settings and checks as a YAML file, for when values come from your own code.

Needs no GPU and no download: the tiny model that comes with qlora and the sample rows beside this file.
Run it with `python recipes/script.py`. Other data: `python recipes/script.py my-rows.jsonl`.
"""

import sys
from pathlib import Path

from qlora import ConsoleProgress, build_recipe, train


def main() -> None:
    rows = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "data" / "quickstart.jsonl")
    recipe = build_recipe(
        name="script",
        model="builtin:tiny",
        data=rows,
        lora={"r": 16},
        train={"epochs": 2, "learning_rate": 3e-3},
    )
    result = train(recipe, ConsoleProgress())  # leave the second argument out to run in silence

    print(f"loss on held-out rows: {result.before['loss']:.3f} before, {result.after['loss']:.3f} after")
    print(f"exact match: {result.before['exact_match']:.0%} before, {result.after['exact_match']:.0%} after")
    print(f"adapter: {result.adapter}")
    print(f"report:  {result.report}")


if __name__ == "__main__":
    main()
