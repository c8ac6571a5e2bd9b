"""What the lines of `qlora measure` come to: figures over all of them, and tables in Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora.measuring.one_cell import COMPARED_PHASES, compared_peak
from qlora.units import format_bytes


@dataclass(frozen=True)
class Summary:
    """What the lines of one device come to. Errors in percent of what was measured; below 0 is an under-estimate.

    Attributes:
        num_measured: came to their end. The rest was refused and not tried, ran out of memory or failed.
        num_under: more was measured than planned; `num_over_margin`: by more than the plan's margin.
        num_out_of_memory: although the plan said that they fit; `num_over_budget`: took more than their budget in all.
        num_false_refusals: refused, and within the budget all the same; `num_refused_tried` is out of how many.
        num_long_answers: generation took more than it was planned to, by more than the margin.
        budgets_bytes: of all lines that were planned, each once; families: of their models.
        reserved: what torch's allocator held, on a GPU; of runs whose allocator had to try again it says nothing.
    """

    device: str
    families: tuple[str, ...]
    budgets_bytes: tuple[int, ...]
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
    worst_reserved_error: float | None
    most_reserved_under: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


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
        device=lines[0]["device"], families=tuple(sorted({family_of(line["model"]) for line in lines if "planned" in line})),
        budgets_bytes=tuple(sorted({line["budget_bytes"] for line in lines if "planned" in line})),
        num_cells=len(lines), num_measured=len(ended),
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
        worst_reserved_error=max(reserved, key=abs, default=None), most_reserved_under=min(reserved, default=None),
    )


def summaries(lines: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """One for each device, in the order in which they come first."""
    devices = dict.fromkeys(line["device"] for line in lines)
    return [summarise([line for line in lines if line["device"] == device]) for device in devices]


def family_of(model: str) -> str:
    """ "llama" of "meta-llama/Llama-3.1-8B" and of "small:llama:6x768"."""
    name = model.split(":")[1] if model.startswith("small:") else model.rpartition("/")[2]
    letters = re.match(r"[A-Za-z]*", name)[0].lower()
    return "smollm" if letters.startswith("smollm") else letters or name


def _over_budget(line: Mapping[str, Any]) -> bool:
    measured = line["measured"]
    context = measured["context_bytes"] if measured["context_bytes"] is not None else line["planned"]["context_bytes"]
    return max((measured["reserved"] or measured["phases"]).values()) + context > line["budget_bytes"]


def _over_margin(line: Mapping[str, Any], phases: Sequence[str]) -> bool:
    planned, measured = (max(line[side]["phases"][phase] for phase in phases) for side in ("planned", "measured"))
    return measured > planned + line["planned"]["margin_bytes"]


# --- tables ------------------------------------------------------------------------------------------------------------

CELL_TITLES = ("model", "budget", "rows", "tokens", "r", "how", "planned", "measured", "error", "reserved", "tok/s", "loss")
PLAN_TITLES = ("model", "budget", "rows", "tokens", "r", "how", "planned", "fits")


def cell_row(line: Mapping[str, Any]) -> tuple[str, ...]:
    """What a line says, one text for each of `CELL_TITLES`."""
    if "planned" not in line:
        return (line["cell"], *[""] * 7, str(line.get("error", ""))[:100], "", "", "")
    shape = (*_shape(line), format_bytes(compared_peak(line["planned"]["phases"], line["kind"])))
    measured = line.get("measured")
    if measured is None:
        return (*shape, "", str(line.get("error", "refused"))[:100], "", "", "")
    refused = "" if line["fits"] else "refused, "
    reserved = format_bytes(max(measured["reserved"].values())) if measured["reserved"] else ""
    if line["out_of_memory"]:
        return (*shape, "", f"{refused}out of memory in {list(measured['phases'])[-1]}", reserved, "", "")
    return (
        *shape, format_bytes(compared_peak(measured["phases"], line["kind"])), refused + percent(line["error_percent"]), reserved,
        f"{line['tokens_per_second']:,.0f}" if line["tokens_per_second"] else "",
        " to ".join(f"{loss:.2f}" for loss in line["loss"]),
    )


def plan_row(line: Mapping[str, Any]) -> tuple[str, ...]:
    """What is planned for a cell, one text for each of `PLAN_TITLES`."""
    if "planned" not in line:
        return (line["cell"], *[""] * 6, str(line.get("error", ""))[:100])
    return (*_shape(line), format_bytes(line["planned"]["peak_bytes"]), "yes" if line["fits"] else "no")


def _shape(line: Mapping[str, Any]) -> tuple[str, ...]:
    settings = line["settings"]
    return (
        line["model"], format_bytes(line["budget_bytes"]), f"{settings['train.micro_batch']} x {settings['train.accumulation']}",
        f"{settings['data.max_length']:,}", str(settings["lora.r"]), strategy(settings),
    )


def strategy(settings: Mapping[str, Any]) -> str:
    """How memory is saved, and what else is not as usual, in a few words."""
    streamed = settings.get("memory.streamed_layers") or 0
    words = [
        "checkpointing" if settings["memory.checkpointing"] else "no checkpointing",
        f"{streamed} layers streamed from {settings.get('memory.stream_from')}" if streamed else "",
        "hidden states in RAM" if settings.get("memory.offload_activations") else "",
        "adapters in RAM" if settings.get("memory.offload_adapters") else "",
        "embedding in RAM" if settings.get("memory.embedding_device") == "host" else "",
        f"head {head}" if (head := settings.get("memory.head_format", "resident")) != "resident" else "",
        f"loss by {chunk}" if (chunk := settings.get("memory.loss_chunk", "none")) != "none" else "",
        {True: "fused", "projections": "fused projections"}.get(settings.get("memory.fused_lora"), ""),
        f"MLP by {tile}" if (tile := settings.get("memory.mlp_tile", "none")) != "none" else "",
        "packed" if settings.get("data.packing") else "",
        settings["train.optimizer"], dtype if (dtype := settings.get("model.dtype", "bf16")) != "bf16" else "",
    ]
    return ", ".join(filter(None, words))


def summary_rows(found: Summary) -> dict[str, str]:
    """What a summary says, each figure by its name."""
    s, none = found, "none was tried" if found.num_refused else "none"
    return {
        "cells, of them trained to the end": f"{s.num_cells}, {s.num_measured}",
        "families": ", ".join(s.families), "budgets": ", ".join(map(format_bytes, s.budgets_bytes)),
        "error of the peak: mean, median": f"{percent(s.mean_error, sign=False)}, {percent(s.median_error, sign=False)}",
        "error of the peak: worst": percent(s.worst_error),
        "most under": percent(s.most_under) if (s.most_under or 0) < 0 else "none",
        "under-estimates, of them beyond the margin": f"{s.num_under}, {s.num_over_margin}",
        "planned to fit, and out of memory": str(s.num_out_of_memory),
        "planned to fit, and over the budget in all": str(s.num_over_budget),
        "refused, of them trained within the budget all the same":
            f"{s.num_refused}, {f'{s.num_false_refusals} of {s.num_refused_tried} tried' if s.num_refused_tried else none}",
        "answers that took more than planned": str(s.num_long_answers),
        "error of what the allocator held: mean, worst":
            f"{percent(s.mean_reserved_error, sign=False)}, {percent(s.worst_reserved_error)}",
        "the same, most under": percent(s.most_reserved_under),
        "runs with retries of the allocator": str(s.num_retried),
        "failed": str(s.num_failed),
    }


def markdown_tables(lines: Sequence[Mapping[str, Any]]) -> str:
    """Every line, then one column of figures for each device."""
    found = summaries(lines)
    columns = [summary_rows(each) for each in found]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]] if columns else []
    return f"{markdown(CELL_TITLES, map(cell_row, lines))}\n\n{markdown(('', *(each.device for each in found)), rows)}"


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; columns without any content are left out."""
    plain = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    kept = [column for column, title in enumerate(titles) if not plain or title == "" or any(row[column] for row in plain)]
    lines = [[row[column] for column in kept] for row in (titles, ("---",) * len(titles), *plain)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(value: float | None, *, sign: bool = True) -> str:
    """'+0.05 %', or a dash; three places where two would show nothing."""
    if value is None:
        return "-"
    places = 2 if abs(value) >= 0.005 or value == 0 else 3
    return f"{value:{'+' if sign else ''}.{places}f} %"
