#!/usr/bin/env python3
"""The longest rows that are planned for Llama-3.1-8B by card, with and without streaming, beside what others publish.

    scripts/context_table.py            print the table
    scripts/context_table.py --write    put it into qlora/engine/README.md
    scripts/context_table.py --check    exit with 1 where the page says something else

Adapters of rank 32 on all projections, one row at a time, NF4 with double quantisation, activations computed anew. No GPU is needed: these are plans.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pages import Place

from qlora import _compat

PLACE = Place(Path(__file__).parents[1] / "qlora" / "engine" / "README.md", "context table", "scripts/context_table.py --write")
MODEL = "meta-llama/Llama-3.1-8B"
OVERRIDES = ("lora.r=32", "train.batch=1", "data.max_length=1024")
# Tokens, batch 1, rank 32, all linear projections (https://unsloth.ai/blog/llama3-3, December 2024).
PUBLISHED = {8: ("2,972", "out of memory"), 12: ("21,848", "932"), 16: ("40,724", "2,551"), 24: ("78,475", "5,789")}


def longest(vram_gb: int, *overrides: str) -> int | None:
    """Tokens of the longest row that fits."""
    from qlora.hardware import device_from_card
    from qlora.training.planner import plan_model

    device = device_from_card(None, vram_gb * 2**30)
    return plan_model(MODEL, device=device, overrides=[*OVERRIDES, *overrides]).longest_length


def table() -> str:
    """Markdown."""
    lines = ["| card | resident | with streaming | Unsloth | Hugging Face with FlashAttention 2 |", "| --- | --- | --- | --- | --- |"]
    for vram, (unsloth, plain) in PUBLISHED.items():
        resident, streamed = longest(vram, "memory.streaming=false"), longest(vram)
        cells = [f"{tokens:,}" if tokens else "does not fit" for tokens in (resident, streamed)]
        lines.append(f"| {vram} GB | {cells[0]} | {cells[1]} | {unsloth} | {plain} |")
    return "\n".join(lines)


def main() -> int:
    """Print, write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page has another table")
    options = parser.parse_args()
    _compat.prepare_environment()
    _compat.quieten_libraries()
    made = table()
    print(made)
    if options.check:
        return int(PLACE.text() != made)
    if options.write:
        PLACE.write(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
