"""What `qlora plan` and `qlora models` show: verdict first, then the memory, then every setting with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora.catalog import catalog_entry, find_id
from qlora.units import format_bytes, format_count, format_seconds
from qlora.views.memory_bar import Legend, MemoryBar
from qlora.views.pieces import heading, make_table, shown

if TYPE_CHECKING:
    from qlora.planning.plan import Plan


def plan_view(plan: Plan) -> RenderableType:
    """Verdict, memory by part and by phase, the cost of a run, every decision with its reason, and what would fit.

    Plain defaults are left out; they are in plan.json.
    """
    blocks: list[RenderableType] = [
        heading(f"Plan for {plan.model}"), _verdict(plan), Text(),
        MemoryBar(plan.parts, plan.budget_bytes), Legend(plan.parts, plan.budget_bytes), Text(),
        _phases(plan), Text(), _cost(plan), *_alternatives(plan), Text(), _decisions(plan), *_given(plan),
        *(Text(f"· {note}", style="yellow") for note in plan.notes),
    ]
    return Group(*blocks)


def compare_view(plans: Sequence[Plan]) -> RenderableType:
    """One row a card: the verdict, what would be trained with, and how much of the card that takes."""
    numbers = ("r", "batch", "tokens", "peak/budget", "tok/s")
    table = make_table("card", "fits", "r", "batch", "tokens", "ckpt", "optimizer", "peak/budget", "tok/s",
                       gap=1, right=numbers)
    for column in table.columns[1:]:
        column.no_wrap = True
    for plan in plans:
        settings = plan.settings
        batch = f"{_setting(settings, 'train.micro_batch')} x {_setting(settings, 'train.accumulation')}"
        table.add_row(
            Text(_card(plan)), _mark(plan), _setting(settings, "lora.r"), batch, _setting(settings, "data.max_length"),
            _setting(settings, "memory.checkpointing"), _setting(settings, "train.optimizer"),
            _of_budget(plan), _speed(plan), style="" if plan.fits else "dim",
        )
    models = list(dict.fromkeys(plan.model for plan in plans))
    foot = [Text(f"{_card(plan)}: {_too_big(plan)}", style="yellow") for plan in plans if not plan.fits]
    legend = Text("batch: rows at once x accumulation; tokens: longest row; ckpt: checkpointing of activations", style="dim")
    return Group(heading(f"{', '.join(models)} by card"), table, legend, *foot)


def models_view(plans: Sequence[Plan], *, num_planned: int | None = None) -> RenderableType:
    """One row a model, in the order given: what can be trained on this card, and with what. A plan without a peak is that
    of a model that cannot be trained at all; its notes say why.

    Args:
        num_planned: how many models were looked at, where some are left out here.
    """
    numbers = ("params", "r", "rows", "longest", "peak")
    table = make_table("model", "params", "fits", "r", "rows", "longest", "peak", gap=1, right=numbers)
    for column in table.columns[1:]:
        column.no_wrap = True
    for plan in plans:
        count = num_parameters(plan.model)
        table.add_row(
            Text(plan.model), "-" if count is None else format_count(count), _mark(plan), _setting(plan.settings, "lora.r"),
            _setting(plan.settings, "train.micro_batch"), "-" if plan.longest_length is None else f"{plan.longest_length:,}",
            format_bytes(plan.peak_bytes) if plan.peak_bytes else "-", style="" if plan.fits else "dim",
        )
    num_fits = sum(plan.fits for plan in plans)
    devices = ", ".join(dict.fromkeys(f"{_card(plan)} ({format_bytes(plan.budget_bytes)})" for plan in plans))
    title = heading(f"{num_fits} of {num_planned or len(plans)} models fit" + (f" on {devices}" if devices else ""))
    legend = Text("rows: micro-batch; longest: tokens of rows that fit at most, one at a time; peak: all that the run takes",
                  style="dim")
    impossible = [Text(f"{plan.model}: {' '.join(plan.notes)}", style="yellow") for plan in plans if not plan.peak_bytes]
    return Group(title, table, legend, *impossible)


def num_parameters(model: str) -> int | None:
    """Parameters of a model of the catalog; None for any other."""
    return None if find_id(model) is None else catalog_entry(model).parameters


# --- the blocks of a plan ----------------------------------------------------------------------------------------------


def _verdict(plan: Plan) -> Text:
    sizes = f"{format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)} on {plan.device}"
    if plan.fits:
        return Text("Fits: ", style="bold green").append(sizes, style="default")
    text = Text("Does not fit: ", style="bold red").append(sizes, style="default")
    return text.append(f"; the largest part is {plan.largest_part} ({format_bytes(plan.parts[plan.largest_part])})",
                       style="default")


def _phases(plan: Plan) -> RenderableType:
    """Tensor memory of each phase side by side, the highest marked."""
    if not plan.phases:
        return Text()
    table = make_table("", *plan.phases, right=plan.phases)
    table.columns[0].no_wrap = True
    peak = plan.peak_phase
    table.add_row("tensors", *(Text(format_bytes(size), style="bold" if phase == peak else "")
                               for phase, size in plan.phases.items()))
    table.add_row("", *("peak" if phase == peak else "" for phase in plan.phases))
    return table


def _cost(plan: Plan) -> Table:
    table = make_table("", "")
    table.columns[0].style, table.columns[0].no_wrap = "dim", True
    rows = [("allocator", f"torch holds up to {format_bytes(plan.reserved_bytes)} at its highest")]
    rows = rows if plan.kind == "cuda" else []  # elsewhere no allocator stands between tensors and memory
    rows += [("host RAM", f"{format_bytes(plan.host_peak_bytes)} at its highest"), ("disk", format_bytes(plan.disk_bytes))]
    if plan.num_steps is not None:
        rows.append(("steps", f"{plan.num_steps:,} optimizer step{'' if plan.num_steps == 1 else 's'}"))
    if plan.tokens_per_second is not None:
        basis = f" ({plan.speed_basis})" if plan.speed_basis else ""
        rows.append(("speed", f"about {plan.tokens_per_second:,.0f} tokens/s{basis}"))
    if plan.longest_length is not None:
        rows.append(("longest rows", f"{plan.longest_length:,} tokens fit at most, one row at a time, activations computed anew"))
    if plan.fallbacks:
        rows.append(("if memory runs short", _fallbacks(plan)))
    if plan.seconds:
        rows.append(("planned in", format_seconds(plan.seconds)))
    for name, text in rows:
        table.add_row(name, Text(text))
    return table


def _fallbacks(plan: Plan) -> str:
    """'2 x 8 rows (5.10 GiB), then 1 x 16 (3.90 GiB), then with checkpointing (3.20 GiB)'."""
    texts, rows_before = [], plan.settings.get("train.micro_batch")
    for step in plan.fallbacks:
        rows = f"{step.micro_batch} x {step.accumulation}{'' if texts else ' rows'}"
        name = "with checkpointing" if step.micro_batch == rows_before else rows
        texts.append(f"{name} ({format_bytes(step.peak_bytes)})")
        rows_before = step.micro_batch
    return ", then ".join(texts)


def _alternatives(plan: Plan) -> list[RenderableType]:
    """What fits instead; nothing where the plan fits."""
    if plan.fits:
        return []
    if not plan.alternatives:
        return [Text(), Text("Nothing near this fits either: name a smaller model or a larger card.", style="bold")]
    table = make_table("change", "needs", "add to the command")
    table.columns[1].no_wrap = True
    for found in plan.alternatives:
        table.add_row(Text(found.change), f"{format_bytes(found.peak_bytes)} of {format_bytes(found.budget_bytes)}",
                      Text(" ".join(found.overrides) or "-", style="bold"))
    return [Text(), heading("What fits instead"), table]


def _decisions(plan: Plan) -> Table:
    """Every value that was neither given nor a plain default, with its reason."""
    table = make_table("setting", "value", "because")
    table.columns[0].no_wrap = True
    for key, decision in plan.decisions.items():
        if decision.source not in ("given", "default"):
            table.add_row(key, Text(shown(decision.value), style="bold"), Text(decision.reason, style="dim"))
    return table


def _given(plan: Plan) -> list[Text]:
    given = [f"{key}={shown(decision.value)}" for key, decision in plan.decisions.items()
             if decision.source == "given" and (key, decision.value) != ("data.path", "none")]  # a model planned without rows
    return [Text(f"Given: {'  '.join(given)}", style="dim")] if given else []


# --- cells -------------------------------------------------------------------------------------------------------------


def _mark(plan: Plan) -> Text:
    return Text("yes", style="green") if plan.fits else Text("no", style="red")


def _card(plan: Plan) -> str:
    """The device's name without its maker, who is the same in every row."""
    return plan.device.removeprefix("NVIDIA ").removeprefix("GeForce ")


def _too_big(plan: Plan) -> str:
    part = plan.largest_part
    return (f"{format_bytes(plan.peak_bytes - plan.budget_bytes)} too much; the largest part is {part}, "
            f"{format_bytes(plan.parts[part])}")


def _of_budget(plan: Plan) -> str:
    """'6.10/8.00 GiB'; with both units where they differ."""
    peak, budget = format_bytes(plan.peak_bytes), format_bytes(plan.budget_bytes)
    return f"{peak.split()[0]}/{budget}" if peak.split()[1] == budget.split()[1] else f"{peak}/{budget}"


def _speed(plan: Plan) -> str:
    return "-" if plan.tokens_per_second is None else f"{plan.tokens_per_second:,.0f}"


def _setting(settings: dict[str, Any], key: str) -> str:
    value = settings.get(key, "-")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shown(value)
