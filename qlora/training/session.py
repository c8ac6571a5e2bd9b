"""One start of the program on a run: its lock, its record, what it goes on from, and how it explains a sudden end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora.errors import HardwareError, InterruptedRun
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.redact import redact
from qlora.training.checkpoints import CheckpointStore
from qlora.training.lock import RunLock
from qlora.training.meter import PHASE_OF, MemoryMeter
from qlora.training.metrics_file import MetricsFile
from qlora.training.resuming import Begun, fit_what_is_free, open_store, refuse_another_run
from qlora.training.run_documents import RunProgress, write_json
from qlora.training.setup import Setup, base_revision, library_versions
from qlora.units import format_bytes

if TYPE_CHECKING:
    from qlora.training.recovery import Ladder

_Result = TypeVar("_Result")


@dataclass
class Clock:
    """Seconds and memory by phase.

    Attributes:
        seconds: of the phases that have ended.
    """

    meter: MemoryMeter | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    _running: tuple[str, float] | None = None

    def time(self, phase: str, work: Callable[[], _Result]) -> _Result:
        """Run `work`, add its duration to `phase`, and measure its memory where that is a phase of the plan."""
        started = time.perf_counter()
        self._running = phase, started
        try:
            with self.meter.during(phase) if self.meter and phase in PHASE_OF else nullcontext():
                return work()
        finally:
            self._running = None
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def so_far(self) -> dict[str, float]:
        """Seconds by phase, with what the one under way has taken up to now."""
        if self._running is None:
            return dict(self.seconds)
        phase, started = self._running
        return {**self.seconds, phase: self.seconds.get(phase, 0.0) + time.perf_counter() - started}


@dataclass
class Session:
    """One start of the program on a run: what the steps below share.

    Attributes:
        begun: where it goes on from; None at the first start.
        record: what is known of the run over all its sessions; progress.json.
    """

    setup: Setup
    folder: Path
    begun: Begun | None
    record: RunProgress
    ladder: Ladder
    clock: Clock
    progress: Progress

    @property
    def store(self) -> CheckpointStore:
        return open_store(self.folder)

    def tell(self, line: str) -> None:
        """One line for whoever is watching, and for the report."""
        self.record.events.append(redact(line))
        self.progress.note(line)

    def keep_record(self) -> None:
        """Write down what is known so far.

        Raises:
            OutputError: it cannot be written.
        """
        self.record.seconds = self.clock.so_far()
        self.record.save()


def lock(held: ExitStack, folder: Path, progress: Progress) -> None:
    """Keep other processes out of the run folder until the run ends.

    Raises:
        BusyError: one is in it.
    """
    taken = held.enter_context(RunLock(folder))
    if taken.taken_over:
        progress.note(f"The run in {folder} was cut short: it belonged to {taken.taken_over}, which is gone.")


def make_session(setup: Setup, folder: Path, begun: Begun | None, clock: Clock, progress: Progress) -> Session:
    """What this start of the program knows; at a later start, with what the earlier ones have written down.

    Raises:
        ResumeError: the data or what was decided differs from what the run was begun with.
        HardwareError: what is free now is too little for any plan of this run.
    """
    from qlora.training.recovery import Ladder

    record, ladder = begun.record if begun else RunProgress(folder), Ladder(setup.plan)
    if begun:
        refuse_another_run(begun, setup, progress)
        ladder.go_to(min(begun.checkpoint.facts["rung"], ladder.num_rungs - 1))
        for phase, seconds in record.seconds.items():
            clock.seconds[phase] = clock.seconds.get(phase, 0.0) + seconds
    record.sessions += 1
    session = Session(setup, folder, begun, record, ladder, clock, progress)
    if begun:
        fit_what_is_free(setup, ladder, session.tell)
    clock.meter = MemoryMeter(setup.device)
    return session


def write_down(session: Session) -> None:
    """Settings and plan, before any heavy work; those of a run that is gone on with are there already.

    Raises:
        OutputError: they cannot be written.
    """
    if session.begun is None or session.begun.plan is None:
        write_json(session.folder / "resolved.json", resolved(session.setup))
        write_json(session.folder / "plan.json", session.setup.plan.to_json())
        session.progress.planned(session.setup.plan, session.folder)
    session.keep_record()


def resolved(setup: Setup) -> dict[str, Any]:
    """The recipe with every value filled in and where each came from; `qlora train` runs it again from `recipe`."""
    return {
        "recipe": setup.recipe.model_dump(exclude_unset=True),
        "settings": {key: vars(decision) for key, decision in setup.plan.decisions.items()},
        "model": {"base": setup.recipe.model.base, "revision": base_revision(setup),
                  "architecture": setup.architecture.model_type, "parameters": setup.architecture.num_parameters},
        "data": {"files": setup.data.rowset.files, "sha256": setup.data.rowset.sha256, "fingerprint": setup.data.fingerprint},
        "versions": library_versions(),
    }


def open_metrics(session: Session) -> MetricsFile:
    """metrics.jsonl, cut back to what was known at the checkpoint.

    Raises:
        ResumeError: it is shorter than that.
    """
    keep_bytes = session.begun.checkpoint.facts["metrics_bytes"] if session.begun else 0
    return MetricsFile(session.folder / "metrics.jsonl", session.progress, keep_bytes=keep_bytes)


@contextmanager
def watching_memory(session: Session, already_bytes: int = 0) -> Iterator[Any]:
    """What measures the trial: on a GPU the run's own meter, on a CPU one that counts tensors from before the first was made.

    Args:
        already_bytes: of a base that was there before.
    """
    if session.setup.device.kind == "cuda":
        yield session.clock.meter
        return
    from qlora.training.cpu_memory import TensorMeter

    meter = TensorMeter(already_bytes=already_bytes)
    with meter.watching():
        yield meter


@contextmanager
def failures_explained(session: Session) -> Iterator[None]:
    """Turn running out of memory and Ctrl-C into errors that say what is there and what to do.

    Raises:
        HardwareError, InterruptedRun.
    """
    from qlora.training.recovery import is_out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        plan = session.setup.plan
        rows, length = plan.settings["train.micro_batch"], plan.settings["data.max_length"]
        raise HardwareError(
            f"{session.setup.device.name} ran out of memory: the plan was {format_bytes(plan.peak_bytes)} of "
            f"{format_bytes(plan.budget_bytes)} for {rows} x up to {length} tokens.",
            "Free some memory and run it again, which goes on from the last checkpoint. If that does not help, lower "
            "train.micro_batch first (accumulation makes up for it), then data.max_length, then lora.r, and add --fresh.",
        ) from error
    except KeyboardInterrupt:
        steps = session.store.steps()
        where = f"The checkpoint of step {steps[-1]:,} is as it was" if steps else "There was no checkpoint yet"
        raise InterruptedRun(f"Interrupted. {where}.", how_to_go_on(session.setup.recipe)) from None


def how_to_go_on(recipe: Recipe) -> str:
    """What to run to finish a run."""
    from qlora.results.report import reproduce_command

    command = reproduce_command(recipe.source, recipe.overrides)
    return f"To go on: {command}" if command else "To go on, run the same recipe again."
