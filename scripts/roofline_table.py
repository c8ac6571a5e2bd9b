#!/usr/bin/env python3
"""Print the table of qlora/engine/README.md, "When streaming pays": arithmetic on published figures, not measurements.

    python scripts/roofline_table.py            print it
    python scripts/roofline_table.py --write    put it into the README
    python scripts/roofline_table.py --check    exit code 1 where the README has another one
"""

from __future__ import annotations

import sys
from pathlib import Path

from pages import Place

from qlora.architecture import Architecture, describe, find_config
from qlora.catalog.cards import find_card
from qlora.hardware import device_from_card
from qlora.planning.roofline import NVME_GB_S, SATA_GB_S, Link, StreamedSpeed, link_of, link_rate
from qlora.planning.speed import estimate_speed

README = Path(__file__).resolve().parents[1] / "qlora" / "engine" / "README.md"
_PLACE = Place(README, "streaming", "scripts/roofline_table.py")

# Model, and the cards that are too small for all of its layers; a slot is named where it is slower than the card.
_CASES = [
    ("meta-llama/Llama-3.1-70B", ["3060 12GB", "4060", "3090", ("3090", 3), "4090", ("4090", 3), "5090"]),
    ("Qwen/Qwen3-32B", ["3060 12GB", "4060", "4060 Ti 16GB", "4070", "5070"]),
    ("meta-llama/Llama-3.1-8B", ["1650", "3050 4GB laptop", "3050 6GB"]),
]
_LENGTH = 1024
_DISKS = {"RAM": None, "NVMe": NVME_GB_S, "SATA": SATA_GB_S}
_SHARES = [("RAM", 1024), ("NVMe", 1024), ("NVMe", 4096), ("NVMe", 16384)]


def table() -> str:
    """Rows of 1,024 tokens, one at once, all layers streamed."""
    titles = [
        "model", "card", "from RAM, GB/s", "tokens/s once hidden", "hides from: RAM", "NVMe", "SATA",
        *(f"share of speed, {source}, {visit:,} a visit" for source, visit in _SHARES),
    ]
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)]]
    for name, cards in _CASES:
        architecture = describe(find_config(name))
        for card in cards:
            lines.append(_row(name.partition("/")[2], architecture, *(card if isinstance(card, tuple) else (card, None))))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(model: str, architecture: Architecture, name: str, generation: int | None) -> list[str]:
    card = find_card(name)
    link = link_of(device_from_card(card)) if generation is None else link_rate(generation, card.pcie[1])
    where = card.name.removeprefix("GeForce ") + (f", slot of PCIe {generation}.0" if generation else "")
    found = {source: _speed(architecture, name, link, _LENGTH, gb_s) for source, gb_s in _DISKS.items()}
    shares = [_speed(architecture, name, link, visit, _DISKS[source]).share for source, visit in _SHARES]
    return [
        model, where, f"{link.gigabytes_per_second:g}", f"{found['RAM'].resident_tokens_per_second:,.0f}",
        *(f"{speed.hidden_from_tokens:,}" for speed in found.values()), *(f"{100 * share:.0f} %" for share in shares),
    ]


def _speed(architecture: Architecture, card: str, link: Link, visit: int, disk_gb_s: float | None = None) -> StreamedSpeed:
    settings = {
        "train.micro_batch": 1, "train.accumulation": visit // _LENGTH, "data.max_length": _LENGTH, "lora.r": 16,
        "lora.targets": "all", "model.dtype": "bf16", "memory.streamed_layers": architecture.num_layers,
        "memory.stream_from": "disk" if disk_gb_s else "ram",
    }
    speed = estimate_speed(architecture, settings, device_from_card(find_card(card)), link=link, disk_gb_s=disk_gb_s)
    assert speed.streamed is not None, speed.basis
    return speed.streamed


def main() -> int:
    """Returns 1 where `--check` finds another table, else 0."""
    if not sys.argv[1:]:
        print(table())
        return 0
    if "--write" in sys.argv[1:]:
        _PLACE.write(table())
        return 0
    return int(_PLACE.text() != table())


if __name__ == "__main__":
    sys.exit(main())
