"""What the lines of scripts/measure come to: which cells are done, receipts, a summary, and Markdown tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.planning.receipts import Receipt
from qlora.training.measure import COMPARED_PHASES, Cell, compared_peak
from qlora.units import format_bytes


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The last line of each cell and device, in the order in which they came first; a torn line is left out."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            found[line["cell"], line["device"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return list(found.values())


def cells_to_do(
    cells: Iterable[Cell], lines: Iterable[Mapping[str, Any]], device: str, *, try_refused: bool = False
) -> list[Cell]:
    """Those that have no result on this device yet. A failure is no result; with `try_refused` a refusal is none either."""
    done = {line["cell"] for line in lines
            if line["device"] == device and "error" not in line and ("measured" in line or not try_refused)}
    return [cell for cell in dict.fromkeys(cells) if str(cell) not in done]


def receipt_of(line: Mapping[str, Any]) -> Receipt | None:
    """The line as a receipt, from which the margin of later plans follows; None where no run came to its end."""
    if line.get("error_percent") is None:
        return None
    on_gpu, measured = line["kind"] == "cuda", line["measured"]
    planned, taken = ({phase: line[side]["phases"][phase] for phase in COMPARED_PHASES[line["kind"]]}
                      for side in ("planned", "measured"))
    return Receipt(
        device=line["device"], kind=line["kind"], model=line["model"], planned=planned, measured=taken,
        capability=tuple(line["capability"]) if line["capability"] else None, allocator=line["allocator"], os=line["os"],
        versions=line["versions"], settings=line["settings"],
        planned_reserved={"run": line["planned"]["reserved_bytes"]} if measured["reserved"] else {},
        measured_reserved=measured["reserved"], context_bytes=measured["context_bytes"], num_retries=line["retries"],
        # On a CPU the profiler has slowed the run down.
        tokens_per_second=line["tokens_per_second"] if on_gpu else None,
        flops_per_token=line["flops_per_token"], date=line["date"],
    )


@dataclass(frozen=True)
class Summary:
    """What the lines of one device come to. Errors in percent of what was measured; below 0 is an under-estimate.

    Attributes:
        num_measured: came to their end. The rest was refused and not tried, ran out of memory or failed.
        num_under: more was measured than planned; `num_over_margin`: by more than the plan's margin.
        num_out_of_memory: although the plan said that they fit; `num_over_budget`: took more than their budget in all.
        num_false_refusals: refused, and within the budget all the same; `num_refused_tried` is out of how many.
        num_long_answers: generation took more than it was planned to, by more than the margin.
    """

    device: str
    num_cells: int
    num_measured: int
    num_failed: int
    num_refused: int
    num_refused_tried: int
    num_false_refusals: int
    num_out_of_memory: int
    num_over_budget: int
    num_under: int
    num_over_margin: int
    num_retried: int
    num_long_answers: int
    mean_error: float | None
    median_error: float | None
    worst_error: float | None
    most_under: float | None
    mean_reserved_error: float | None
    most_reserved_under: float | None


def summarise(lines: Sequence[Mapping[str, Any]]) -> Summary:
    """One summary; the lines are of one device."""
    ran = [line for line in lines if "measured" in line]
    ended = [line for line in ran if not line["out_of_memory"]]
    refused = [line for line in lines if line.get("fits") is False]
    errors = [line["error_percent"] for line in ended]
    # Retries and a cap in reach keep the allocator below what it would take.
    held = [line["reserved_error_percent"] for line in ended if not line["retries"]]
    reserved = [error for error in held if error is not None]
    sizes = [abs(error) for error in errors]
    return Summary(
        device=lines[0]["device"], num_cells=len(lines), num_measured=len(ended),
        num_failed=sum("error" in line for line in lines), num_refused=len(refused),
        num_refused_tried=sum(line in ran for line in refused),
        num_false_refusals=sum(line in ended and not _over_budget(line) for line in refused),
        num_out_of_memory=sum(line["out_of_memory"] and line["fits"] for line in ran),
        num_over_budget=sum(line["fits"] and _over_budget(line) for line in ended),
        num_under=sum(error < 0 for error in errors),
        num_over_margin=sum(_over_margin(line, COMPARED_PHASES[line["kind"]]) for line in ended),
        num_retried=sum(line["retries"] > 0 for line in ended),
        num_long_answers=sum(_over_margin(line, ("generate",)) for line in ended),
        mean_error=statistics.mean(sizes) if sizes else None, median_error=statistics.median(sizes) if sizes else None,
        worst_error=max(errors, key=abs, default=None), most_under=min(errors, default=None),
        mean_reserved_error=statistics.mean(map(abs, reserved)) if reserved else None,
        most_reserved_under=min(reserved, default=None),
    )


def _over_budget(line: Mapping[str, Any]) -> bool:
    measured = line["measured"]
    context = measured["context_bytes"] if measured["context_bytes"] is not None else line["planned"]["context_bytes"]
    return max((measured["reserved"] or measured["phases"]).values()) + context > line["budget_bytes"]


def _over_margin(line: Mapping[str, Any], phases: Sequence[str]) -> bool:
    planned, measured = (max(line[side]["phases"][phase] for phase in phases) for side in ("planned", "measured"))
    return measured > planned + line["planned"]["margin_bytes"]


# --- tables ------------------------------------------------------------------------------------------------------------


def cells_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """One row a line, in Markdown."""
    titles = ("model", "budget", "rows", "tokens", "r", "ckpt", "optimizer", "planned", "measured", "error", "reserved",
              "tok/s", "loss")
    return _table(titles, [_row(line) for line in lines])


def summary_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """One column a device, in Markdown."""
    devices = dict.fromkeys(line["device"] for line in lines)
    columns = [_column(summarise([line for line in lines if line["device"] == device])) for device in devices]
    names = columns[0] if columns else ()
    return _table(("", *devices), [(name, *(column[name] for column in columns)) for name in names])


def _column(s: Summary) -> dict[str, str]:
    none = "none was tried" if s.num_refused else "none"
    return {
        "cells, of them trained to the end": f"{s.num_cells}, {s.num_measured}",
        "error of the peak: mean, median": f"{_percents(s.mean_error, sign=False)}, {_percents(s.median_error, sign=False)}",
        "error of the peak: worst": _percents(s.worst_error),
        "most under": _percents(s.most_under) if (s.most_under or 0) < 0 else "none",
        "under-estimates, of them beyond the margin": f"{s.num_under}, {s.num_over_margin}",
        "planned to fit, and out of memory": str(s.num_out_of_memory),
        "planned to fit, and over the budget in all": str(s.num_over_budget),
        "refused, of them trained within the budget all the same":
            f"{s.num_refused}, {f'{s.num_false_refusals} of {s.num_refused_tried} tried' if s.num_refused_tried else none}",
        "answers that took more than planned": str(s.num_long_answers),
        "error of what the allocator held: mean, most under":
            f"{_percents(s.mean_reserved_error, sign=False)}, {_percents(s.most_reserved_under)}",
        "runs with retries of the allocator": str(s.num_retried),
        "failed": str(s.num_failed),
    }


def _row(line: Mapping[str, Any]) -> tuple[str, ...]:
    if "planned" not in line:
        return (line["cell"], *[""] * 6, "", "", line["error"][:100], "", "", "")
    settings = line["settings"]
    shape = (
        line["model"], format_bytes(line["budget_bytes"]),
        f"{settings['train.micro_batch']} x {settings['train.accumulation']}",
        f"{settings['data.max_length']:,}", str(settings["lora.r"]), "on" if settings["memory.checkpointing"] else "off",
        settings["train.optimizer"], format_bytes(compared_peak(line["planned"]["phases"], line["kind"])),
    )
    measured = line.get("measured")
    if measured is None:
        return (*shape, "", line.get("error", "refused")[:100], "", "", "")
    refused = "" if line["fits"] else "refused, "
    reserved = format_bytes(max(measured["reserved"].values())) if measured["reserved"] else ""
    if line["out_of_memory"]:
        return (*shape, "", f"{refused}out of memory in {list(measured['phases'])[-1]}", reserved, "", "")
    return (
        *shape, format_bytes(compared_peak(measured["phases"], line["kind"])),
        refused + _percents(line["error_percent"]), reserved,
        f"{line['tokens_per_second']:,.0f}", " to ".join(f"{loss:.2f}" for loss in line["loss"]),
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    plain = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [titles, ("---",) * len(titles), *plain]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _percents(value: float | None, *, sign: bool = True) -> str:
    return "-" if value is None else f"{value:+.2f} %" if sign else f"{value:.2f} %"
