"""The process of one cell: `python -m qlora.measuring.child plan` or `measure`, a question on stdin, the answer on stdout.

A process of its own, so that nothing of one cell is left when the next begins, and one that dies of memory takes no other
with it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora import _compat
from qlora.errors import QloraError
from qlora.hardware import Device, describe_machine
from qlora.measuring.cells import Cell
from qlora.planning.plan import Plan


def answer(what: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's JSON, or the line of a cell that was trained; {"error": ...} where there is neither.

    Args:
        what: "plan" or "measure".
        question: `cell`, its words; `cpu`, whether to leave a GPU alone; for a plan `card_bytes`, to plan for a card of that size
            that need not be here, or None; for a measurement `plan` and `command`.
    """
    from qlora.measuring.one_cell import measure_cell, plan_cell

    with tempfile.TemporaryDirectory() as folder:
        try:
            cell = Cell.parse(question["cell"])
            if what == "plan":
                return plan_cell(cell, device_of(question["cpu"], question["card_bytes"]), Path(folder)).to_json()
            return measure_cell(cell, Plan.from_json(question["plan"]), Path(folder), command=question["command"])
        except QloraError as error:
            return {"error": error.problem}


def device_of(cpu: bool, card_bytes: int | None) -> Device:
    """This machine's device, or a card of so much memory that need not be here."""
    if card_bytes is None:
        return describe_machine("cpu" if cpu else "auto")
    from qlora.hardware import device_from_card

    return device_from_card(None, card_bytes)


def main() -> None:
    """Answer, and be gone."""
    _compat.prepare_environment()
    _compat.quieten_libraries()
    sys.stdout.write(json.dumps(answer(sys.argv[1], json.load(sys.stdin)), default=str) + "\n")
    sys.stdout.flush()
    # What is left at exit is torn down in no order that CUDA likes; the answer is out, and that is all there was to do.
    os._exit(0)


if __name__ == "__main__":
    main()
