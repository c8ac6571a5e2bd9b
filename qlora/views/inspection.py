"""What `qlora inspect` shows of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from qlora.units import format_bytes, format_count
from qlora.views.pieces import heading, make_table


def inspection_view(found: Mapping[str, Any]) -> RenderableType:
    """What `qlora inspect` prints; `found` is `qlora.architecture.inspection`."""
    r = found["r"]
    published = found["published_parameters"]
    differs = f" (published: {published:,})" if published not in (None, found["num_parameters"]) else ""
    four, sixteen = found["four_bit"], found["sixteen_bit"]
    head = make_table("", "")
    head.add_row("parameters", f"{found['num_parameters']:,}{differs}")
    head.add_row("in 4 bits", f"{four['parameters']:,} in {four['modules']} modules, {format_bytes(four['bytes'])} with their scales")
    head.add_row("in 16 bits", f"{sixteen['parameters']:,}, {format_bytes(sixteen['bytes'])} (embeddings "
                               f"{format_count(sixteen['embeddings'])}{', tied to the head' if found['tied_embeddings'] else ''})")
    head.add_row("longest context", f"{found['max_positions']:,} tokens" if found["max_positions"] else "no limit in the config")
    sizes = ("in -> out", "count", f"LoRA parameters at r={r}")
    table = make_table("projection", "kind", *sizes, right=sizes)
    for row in found["projections"]:
        style = "" if row["hit"] else "dim"
        shape = f"{row['in_features']:,} -> {row['out_features']:,}"
        table.add_row(row["place"], row["kind"], shape, str(row["count"]),
                      f"{row['lora_parameters']:,}" if row["hit"] else "-", style=style)
    table.add_section()
    table.add_row("total", "", "", str(found["num_targets"]), f"{found['lora_parameters']:,}", style="bold")
    share = Text(f"{found['lora_parameters']:,} trainable parameters, {found['percent_trainable']:.2f} % of the model. "
                 f"PEFT's target_modules: {', '.join(found['patterns'])}")
    title = heading(f"{found['model']}: {found['model_type']}, {found['num_layers']} layers")
    return Group(title, head, table, share, *(Text(f"· {note}", style="yellow") for note in found["notes"]))
