"""`qlora train`, top to bottom: from a recipe to an adapter, a report and, if asked, a push."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora.errors import DivergedError, HardwareError, InterruptedRun, OutputError, PushError, VerificationError
from qlora.evaluation import Evaluation, exact_match
from qlora.hardware import limit_memory
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.training.meter import PHASE_OF, MemoryMeter, make_receipt
from qlora.training.setup import Setup, library_versions, prepare, refuse_what_does_not_fit
from qlora.units import format_bytes

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora.results.report import RunSummary
    from qlora.training.trainer import AdapterTrainer

_Result = TypeVar("_Result")
_MAX_ANSWER_TOKENS = 256


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves to a script.

    `before` and `after` hold loss, perplexity and exact_match on held-out rows, None where there were none. `push_error`
    is set when the run is complete on disk but did not reach the Hub.
    """

    folder: Path
    adapter: Path
    report: Path
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    summary: RunSummary
    pushed_to: str | None = None
    push_error: PushError | None = None


@dataclass
class Clock:
    """Seconds and memory by phase."""

    meter: MemoryMeter | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, phase: str, work: Callable[[], _Result]) -> _Result:
        """Run `work`, add its duration to `phase`, and measure its memory where that is a phase of the plan."""
        started = time.perf_counter()
        try:
            with self.meter.during(phase) if self.meter and phase in PHASE_OF else nullcontext():
                return work()
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def train(recipe: Recipe, progress: Progress | None = None) -> RunResult:
    """Run a recipe: plan, build, verify, evaluate, train, evaluate again, save, report, push.

    Args:
        progress: told about each stage; left out, the run is silent.

    Raises:
        QloraError: see `qlora.errors`; each says what to change.
    """
    progress = progress or Progress()
    clock = Clock()
    setup = clock.time("prepare", lambda: prepare(recipe, progress))
    setup.data.refuse_errors()
    refuse_what_does_not_fit(setup.plan)
    folder = make_run_folder(recipe)
    write_json(folder / "resolved.json", resolved(setup))
    write_json(folder / "plan.json", setup.plan.to_json())
    progress.planned(setup.plan, folder)
    clock.meter = MemoryMeter(setup.device)

    with failures_explained(setup, folder), MetricsFile(folder / "metrics.jsonl", progress) as metrics:
        model = clock.time("load", lambda: build_model(setup, progress))
        base_before = clock.time("verify", lambda: verify(setup, model))
        trainer = assemble(setup, model, folder, metrics)
        before = clock.time("evaluate before", lambda: evaluate(setup, trainer, progress, "before"))
        clock.time("train", lambda: run_steps(trainer, model, setup, folder, progress))
        after = clock.time("evaluate after", lambda: evaluate(setup, trainer, progress, "after"))
        clock.time("verify", lambda: verify_unchanged(model, base_before, folder))

    adapter = save_adapter(model, setup, folder / "adapter")
    summary = write_results(setup, model, folder, metrics.rows, before, after, clock)
    keep_receipt(setup, clock.meter, summary, progress)
    result = RunResult(
        folder=folder, adapter=adapter, report=folder / "report.md", summary=summary,
        before=before.to_json() if before else None, after=after.to_json() if after else None,
    )
    return push(result, recipe, progress)


# --- the run folder ----------------------------------------------------------------------------------------------------


def make_run_folder(recipe: Recipe) -> Path:
    """A folder of its own for this run. A named folder must be new or empty; an automatic one gets a number.

    Raises:
        OutputError: it cannot be written, or holds another run.
    """
    if recipe.output.dir != "auto":
        folder = Path(recipe.output.dir).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"output.dir {folder} is not empty, and nothing there is overwritten.",
                              "Name a new folder, or leave output.dir out for a numbered one.")
    else:
        folder, number = Path("runs") / recipe.name, 1
        while folder.exists():
            number += 1
            folder = Path("runs") / f"{recipe.name}-{number}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch()
    except OSError as error:
        raise OutputError(f"The run folder {folder} cannot be written: {error.strerror}.",
                          "Set output.dir to a folder you may write to.") from error
    return folder


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Readable JSON, complete or not there at all."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(aside, path)


def resolved(setup: Setup) -> dict[str, Any]:
    """The recipe with every value filled in and where each came from; `qlora train` runs it again from `recipe`."""
    return {
        "recipe": setup.recipe.model_dump(exclude_unset=True),
        "settings": {key: vars(decision) for key, decision in setup.plan.decisions.items()},
        "model": {"base": setup.recipe.model.base, "revision": getattr(setup.config, "_commit_hash", None),
                  "architecture": setup.architecture.model_type, "parameters": setup.architecture.num_parameters},
        "data": {"files": setup.data.rowset.files, "sha256": setup.data.rowset.sha256, "fingerprint": setup.data.fingerprint},
        "versions": library_versions(),
    }


class MetricsFile:
    """metrics.jsonl: one line for each step and evaluation, on disk as soon as it is known."""

    def __init__(self, path: Path, progress: Progress):
        self.path, self.progress = path, progress
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> MetricsFile:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: dict[str, Any]) -> None:
        """Keep, write and show one row."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.progress.row(row)


# --- building ----------------------------------------------------------------------------------------------------------


def build_model(setup: Setup, progress: Progress) -> PeftModel:
    """The 4-bit base with fresh adapters, on the device and within the budget."""
    from qlora.model.adapt import add_adapters
    from qlora.model.build import build_base
    from qlora.precision import torch_dtype

    recipe, settings = setup.recipe, setup.plan.settings
    if recipe.memory.budget != "auto":
        limit_memory(setup.device, setup.plan.budget_bytes - setup.plan.parts["context"])
    with progress.stage(f"Loading {recipe.model.base} in 4 bits"):
        base = build_base(
            setup.base, setup.config, device=setup.device, precision=setup.precision, weights=recipe.model.weights,
            attention=settings["model.attention"], revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code, seed=settings["train.seed"],
        )
    return add_adapters(
        base, setup.selection, r=settings["lora.r"], alpha=settings["lora.alpha"], dropout=settings["lora.dropout"],
        seed=settings["train.seed"], dtype=torch_dtype(setup.precision.adapters),
    )


def verify(setup: Setup, model: PeftModel) -> str:
    """Hold what was built against the plan; return the fingerprint of the frozen base.

    Raises:
        VerificationError: counts, types or frozen state differ from the plan.
    """
    from qlora.model.adapt import verify_adapters
    from qlora.model.build import fingerprint_base
    from qlora.precision import torch_dtype

    verify_adapters(
        model, setup.selection, setup.plan.settings["lora.r"], dtype=torch_dtype(setup.precision.adapters)
    )
    return fingerprint_base(model)


def verify_unchanged(model: PeftModel, fingerprint: str, folder: Path) -> None:
    """The base after training is the base before it.

    Raises:
        VerificationError: a frozen number has changed.
    """
    from qlora.model.build import fingerprint_base

    if fingerprint_base(model) != fingerprint:
        raise VerificationError(
            "The frozen base changed during training, so the adapter does not belong to it.",
            f"This is a fault of the program: please report it with {folder / 'resolved.json'}.",
        )


def assemble(setup: Setup, model: PeftModel, folder: Path, metrics: MetricsFile) -> AdapterTrainer:
    """The trainer over this run's rows."""
    from qlora.training.packing import verify_packing
    from qlora.training.trainer import as_dataset, build_trainer

    packing = setup.plan.settings["data.packing"]
    trainer = build_trainer(
        model, setup.tokenizer,
        as_dataset(setup.data.train, pack_to=setup.data.max_length if packing else None),
        as_dataset(setup.data.validation) if setup.data.validation else None,
        folder=folder / "checkpoints", settings=setup.plan.settings, precision=setup.precision, device=setup.device,
        num_steps=setup.plan.num_steps, on_row=metrics.add,
    )
    if packing:
        verify_packing(trainer)
    return trainer


def run_steps(trainer: AdapterTrainer, model: PeftModel, setup: Setup, folder: Path, progress: Progress) -> None:
    """The training loop.

    Raises:
        DivergedError: a loss or gradient was not finite; the weights before that step are saved, but not as the adapter.
    """
    try:
        with progress.training(setup.plan.num_steps):
            trainer.train()
    except DivergedError as error:
        raise keep_last_good(error, model, folder) from None


@contextmanager
def failures_explained(setup: Setup, folder: Path) -> Iterator[None]:
    """Turn running out of memory and Ctrl-C into errors that say what is there and what to do.

    Raises:
        HardwareError, InterruptedRun.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        settings = setup.plan.settings
        raise HardwareError(
            f"{setup.device.name} ran out of memory: the plan was {format_bytes(setup.plan.peak_bytes)} of "
            f"{format_bytes(setup.plan.budget_bytes)} for {settings['train.micro_batch']} x up to {settings['data.max_length']} tokens.",
            "Lower train.micro_batch first (accumulation makes up for it), then data.max_length, then lora.r.",
        ) from error
    except KeyboardInterrupt:
        found = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        where = f"The newest checkpoint is {found[-1]}." if found else "No checkpoint had been written yet."
        raise InterruptedRun(f"Interrupted. {where}") from None


# --- judging and keeping -----------------------------------------------------------------------------------------------


def evaluate(setup: Setup, trainer: AdapterTrainer, progress: Progress, when: str) -> Evaluation | None:
    """Loss and answers on the held-out rows; None where there are none."""
    from qlora.generation import answer

    if not setup.data.validation:
        return None
    with progress.stage(f"Held-out loss {when} training") as update:
        found = trainer.measure(progress=update)
    samples = setup.data.samples
    if not samples:
        return found
    longest = max(len(setup.tokenizer(sample.reference, add_special_tokens=False).input_ids) for sample in samples)
    with progress.stage(f"Held-out answers {when} training") as update:
        answers = answer(
            trainer.model, setup.tokenizer, [sample.prompt_ids for sample in samples],
            max_new_tokens=min(longest + 8, _MAX_ANSWER_TOKENS), stop_ids=setup.data.stop_ids, progress=update,
            tokens_per_batch=setup.plan.settings["memory.generation_tokens"],
        )
    match = exact_match(answers, [sample.reference for sample in samples])
    return replace(found, exact_match=match, num_answers=len(answers), answers=tuple(answers))


def save_adapter(model: PeftModel, setup: Setup, folder: Path) -> Path:
    """Adapter, tokenizer and template, as plain PEFT and Transformers files that others may read.

    Raises:
        DivergedError: the adapter holds a number that is not finite; nothing is written.
    """
    refuse_non_finite(model)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    setup.tokenizer.save_pretrained(str(folder))
    make_readable(folder)
    return folder


def refuse_non_finite(model: PeftModel) -> None:
    """A broken adapter is never saved as if it were good.

    Raises:
        DivergedError: names the first weight that is not finite.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise DivergedError(f"The adapter weight {name} is not finite, so the adapter was not saved.",
                                "The last checkpoint is intact; lower train.learning_rate and run again.")


def make_readable(folder: Path) -> None:
    """safetensors leaves files that only their owner may read; an adapter is there to be shared."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def keep_last_good(error: DivergedError, model: PeftModel, folder: Path) -> DivergedError:
    """Save the weights as they were before the step that failed, and say where they are."""
    kept = folder / "checkpoints" / "last-good"
    try:
        refuse_non_finite(model)
    except DivergedError:
        return error
    model.save_pretrained(str(kept), save_embedding_layers=False)
    make_readable(kept)
    return DivergedError(f"{error.problem} The weights before that step are in {kept}.", error.fix)


def write_results(
    setup: Setup, model: PeftModel, folder: Path, rows: list[dict[str, Any]], before: Evaluation | None,
    after: Evaluation | None, clock: Clock,
) -> RunSummary:
    """Plots, report.md and report.json."""
    from qlora.results.plan_plots import draw_planned_measured
    from qlora.results.plots import draw_all
    from qlora.results.report import write_report
    from qlora.training.summary import summarise

    summary = summarise(setup, model, folder, rows, before, after, clock.seconds, clock.meter)
    lengths = setup.data.lengths
    draw_all(
        rows, lengths.histogram, setup.data.max_length, folder / "plots",
        max_grad_norm=setup.plan.settings["train.max_grad_norm"],
        length_percentiles={"p50": lengths.p50, "p95": lengths.p95},
    )
    draw_planned_measured(
        summary.planned_phases, summary.measured_phases, setup.plan.budget_bytes,
        folder / "plots" / "memory.png",
    )
    write_report(summary, folder)
    return summary


def keep_receipt(setup: Setup, meter: MemoryMeter, summary: RunSummary, progress: Progress) -> None:
    """Remember planned and measured, so that the margin of later plans follows. A run is not lost for it."""
    from qlora.planning.receipts import Receipts

    try:
        Receipts.load().add(make_receipt(setup, meter, summary.training.tokens_per_second))
    except OutputError as error:
        progress.note(str(error))


def push(result: RunResult, recipe: Recipe, progress: Progress) -> RunResult:
    """Send the adapter to the Hub if the recipe asks for it. A failure here costs nothing that is on disk."""
    if recipe.hub is None:
        return result
    from qlora.hub import push_adapter

    try:
        with progress.stage(f"Pushing to {recipe.hub.repo}"):
            url = push_adapter(result.adapter, recipe.hub.repo, private=recipe.hub.private)
    except PushError as error:
        return replace(result, push_error=error)
    return replace(result, pushed_to=url)
