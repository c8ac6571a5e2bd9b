"""The lines that cells leave: reading them, which cells are done, and receipts of them for the planner's margin."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.errors import OutputError
from qlora.measuring.cells import Cell
from qlora.measuring.one_cell import COMPARED_PHASES
from qlora.measuring.summary import cell_row, summarise
from qlora.planning.receipts import Receipt, Receipts, parse_receipt

_NEEDED = ("cell", "device", "kind")


def read_lines(*paths: Path) -> list[dict[str, Any]]:
    """The last line of each cell and device, in the order in which they came first; what is no such line is left out. A file may
    be missing.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        for line in _parsed(path):
            if all(isinstance(line.get(key), str) for key in _NEEDED):
                found[line["cell"], line["device"]] = line
    return list(found.values())


def need_lines(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Those of files that may come from anywhere; what cannot be shown of them is left out.

    Raises:
        OutputError: one of the files has no such line.
    """
    for path in paths:
        if not any(map(_is_sound, read_lines(path))):
            raise OutputError(f"There are no measurements in {path}.", "Name a file that `qlora measure --out FILE` has written.")
    return [line for line in read_lines(*paths) if _is_sound(line)]


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
    measured = line["measured"]
    planned, taken = ({phase: line[side]["phases"][phase] for phase in COMPARED_PHASES[line["kind"]]}
                      for side in ("planned", "measured"))
    return Receipt(
        device=line["device"], kind=line["kind"], model=line["model"], planned=planned, measured=taken,
        capability=tuple(line["capability"]) if line["capability"] else None, allocator=line["allocator"], os=line["os"],
        versions=line["versions"], settings=line["settings"],
        planned_reserved={"run": line["planned"]["reserved_bytes"]} if measured["reserved"] else {},
        measured_reserved=measured["reserved"], context_bytes=measured["context_bytes"], num_retries=line["retries"],
        tokens_per_second=line["tokens_per_second"], flops_per_token=line["flops_per_token"], date=line["date"],
    )


def adopt_receipts(path: Path, receipts: Receipts) -> tuple[int, int]:
    """Let the margins of later plans follow from somebody's measurements: lines of `qlora measure`, or a receipts.jsonl.

    Args:
        receipts: those of this machine, to which they are added; what is there already is not added again.

    Returns:
        How many there were, and how many of them are new.

    Raises:
        OutputError: there is none in the file, or this machine's receipts cannot be written.
    """
    found = [receipt for line in _parsed(path) if (receipt := _receipt(line)) is not None]
    if not found:
        raise OutputError(f"There is no receipt in {path}.",
                          "Name a file that `qlora measure --out FILE` has written, or a receipts.jsonl.")
    return len(found), receipts.adopt(found, path.name)


def _is_sound(line: dict[str, Any]) -> bool:
    try:
        return bool(cell_row(line) and summarise([line]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError):
        return False


def _receipt(line: dict[str, Any]) -> Receipt | None:
    """Whatever else a file from elsewhere holds is left out."""
    if "cell" not in line:
        return parse_receipt(line)
    try:
        return parse_receipt(vars(receipt)) if (receipt := receipt_of(line)) is not None else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _parsed(path: Path) -> Iterable[dict[str, Any]]:
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            yield line
