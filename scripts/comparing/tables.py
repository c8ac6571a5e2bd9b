"""What came out: a row for each contender, as numbers, as a table and as a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparing.contenders import Contender
from comparing.work import Work

# Losses of bf16 runs whose sums are made in another order drift apart by a few thousandths of their size in as many steps as
# are run here. A step that is skipped, tokens that are not the same or a scale that is wrong come to ten times as much.
CURVES_TOLERANCE = 0.01


def row_of(contender: Contender, work: Work, found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one contender, without those that compare it with others.

    Args:
        found: "why_not", or what its processes answered: "imported", "built" and "first_step" in seconds from their beginning,
            "blocks" as lists of steps, "cold" like it for a start with nothing kept, "memory" and "peak_rss_bytes".
    """
    row: dict[str, Any] = {"name": contender.name, "title": contender.title, "kind": contender.kind,
                           "tried_here": contender.tried}
    if "why_not" in found:
        return {**row, "why_not": found["why_not"]}
    speeds = [work.step_tokens * len(steps) / sum(step["seconds"] for step in steps) for steps in found["blocks"] if steps]
    of_cpu = [step["cpu_seconds"] for steps in found["blocks"] for step in steps if "cpu_seconds" in step]
    losses = [step.get("loss") for steps in [found.get("first", []), *found["blocks"]] for step in steps]
    memory = found.get("memory") or {}
    return {
        **row, "tokens_per_second": statistics.median(speeds) if speeds else None, "slowest": min(speeds, default=None),
        "fastest": max(speeds, default=None), "num_blocks": len(speeds), "losses": losses,
        "cpu_seconds": statistics.median(of_cpu) if of_cpu else None,
        "import_seconds": found.get("imported"), "first_step_seconds": found.get("first_step"),
        "cold_first_step_seconds": (found.get("cold") or {}).get("first_step"),
        "start_seconds": found.get("built"), "cold_start_seconds": (found.get("cold") or {}).get("built"),
        "stages": found.get("stages", {}),
        "train_tensor_bytes": memory.get("train"), "load_tensor_bytes": memory.get("load"),
        "peak_rss_bytes": found.get("peak_rss_bytes"),
    }


def compare_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With each row's ratio to the first one of ours that has a speed, and whether its losses agree with that one's."""
    reference = next((row for row in rows if row["kind"] == "qlora" and row.get("tokens_per_second")), None)
    return [row if "why_not" in row or reference is None else {
        **row, "times_ours": _ratio(row["tokens_per_second"], reference["tokens_per_second"]), "reference": reference["name"],
        "curves": _agreement(row["losses"], reference["losses"]),
    } for row in rows]


def _ratio(value: float | None, reference: float) -> float | None:
    return None if value is None else value / reference


def _agreement(losses: Sequence[float | None], others: Sequence[float | None]) -> dict[str, Any]:
    """The largest relative difference over the steps that both have."""
    pairs = [(a, b) for a, b in zip(losses, others) if a is not None and b is not None]
    if not pairs:
        return {"agree": None, "largest_difference": None, "num_steps": 0}
    differences = [abs(a - b) / abs(b) if b else abs(a - b) for a, b in pairs]
    largest = math.nan if any(map(math.isnan, differences)) else max(differences)  # max() would pass over it
    return {"agree": largest <= CURVES_TOLERANCE, "largest_difference": largest, "num_steps": len(pairs)}


def goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How ours does against the fastest of the plain settings, in sentences."""
    peers = [row for row in rows if row["kind"] in ("trl", "trainer") and row.get("tokens_per_second")]
    ours = [row for row in rows if row["kind"] == "qlora" and row.get("tokens_per_second")]
    if not peers or not ours:
        return []
    lines = []
    for kind, words in (("trl", "the plain stack with TRL"), ("trainer", "the plain stack without TRL, which keeps all logits")):
        some = [row for row in peers if row["kind"] == kind]
        if not some:
            continue
        best = max(some, key=lambda row: row["tokens_per_second"])
        for mine in ours:
            memory = _memory_words(mine, best)
            times = mine["tokens_per_second"] / best["tokens_per_second"]
            lines.append(f"{mine['name']}: {times:.2f} times the tokens/s of the best of {words} ({best['name']}){memory}.")
    started = [row for row in peers if row["kind"] == "trl" and row["start_seconds"]]
    mine = next((row for row in ours if row["start_seconds"]), None)
    if started and mine:
        lines.append(_start_words(mine, min(started, key=lambda row: row["start_seconds"])))
    return lines


def _start_words(mine: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """How soon each is ready to train, with and without the imports of libraries, which nobody can leave out."""
    stages = ", ".join(f"{text} {seconds:.1f}" for text, seconds in mine["stages"].items() if seconds >= 0.05)
    seconds, others = mine["start_seconds"], best["start_seconds"]
    words = (f"Ready to train on a kept base after {seconds:.1f} s; the plain stack after {others:.1f} s "
             f"({others / seconds:.1f} times as long)")
    if mine["import_seconds"] and best["import_seconds"]:
        work, their_work = seconds - mine["import_seconds"], others - best["import_seconds"]
        words += f"; without imports {work:.1f} s and {their_work:.1f} s ({their_work / work:.1f} times as long)"
    return f"{words}. Of ours: {stages}." if stages else f"{words}."


def _memory_words(mine: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    if not mine.get("train_tensor_bytes") or not best.get("train_tensor_bytes"):
        return ""
    return f", at {mine['train_tensor_bytes'] / best['train_tensor_bytes']:.2f} times its tensor memory"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    reference = next((row["reference"] for row in rows if "reference" in row), "ours")
    lines = [
        f"| | tokens/s | from, to | times {reference} | CPU a step, s | tensors, GiB | process, GiB | import, s | ready, s | first step, s "
        "| nothing kept, s | first, last loss | curves |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        if "why_not" in row:
            lines.append(f"| {row['name']} | {row['why_not']} |" + " |" * 11)
            continue
        curves = row.get("curves") or {"agree": None, "largest_difference": None}
        losses = [value for value in row["losses"] if value is not None]
        lines.append("| " + " | ".join([
            row["name"] if row["tried_here"] else f"{row['name']} (runner not tried)", _number(row["tokens_per_second"], 1),
            f"{_number(row['slowest'], 1)}, {_number(row['fastest'], 1)}", _number(row.get("times_ours"), 2),
            _number(row["cpu_seconds"], 2),
            _gib(row["train_tensor_bytes"]), _gib(row["peak_rss_bytes"]), _number(row["import_seconds"], 1),
            _number(row["start_seconds"], 1), _number(row["first_step_seconds"], 1), _number(row["cold_first_step_seconds"], 1),
            f"{losses[0]:.3f}, {losses[-1]:.3f}" if losses else "-", _curve_words(curves),
        ]) + " |")
    return "\n".join(lines)


def short_table(models: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """What a reader in a hurry wants to know, in Markdown: those who were there, with three figures for each model."""
    rows = {name: [row for row in found if "why_not" not in row] for name, found in models.items()}
    figures = ("tokens/s", "peak of tensors, GiB", "ready after, s")
    titles = [f"{name.rpartition('/')[2]}: {figure}" if figure == figures[0] else figure for name in rows for figure in figures]
    lines = [f"| | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
    for each in next(iter(rows.values())):
        cells = [f"**{each['title']}**" if each["kind"] == "qlora" else each["title"]]
        for found in rows.values():
            row = next((row for row in found if row["name"] == each["name"]), None)
            cells += ["-"] * len(figures) if row is None else [
                _number(row["tokens_per_second"], 0), _gib(row["train_tensor_bytes"]), _number(row["start_seconds"], 1)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _curve_words(curves: Mapping[str, Any]) -> str:
    if curves["agree"] is None:
        return "not known"
    share = f"{100 * curves['largest_difference']:.2f} %"
    return f"agree to {share}" if curves["agree"] else f"DIFFER by {share}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f}"


def plot(rows_by_model: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Bars of speed and of tensor memory, a pair of panels for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(rows_by_model), 2, figsize=(11, 0.5 + 2.7 * len(rows_by_model)), squeeze=False)
    for (model, rows), (speed, memory) in zip(rows_by_model.items(), panels):
        shown = [row for row in rows if row.get("tokens_per_second")][::-1]
        names = [row["name"] for row in shown]
        colours = ["#2a6f97" if row["kind"] == "qlora" else "#b8b8b8" for row in shown]
        values = [row["tokens_per_second"] for row in shown]
        below = [row["tokens_per_second"] - row["slowest"] for row in shown]
        above = [row["fastest"] - row["tokens_per_second"] for row in shown]
        bars = speed.barh(names, values, color=colours, xerr=[below, above], ecolor="#555555")
        speed.bar_label(bars, fmt="%.0f", padding=6)
        speed.set(title=f"{model}: tokens/s (higher is better)")
        sizes = [(row["train_tensor_bytes"] or 0) / 2**30 for row in shown]
        memory.bar_label(memory.barh(names, sizes, color=colours), fmt="%.2f", padding=6)
        memory.set(title="peak of tensors in training, GiB (lower is better)")
        for panel in (speed, memory):
            panel.margins(x=0.18)
            panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
