"""The verb that makes evidence: measure."""

from __future__ import annotations

import argparse

from qlora.arguments.words import minutes, positive, size

_DESCRIPTION = """\
Is the planner right on this device? Each cell, a model under a budget, is planned as `qlora plan` does it; then the worst batch
that the plan allows is trained for two steps, with random weights and under that budget, and evaluated, answered and saved. One
line of JSON a cell has both sides: planned and measured peak by phase, the error, tokens/s, loss and gradient norm.

Nothing is downloaded. Every cell has a process of its own, and running out of memory is a result as any other. Cells that the
file has for this device already are skipped, so the same words go on where an interrupted run stopped.
"""
_EXAMPLES = """\
a cell:
  MODEL section.setting=value ...       a model of the catalog (`qlora models`), a folder with config.json, or a small one:
                                        small:llama, small:qwen3:6x768 (6 layers, 768 wide); memory.budget, and what else is
                                        fixed. The planner decides the rest.
examples:
  qlora measure                                          the default cells: on a GPU over 60, on a CPU some small ones
  qlora measure --vram 4GB,8GB                           those under 4 and 8 GB, on a card that is as large or larger
  qlora measure --vram 8GB --plan-only                   what would be measured; no card needed
  qlora measure Qwen/Qwen3-8B memory.budget=8GB data.max_length=1024
  qlora measure --cells my-cells.txt --try-refused       also train what the plan refuses: does it refuse too much?
  qlora measure --minutes 20 --out rtx3060.jsonl         as far as it gets; the same words again go on from there
  qlora measure --summary rtx3060.jsonl t4.jsonl         mean, median and worst error, under-estimates, false refusals
  qlora measure --receipts rtx3060.jsonl                 somebody's measurements: from now on the margin of plans for this
                                                         card follows from them

Exit code 2 where a cell failed, which is neither a refusal nor out of memory; it is tried again by the same words.
"""


def add_measure(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Planned against measured."""
    measure = verbs.add_parser(
        "measure", parents=[common], help="is the planner right here? plans and trains cells, and compares the two",
        usage="qlora measure [MODEL section.setting=value ...] [options]", description=_DESCRIPTION, epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measure.add_argument("overrides", nargs="*", default=[], metavar="MODEL section.setting=value",
                         help="one cell, in place of the default ones")
    measure.add_argument("--cells", metavar="FILE", help="cells from a file, one a line; # begins a comment, a space goes on")
    measure.add_argument("--vram", type=_sizes, metavar="SIZES",
                         help="of the default cells those under these budgets: 4GB,8GB,12GB,24GB")
    measure.add_argument("--cpu", action="store_true", help="on the CPU, also where there is a GPU")
    measure.add_argument("--out", metavar="FILE", default="measured.jsonl",
                         help="lines are added to it (default: measured.jsonl)")
    instead = measure.add_mutually_exclusive_group()
    instead.add_argument("--plan-only", "--dry-run", action="store_true",
                         help="list the cells with what is planned; train nothing")
    measure.add_argument("--try-refused", action="store_true", help="also train what the plan says does not fit")
    measure.add_argument("--minutes", type=minutes, metavar="N", help="begin no further cell after so many minutes")
    measure.add_argument("--jobs", type=positive, metavar="N",
                         help="plans to make at once (default: half of the processor's threads)")
    measure.add_argument("--timeout", type=positive, default=900, metavar="SECONDS",
                         help="give a cell up after so long (default: 900)")
    instead.add_argument("--summary", metavar="FILE", nargs="+", help="measure nothing; show what these files come to")
    instead.add_argument("--receipts", metavar="FILE", nargs="+",
                         help="measure nothing; add these files' measurements to what margins follow from on this machine")
    measure.add_argument("--markdown", action="store_true", help="print tables in Markdown, every cell and the summary")
    measure.add_argument("--json", action="store_true", help="print one JSON object: lines and summaries")
    measure.set_defaults(verb="measure")


def _sizes(text: str) -> list[int]:
    """Bytes of each, of sizes with commas between them; a number alone is in GB."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError("it names no size; write 4GB,8GB")
    return [size(word if not word.replace(".", "").isdecimal() else f"{word}GB") for word in words]
