#!/usr/bin/env python3
"""How peak memory and time per token grow with length, rows, rank and model size: small real runs on the CPU, fitted, drawn.

    nice .venv/bin/python scripts/scale.py            measure what scripts/evidence/scale-cpu.jsonl lacks, print, draw
    .venv/bin/python scripts/scale.py --write         and put the tables into qlora/planning/README.md

Each point is a cell of `qlora measure`: a small Llama with random weights, on one thread. Memory is what tensors take at their
highest. Time is the processor's, so that others who use the machine do not count; the planner's is its arithmetic (FLOPs of a
token) with the speed of the point that all curves share. The slope is that of a straight line through all points of a curve, by
least squares; where the curve bends, the part of the plan that grows otherwise from there on is named.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a thread more is a buffer more
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from pages import Place

from qlora import _compat
from qlora.console import ConsoleProgress
from qlora.measuring.cells import Cell, small_config
from qlora.measuring.flow import Order, measure
from qlora.measuring.one_cell import compared_peak
from qlora.measuring.summary import markdown
from qlora.results.evidence_plots import Curve, draw_scale
from qlora.units import KIB, MIB, format_bytes

EVIDENCE, README = ROOT / "scripts" / "evidence" / "scale-cpu.jsonl", ROOT / "qlora" / "planning" / "README.md"
PICTURE = README.parent / "plots" / "scale.png"
PLACE = Place(README, "scale", "scripts/scale.py")
# Everything is fixed, so that one thing changes at a time.
_FIXED = ("memory.budget=4GB train.max_steps=4 train.accumulation=1 memory.checkpointing=true train.optimizer=adamw "
          "memory.streaming=false "
          "memory.embedding_device=device memory.head_format=resident memory.loss_chunk=none memory.offload_activations=false "
          "memory.offload_adapters=false memory.fused_lora=false memory.mlp_tile=none model.dtype=bf16 model.attention=sdpa")
_LAYERS, _WIDTH, _LENGTH, _ROWS, _RANK = 4, 512, 256, 1, 16
# A change of slope of less than that share is none.
_BEND = 0.10


@dataclass(frozen=True)
class Axis:
    """One curve: what changes, in which unit, and the cell of each value."""

    name: str
    unit: str
    cells: Mapping[float, Cell]


def cell(*, layers: int = _LAYERS, width: int = _WIDTH, length: int = _LENGTH, rows: int = _ROWS, rank: int = _RANK) -> Cell:
    """One point."""
    return Cell.parse(f"small:llama:{layers}x{width} data.max_length={length} train.micro_batch={rows} lora.r={rank} {_FIXED}")


def axes() -> list[Axis]:
    """The four curves; they share one point."""
    return [
        Axis("length", "tokens", {n: cell(length=n) for n in (64, 128, 256, 512, 1024, 2048)}),
        Axis("rows at once", "rows", {n: cell(rows=n) for n in (1, 2, 4, 8)}),
        Axis("rank", "r", {n: cell(rank=n) for n in (4, 8, 16, 32, 64, 128)}),
        Axis("depth", "layers", {n: cell(layers=n) for n in (2, 4, 8, 16)}),
        Axis("width", "million parameters in 4 bits", {quantised_millions(n): cell(width=n) for n in (256, 512, 768, 1024)}),
    ]


def quantised_millions(width: int) -> float:
    """Parameters of the projections of a model of `_LAYERS` layers, in millions."""
    _, values = small_config(f"llama:{_LAYERS}x{width}")
    kv = 64 * values["num_key_value_heads"]
    return _LAYERS * (2 * width * width + 2 * width * kv + 3 * width * values["intermediate_size"]) / 1e6


def curve(axis: Axis, lines: Mapping[str, Mapping[str, Any]]) -> Curve:
    """Measured and planned figures of an axis."""
    base = lines[str(cell())]
    anchor = base["cpu_seconds_per_token"] / base["flops_per_token"]
    found = [lines[str(each)] for each in axis.cells.values()]
    return Curve(
        axis.name, axis.unit, list(axis.cells),
        measured_bytes=[compared_peak(line["measured"]["phases"], "cpu") for line in found],
        planned_bytes=[compared_peak(line["planned"]["phases"], "cpu") for line in found],
        measured_seconds=[line["cpu_seconds_per_token"] for line in found],
        planned_seconds=[anchor * line["flops_per_token"] for line in found],
        parts=[line["planned"]["parts"] for line in found],
    )


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the line through the points, by least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)
    return along, mean_y - along * mean_x


def bends(found: Curve) -> list[str]:
    """Where the measured peak grows otherwise than before, and which part of the plan explains it."""
    x, y, told = found.x, found.measured_bytes, []
    rates = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    for i in range(1, len(rates)):
        if abs(rates[i] - rates[i - 1]) <= _BEND * max(abs(rates[i]), abs(rates[i - 1])):
            continue
        changes = {part: (found.parts[i + 1][part] - found.parts[i][part]) / (x[i + 1] - x[i])
                   - (found.parts[i][part] - found.parts[i - 1][part]) / (x[i] - x[i - 1]) for part in found.parts[i]}
        changes.pop("margin", None)
        part = max(changes, key=lambda name: abs(changes[name]))
        told.append(f"{found.name}, from {x[i]:,.4g} on: {_rate(rates[i], found.unit)} after {_rate(rates[i - 1], found.unit)}; "
                    f"what changes most in the plan's peak is {part} ({format_signed(changes[part])})")
    return told


def _rate(bytes_each: float, unit: str) -> str:
    return f"{format_signed(bytes_each)} per {_one(unit)}"


def _one(unit: str) -> str:
    return {"tokens": "token", "rows": "row", "r": "r", "layers": "layer"}.get(unit, "million parameters")


def format_signed(size: float) -> str:
    """Bytes with a sign."""
    return f"{'-' if size < 0 else '+'}{format_bytes(abs(size)) if abs(size) >= 10 * KIB else f'{abs(size):,.0f} bytes'}"


def memory_table(curves: Sequence[Curve]) -> str:
    """One row a curve."""
    rows = []
    for found in curves:
        along, start = slope(found.x, found.measured_bytes)
        planned, _ = slope(found.x, found.planned_bytes)
        off = max(abs(start + along * x - y) / y for x, y in zip(found.x, found.measured_bytes))
        errors = [100 * (p / m - 1) for p, m in zip(found.planned_bytes, found.measured_bytes)]
        rows.append((found.name, f"{found.x[0]:,.4g} to {found.x[-1]:,.4g} {found.unit}",
                     f"{format_bytes(found.measured_bytes[0])} to {format_bytes(found.measured_bytes[-1])}",
                     _rate(along, found.unit),
                     _rate(planned, found.unit), f"{100 * off:.1f} %", f"{max(errors, key=abs):+.2f} %"))
    titles = ("of", "over", "peak of tensors", "slope, measured", "slope, planned", "farthest from the line", "plan, at most off")
    return markdown(titles, rows)


def time_table(curves: Sequence[Curve]) -> str:
    """One row a curve."""
    rows = []
    for found in curves:
        micro = [1e6 * seconds for seconds in found.measured_seconds]
        along, _ = slope(found.x, micro)
        planned, _ = slope(found.x, [1e6 * seconds for seconds in found.planned_seconds])
        ratios = [p / m for p, m in zip(found.planned_seconds, found.measured_seconds)]
        rows.append((found.name, f"{micro[0]:,.0f} to {micro[-1]:,.0f} µs", f"{along:+.3g} µs per {_one(found.unit)}",
                     f"{planned:+.3g} µs per {_one(found.unit)}", f"{min(ratios):.2f} to {max(ratios):.2f}"))
    titles = ("of", "processor's time per token", "slope, measured", "slope, by arithmetic", "arithmetic / measured")
    return markdown(titles, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EVIDENCE, metavar="FILE",
                        help="lines of the cells (default: in scripts/evidence)")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="FILE", help="default: in qlora/planning/plots")
    parser.add_argument("--write", action="store_true", help="put the tables into qlora/planning/README.md")
    options = parser.parse_args()
    _compat.prepare_environment()
    cells = list(dict.fromkeys(each for axis in axes() for each in axis.cells.values()))
    lines = {line["cell"]: line for line in measure(cells, Order(options.out, cpu=True), ConsoleProgress())}
    failed = [name for name, line in lines.items() if line.get("error_percent") is None]
    if failed or len(lines) < len(cells):
        print(f"{len(failed)} points have no figures: {'; '.join(failed)}. The same command tries them again.", file=sys.stderr)
        return 2
    curves = [curve(axis, lines) for axis in axes()]
    told = [line for found in curves for line in bends(found)]
    text = "\n\n".join([memory_table(curves), time_table(curves), "\n".join(f"- {line}" for line in told) or "No curve bends."])
    print(text)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw_scale(curves, options.picture)
    if options.write:
        PLACE.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
