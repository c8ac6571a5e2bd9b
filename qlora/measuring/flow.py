"""Many cells: plan them, train them one after the other, each in a process of its own, and write each down at once."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.engine.shelf import clear_stores, list_stores
from qlora.errors import OutputError
from qlora.hardware import Device
from qlora.measuring.cells import Cell
from qlora.measuring.child import device_of
from qlora.measuring.lines import cells_to_do, read_lines
from qlora.measuring.one_cell import describe_cell
from qlora.planning.plan import Plan
from qlora.progress import Progress
from qlora.units import format_bytes


@dataclass(frozen=True)
class Order:
    """How cells are to be measured.

    Attributes:
        out: the file that lines are added to.
        cpu: on the CPU, also where there is a GPU.
        try_refused: also train what the plan says does not fit.
        minutes: begin no further cell after so many; None is no limit.
        jobs: plans to make at once; None is half of the processor's threads.
        timeout_seconds: a plan or a cell that takes longer is given up.
    """

    out: Path = Path("measured.jsonl")
    cpu: bool = False
    try_refused: bool = False
    minutes: float | None = None
    jobs: int | None = None
    timeout_seconds: float = 900

    def num_jobs(self, device: Device) -> int:
        """Plans to make at once."""
        return self.jobs or max(1, device.num_threads // 2)

    def command(self, cell: Cell) -> str:
        """What measures this cell again."""
        flags = [flag for flag, on in (("--cpu", self.cpu), ("--try-refused", self.try_refused)) if on]
        return shlex.join(["qlora", "measure", *flags, cell.model, *cell.overrides])


def measure(cells: Sequence[Cell], order: Order, progress: Progress) -> list[dict[str, Any]]:
    """Measure those that `order.out` does not have for this device yet. For a GPU, plans are made ahead meanwhile.

    Returns:
        The lines of all these cells on this device, new and old.

    Raises:
        OutputError: the file cannot be written.
        HardwareError: there is no such device.
    """
    started, device = time.perf_counter(), device_of(order.cpu, None)
    to_do = cells_to_do(cells, read_lines(order.out), device.name, try_refused=order.try_refused)
    if len(to_do) < len(cells):
        progress.note(f"{len(cells) - len(to_do)} of {len(cells)} cells are in {order.out} already.")
    jobs = order.num_jobs(device) if device.kind == "cuda" else 0
    with _writing(order.out) as write, closing(_plans(to_do, order, [None] * len(to_do), jobs)) as plans:
        for number, cell in enumerate(to_do, 1):
            if order.minutes and time.perf_counter() - started > order.minutes * 60:
                progress.note(f"{_num_cells(to_do[number - 1:])} left; the same words again go on with them.")
                break
            with progress.stage(f"{number} of {len(to_do)}: {cell}"):
                line = measure_planned(cell, next(plans), order, device)
            write(line)
            progress.note(outcome(line))
    names = set(map(str, cells))
    return [line for line in read_lines(order.out) if line["cell"] in names and line["device"] == device.name]


def planned_lines(cells: Sequence[Cell], order: Order, progress: Progress, *, here: bool) -> list[dict[str, Any]]:
    """What is planned for cells, as lines without measurements; nothing is trained.

    Args:
        here: for this machine's device; otherwise for cards of the cells' own budgets.
    """
    cards = [None if here else cell.budget_bytes or None for cell in cells]
    jobs = order.num_jobs(device_of(order.cpu, None))
    lines = []
    with progress.stage(f"Planning {_num_cells(cells)}") as update, closing(_plans(cells, order, cards, jobs)) as plans:
        for cell, card_bytes, plan in zip(cells, cards, plans):
            device, command = device_of(order.cpu, card_bytes), order.command(cell)
            if "error" in plan:
                lines.append({**describe_cell(cell, None, device, command), **plan})
            else:
                lines.append(describe_cell(cell, Plan.from_json(plan), device, command))
            update(len(lines), len(cells))
    return lines


def _plans(
    cells: Sequence[Cell], order: Order, cards: Sequence[int | None], jobs: int
) -> Generator[dict[str, Any], None, None]:
    """For each cell a plan's JSON, or {"error": ...}, as it is asked for. Planning takes no memory of a card.

    Args:
        cards: memory of the card that a cell is planned for, which need not be here; None is this machine's device.
        jobs: how many are made ahead at once; 0 is none, so that nothing disturbs what is measured on a CPU.
    """
    def ask(cell: Cell, card_bytes: int | None) -> dict[str, Any]:
        return run_child("plan", {"cell": str(cell), "cpu": order.cpu, "card_bytes": card_bytes}, order.timeout_seconds)

    if not jobs:
        yield from map(ask, cells, cards)
        return
    pool = ThreadPoolExecutor(jobs)
    try:
        yield from pool.map(ask, cells, cards)
    finally:
        pool.shutdown(cancel_futures=True)


def measure_planned(cell: Cell, plan: Mapping[str, Any], order: Order, device: Device) -> dict[str, Any]:
    """The line of a cell, whatever became of it. A quantised base that was kept for it alone is removed."""
    command = order.command(cell)
    if "error" in plan:
        return {**describe_cell(cell, None, device, command), **plan}
    described = describe_cell(cell, Plan.from_json(plan), device, command)
    if not plan["fits"] and not order.try_refused:
        return described
    before = {store.name for store in list_stores()}
    found = run_child("measure", {"cell": str(cell), "plan": plan, "command": command}, order.timeout_seconds)
    name = (cell.small or cell.model).partition(":")[0].rpartition("/")[2]
    made = [store.name for store in list_stores() if store.name not in before and name[-40:] in store.name]
    if made:
        clear_stores(made)
    return {**described, **found}


def run_child(what: str, question: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
    """The answer of `qlora.measuring.child`; {"error": ...} where there is none."""
    command = [sys.executable, "-m", "qlora.measuring.child", what]
    try:
        done = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, errors="replace", timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired:
        return {"error": f"gave up after {timeout_seconds:.0f} s"}
    if done.returncode < 0:
        return {"error": f"ended by {signal.Signals(-done.returncode).name}; the system may have run out of RAM"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}


def outcome(line: Mapping[str, Any]) -> str:
    """What a line says, in a few words."""
    if "error" in line:
        return f"failed: {line['error']}"
    planned = f"{format_bytes(line['planned']['peak_bytes'])} of {format_bytes(line['budget_bytes'])}"
    if "measured" not in line:
        return f"refused, needs {planned}"
    if line["out_of_memory"]:
        return f"planned {planned}, out of memory"
    return f"planned {planned}, tensors off by {line['error_percent']:+.2f} %, {line['retries']} retries, {line['seconds']:.0f} s"


@contextmanager
def _writing(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What writes a line and has it on the disk. The file is opened before any work, and not when there is something to write."""
    try:
        file = path.open("a", encoding="utf-8")
        torn = path.stat().st_size and not path.read_bytes().endswith(b"\n")
    except OSError as error:
        raise _cannot_write(path, error) from None

    def write(line: Mapping[str, Any]) -> None:
        try:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()
        except OSError as error:
            raise _cannot_write(path, error) from None

    with file:
        if torn:
            file.write("\n")
        yield write


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror or error}.", "Name another file with --out.")


def _num_cells(cells: Sequence[Cell]) -> str:
    return f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"
