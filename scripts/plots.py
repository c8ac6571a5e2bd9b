#!/usr/bin/env python3
"""Draw the plots of the documentation from scripts/evidence, qlora/planning/plots/*.png, and put what was measured into the page there.

    .venv/bin/python scripts/plots.py                      all of them, and the table
    .venv/bin/python scripts/plots.py --lines my.jsonl     with measurements of your own beside those in scripts/evidence

plan-against-measured.png   every cell that was measured (`qlora measure`), and the published runs of a Tesla T4 where the folder
                            of shared test material is at hand
memory-by-card.png          the parts of Qwen3-8B's plan on cards of 4, 8, 12, 16 and 24 GB, streamed or not; not measured
scale.png                   is drawn by scripts/scale.py
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT), str(ROOT / "tests")]

from pages import Place

from qlora import _compat
from qlora.hardware import device_from_card
from qlora.measuring.lines import read_lines
from qlora.measuring.one_cell import compared_peak
from qlora.measuring.summary import markdown_tables
from qlora.results.evidence_plots import Point, draw_plan_against_measured
from qlora.results.plan_plots import draw_compare
from qlora.units import GIB

EVIDENCE, PLOTS = ROOT / "scripts" / "evidence", ROOT / "qlora" / "planning" / "plots"
TABLE = Place(ROOT / "qlora" / "planning" / "README.md", "measured", "scripts/plots.py")
_MODEL, _CARDS = "Qwen/Qwen3-8B", (4, 8, 12, 16, 24)


def measured_points(files: list[Path]) -> list[Point]:
    """Of every cell that was trained to its end."""
    lines = [line for line in read_lines(*files) if line.get("error_percent") is not None]
    return [Point(compared_peak(line["planned"]["phases"], line["kind"]), compared_peak(line["measured"]["phases"], line["kind"]),
                  line["device"]) for line in lines]


def measured_table() -> str:
    """What `qlora measure --summary scripts/evidence/measured-*.jsonl --markdown` prints."""
    return markdown_tables(read_lines(*sorted(EVIDENCE.glob("measured-*.jsonl"))))


def t4_points() -> list[Point]:
    """The published runs, see scripts/score_planner.py; none without the shared folder."""
    rows = Path(os.environ.get("QLORA_SHARED", ROOT.parent / "shared")) / "facts" / "t4-measurements.json"
    if not rows.is_file():
        return []
    from t4 import read_rows, score

    found = [score(row) for row in read_rows(rows)]
    return [Point(each.allocated, each.measured_allocated, "Tesla T4, published by others") for each in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, nargs="+", default=[], metavar="FILE",
                        help="that `qlora measure --out FILE` has written")
    options = parser.parse_args()
    _compat.prepare_environment()
    _compat.quieten_libraries()
    PLOTS.mkdir(exist_ok=True)
    TABLE.write(measured_table())
    points = [*t4_points(), *measured_points([*sorted(EVIDENCE.glob("*.jsonl")), *options.lines])]
    draw_plan_against_measured(points, PLOTS / "plan-against-measured.png", title=f"Plan against measured: {len(points)} runs")
    from qlora.training.planner import plan_model

    plans = [plan_model(_MODEL, device=device_from_card(None, size * GIB)) for size in _CARDS]
    draw_compare(plans, PLOTS / "memory-by-card.png")
    for path in sorted(PLOTS.glob("*.png")):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
