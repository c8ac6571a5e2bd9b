"""The verb that searches: sweep."""

from __future__ import annotations

import argparse

from qlora.arguments.words import positive

_DESCRIPTION = """\
Which rank, which alpha, which projections? Train your recipe with several of each, and compare held-out losses with their spread.

Without --grid and --space the search goes by itself: r 4, 8, 16, 32 until doubling no longer pays; then alpha r, 2r, 4r at that
rank; then the targets qv, attention, all. A step pays where it gains more than 0.01 nats a token, and more than the noise over
the seeds. What is given on the command line, such as lora.targets=all, is fixed and not searched.

Every trial is an ordinary run, planned before it begins; one that does not fit is a row that says so. The base is loaded once.
"""
_EXAMPLES = """\
examples:
  qlora sweep recipes/quickstart.yaml --dry-run            what would be tried, does it fit, how long does it take?
  qlora sweep recipes/chat.yaml data.path=my-rows.jsonl    rank, then alpha, then targets
  qlora sweep my.yaml --grid lora.r=8,16,32 lora.alpha=r,2r            every combination
  qlora sweep my.yaml --space lora.r=4,8,16,32 train.learning_rate=1e-4..1e-3 --trials 30    drawn by Optuna's TPE

In the folder: sweep.md with the table and plots, sweep.json, study.journal (Optuna's), and trials/ with a run for each
combination and seed. A sweep that was cut short goes on when the same command is given again, and comes to the same table.
"""


def add_sweep(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Search for settings."""
    sweep = verbs.add_parser(
        "sweep", parents=[common], help="try ranks, alphas and targets on your rows, and say which to take",
        usage="qlora sweep RECIPE [section.setting=value ...] [--grid | --space section.setting=VALUES ...] [options]",
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("recipe", help="a YAML recipe, such as recipes/quickstart.yaml")
    sweep.add_argument("overrides", nargs="*", default=[], metavar="section.setting=value",
                       help="fix a setting, e.g. lora.targets=qv")
    how = sweep.add_mutually_exclusive_group()
    how.add_argument("--grid", nargs="*", metavar="KEY=V,V", help="every combination of these values; alpha may be r, 2r, 4r")
    how.add_argument("--space", nargs="*", metavar="KEY=V,V|LOW..HIGH", help="draw from these values and ranges")
    sweep.add_argument("--trials", type=positive, default=20, metavar="N", help="with --space: how many to draw (default: 20)")
    sweep.add_argument("--seeds", type=positive, default=3, metavar="N",
                       help="runs of each combination, by seed (default: 3, the fewest that show a spread)")
    sweep.add_argument("--out", metavar="FOLDER", help="where it is kept (default: runs/NAME-sweep)")
    sweep.add_argument("--keep", choices=("best", "all", "none"), default="best",
                       help="whose adapters stay when it has ended: the winner's (default), all or none")
    sweep.add_argument("--dry-run", action="store_true", help="plan it and show what would run; trains and writes nothing")
    sweep.add_argument("--json", action="store_true", help="print one JSON object")
    sweep.set_defaults(verb="sweep")
