"""`qlora train`, top to bottom: from a recipe to an adapter, a report and, if asked, a push.

A run that was broken off goes on from its newest good checkpoint, so every step here may be the first or come again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import DivergedError, InterruptedRun, OutputError, PushError
from qlora.evaluation import Evaluation, exact_match
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.training.building import build_model
from qlora.training.earlier import Trial, earlier_evaluation, earlier_trial, keep_earlier_evaluation, keep_earlier_trial
from qlora.training.meter import planned_phases, run_receipt, trial_receipt
from qlora.training.metrics_file import MetricsFile
from qlora.training.preflight import check_machine, refuse, warnings
from qlora.training.pushing import look_ahead, push_finished
from qlora.training.resuming import begin_again, facts_of, refuse_another_base
from qlora.training.run_folder import find_run, open_folder, refuse_taken
from qlora.training.session import (
    Clock, Session, failures_explained, how_to_go_on, lock, make_session, open_metrics, watching_memory, write_down,
)
from qlora.training.setup import Setup, prepare, refuse_what_does_not_fit
from qlora.training.stages import assemble, keep_last_good, save_adapter, verify, verify_unchanged
from qlora.training.stopping import Stopper
from qlora.units import format_bytes

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora.engine.install import Engine
    from qlora.hub.push import Pushed
    from qlora.planning.plan import Plan
    from qlora.planning.receipts import Receipt
    from qlora.results.report import RunSummary
    from qlora.training.bases import Bases
    from qlora.training.monitor import FrozenNorms
    from qlora.training.trainer import AdapterTrainer


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves to a script.

    `before` and `after` hold loss, perplexity and exact_match on held-out rows, None where there were none. `pushed` is what
    arrived on the Hub; `push_error` is set when the run is complete on disk but did not reach it.
    """

    folder: Path
    adapter: Path
    report: Path
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    summary: RunSummary
    pushed: Pushed | None = None
    push_error: PushError | None = None


def train(
    recipe: Recipe, progress: Progress | None = None, *, fresh: bool = False, force: bool = False, bases: Bases | None = None,
) -> RunResult:
    """Run a recipe: plan, build, verify, try out, evaluate, train, evaluate again, save, report, push.

    A run folder that holds an unfinished run is gone on with, to the very numbers that it would have come to.

    Args:
        progress: told about each stage; left out, the run is silent.
        fresh: start anew, beside a run that is there.
        force: go on with an unfinished run although its settings or data have changed.
        bases: where several runs of this process take turns on one base.

    Raises:
        QloraError: see `qlora.errors`; each says what to change.
    """
    progress, clock = progress or Progress(), Clock()
    found = find_run(recipe, fresh=fresh)
    look_ahead(recipe, progress, create_it=True)
    with ExitStack() as held:
        if found.unfinished:
            lock(held, found.path, progress)
        begun = begin_again(found.path, recipe, progress, force=force) if found.unfinished else None
        setup = clock.time("prepare", lambda: prepare(recipe, progress, plan=begun.plan if begun else None))
        setup.data.refuse_errors()
        refuse_what_does_not_fit(setup.plan)
        checks = check_machine(setup, found.path, resuming=begun is not None)
        refuse(checks)
        for line in warnings(checks):
            progress.note(line)
        if not found.unfinished:
            open_folder(found)
            lock(held, found.path, progress)
            refuse_taken(found.path)
        session = make_session(setup, found.path, begun, clock, progress)
        return push(run(session, bases), recipe, progress)


def run(session: Session, bases: Bases | None = None) -> RunResult:
    """A run whose settings are decided and whose folder is there."""
    setup, clock, progress = session.setup, session.clock, session.progress
    write_down(session)
    with failures_explained(session), ExitStack() as held:
        shared = clock.time("load", lambda: bases.take(setup, progress)) if bases else None
        known = known_trial(session)
        tries = known is None and setup.plan.settings.get("train.try_out") != "never"
        with watching_memory(session, shared.tensor_bytes if shared else 0) if tries else nullcontext() as trial:
            model, engine = clock.time("load", lambda: build_model(setup, progress, shared))
            held.callback(engine.close)
            norms = frozen_norms(setup, model)
            base = clock.time("verify", lambda: verify(setup, model, engine, norms.beside))
            if session.begun:
                refuse_another_base(session.begun, base, progress)
            if tries:
                clock.time("try out", lambda: try_out(session, model, engine, trial))
        if known is not None:
            take_trial(session, known)
        elif tries:
            keep_trial(session, trial)
        with open_metrics(session) as metrics:
            stopper = Stopper(progress.note)
            trainer = assemble(setup, model, engine, session.folder, on_row=metrics.add, ladder=session.ladder, tell=session.tell,
                               look=stopper.look)
            before = clock.time("evaluate before", lambda: evaluate_before(session, trainer, base))
            watch_adapters(setup, trainer, norms, metrics.rows, progress.note)
            clock.time("train", lambda: run_steps(session, trainer, metrics, stopper, base))
        keep_the_best(session, model, metrics.rows)
        after = clock.time("evaluate after", lambda: evaluate(session, trainer, "after"))
        clock.time("verify", lambda: verify_unchanged(model, engine, base, session.folder))
        adapter = save_adapter(model, setup, session.folder / "adapter")
    summary = write_results(session, model, metrics.rows, before, after)
    return RunResult(
        folder=session.folder, adapter=adapter, report=session.folder / "report.md", summary=summary,
        before=before.to_json() if before else None, after=after.to_json() if after else None,
    )


# --- the stages of a session, one after the other --------------------------------------------------------------------------


def known_trial(session: Session) -> Trial | None:
    """What an earlier run of the same shapes took, which then need not be tried out. A lower rung is tried out each time."""
    once = session.setup.plan.settings.get("train.try_out", "once") == "once"
    return earlier_trial(session.setup) if once and not session.ladder.rung else None


def take_trial(session: Session, known: Trial) -> None:
    """An earlier run's trial in the place of this one's. It is no receipt more."""
    plan = session.setup.plan
    session.record.probe = {"planned": planned_phases(plan, known.allocated), "measured": known.allocated}
    session.progress.note(f"The longest rows were tried out on {known.date} and took {_worst(plan, known.allocated)}. "
                          "`train.try_out=always` tries them again.")
    session.keep_record()


def try_out(session: Session, model: PeftModel, engine: Engine, trial: Any) -> None:
    """The worst batch of this data goes through everything that follows."""
    from qlora.training.probe import probe

    with session.progress.stage("Trying out the longest rows"):
        probe(session.setup, model, engine, session.ladder, session.folder, trial, session.tell)


def keep_trial(session: Session, trial: Any) -> None:
    """Hold what the trial took against the plan, and remember it, so that the margin of later plans follows."""
    plan = session.setup.plan
    took = {phase: size for phase, size in trial.allocated.items() if phase in plan.phases}
    if len(took) > 1:  # on a lower rung it is not the plan that is tried out
        session.record.probe = {"planned": planned_phases(plan, took), "measured": took}
        session.progress.note(f"The longest rows took {_worst(plan, took)}.")
    if session.begun is None and took:
        keep_receipt(trial_receipt(session.setup, took, trial.reserved), session.progress)
        if not session.ladder.rung and not session.record.events:  # nothing had to be done in another way than planned
            keep_earlier_trial(session.setup, took, trial.reserved)
    session.keep_record()


def _worst(plan: Plan, took: Mapping[str, int]) -> str:
    worst = max((phase for phase in took if phase != "load"), key=took.__getitem__)
    return f"{format_bytes(took[worst])}, in phase {worst}; planned were {format_bytes(plan.phases[worst])}"


def evaluate_before(session: Session, trainer: AdapterTrainer, base: str) -> Evaluation | None:
    """How good the base is; what an earlier session or run found out is not measured again.

    Args:
        base: fingerprint of the frozen weights.
    """
    from qlora.training.saving import random_state, set_random_state

    if session.record.before is not None:
        return Evaluation.from_record(session.record.before)
    setup, known = session.setup, earlier_evaluation(session.setup, base)
    if known is not None:
        found, date = known
        session.progress.note(f"The bare base was measured on these held-out rows on {date}: loss {found.loss:.4f}.")
    else:
        state = random_state()
        found = evaluate(session, trainer, "before")
        set_random_state(state)  # the run is the same whether it measured this or was told
        if found is not None:
            keep_earlier_evaluation(setup, base, found)
    session.record.before = found.to_record() if found else None
    session.keep_record()
    return found


def evaluate(session: Session, trainer: AdapterTrainer, when: str) -> Evaluation | None:
    """Loss and answers on the held-out rows; None where there are none."""
    from qlora.training.stages import answers_of, held_out_loss

    setup = session.setup
    if not setup.data.validation:
        return None
    with session.progress.stage(f"Held-out loss {when} training") as update:
        found = held_out_loss(trainer, update)
    if not setup.data.samples:
        return found
    with session.progress.stage(f"Held-out answers {when} training") as update:
        answers = answers_of(setup, trainer.model, session.tell, update)
    match = exact_match(answers, [sample.reference for sample in setup.data.samples])
    return replace(found, exact_match=match, num_answers=len(answers), answers=tuple(answers))


def frozen_norms(setup: Setup, model: PeftModel) -> FrozenNorms:
    """What takes the norms of the frozen weights; of none where nobody looks at the adapters while they train."""
    from qlora.training.monitor import FrozenNorms, find_groups

    return FrozenNorms(find_groups(model, setup.selection) if setup.plan.settings.get("train.monitor_every") else {})


def watch_adapters(
    setup: Setup, trainer: AdapterTrainer, norms: FrozenNorms, rows: Sequence[Mapping[str, Any]], note: Callable[[str], None]
) -> None:
    """Look at gradients and adapters every so many steps, and say what to try where a rule fires on the rows so far."""
    from qlora.training.advice import Situation
    from qlora.training.monitor import Monitor

    plan = setup.plan
    if norms.groups:
        situation = Situation.of(plan.decisions, plan.num_steps, len(setup.data.train), setup.selection)
        trainer.add_callback(Monitor(trainer, norms, situation, every=plan.settings["train.monitor_every"], rows=rows, note=note))


def run_steps(session: Session, trainer: AdapterTrainer, metrics: MetricsFile, stopper: Stopper, base: str) -> None:
    """The training loop, from the checkpoint on where there is one.

    Raises:
        DivergedError: a loss or gradient was not finite; the weights before that step are saved, but not as the adapter.
        InterruptedRun: somebody asked for it; there is a checkpoint.
    """
    from qlora.training.saving import Saver, load_adapter
    from qlora.training.watch import MemoryWatch

    setup, settings, num_steps = session.setup, session.setup.plan.settings, session.setup.plan.num_steps
    trainer.add_callback(Saver(
        lambda: save_checkpoint(session, trainer, metrics, base), tell=session.tell, every=settings["train.save_every"],
        minutes=settings["train.save_minutes"], wants_to_stop=stopper.look,
        is_best=lambda: settings["train.keep"] == "best" and best_step(metrics.rows) == trainer.state.global_step,
    ))
    trainer.add_callback(MemoryWatch(trainer, setup.device, lambda rung: needed_bytes(session, rung)))
    checkpoint = session.begun.checkpoint if session.begun else None
    trainer.row_writer.takes_rate = session.begun is not None and session.begun.plan is None
    trainer.row_writer.seconds_before = max((row.get("seconds", 0.0) for row in metrics.rows), default=0.0)
    if checkpoint and checkpoint.step >= num_steps:  # the trainer would make one step more
        load_adapter(trainer.model, checkpoint.path)
        return
    try:
        with session.progress.training(num_steps), stopper:
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    except DivergedError as error:
        raise keep_last_good(error, trainer.model, session.folder) from None
    if stopper.requested:
        raise InterruptedRun(
            f"Stopped after step {trainer.state.global_step:,} of {num_steps:,}, with a checkpoint in {session.store.folder}.",
            how_to_go_on(setup.recipe), exit_code=stopper.exit_code,
        )


def save_checkpoint(session: Session, trainer: AdapterTrainer, metrics: MetricsFile, base: str) -> None:
    """A checkpoint of the trainer as it is now; then older ones may go, but for the best.

    Raises:
        OutputError: it cannot be written; what was there before is untouched.
    """
    from qlora.training.saving import write_state

    step = trainer.state.global_step
    facts = {**facts_of(session.setup, base), "rung": session.ladder.rung, "metrics_bytes": metrics.position()}
    session.store.write(step, lambda folder: write_state(trainer, folder), facts)
    session.record.checkpoint = step
    session.keep_record()
    best = best_step(metrics.rows) if session.setup.plan.settings["train.keep"] == "best" else None
    session.store.rotate(keep_also=() if best is None else (best,))


def best_step(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The step with the lowest loss on held-out rows, the first of equals; None before any was measured."""
    evaluations = [row for row in rows if "eval_loss" in row]
    return min(evaluations, key=lambda row: row["eval_loss"])["step"] if evaluations else None


def keep_the_best(session: Session, model: PeftModel, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the weights of the best evaluation into the model, where those are to be kept.

    Raises:
        ResumeError: their checkpoint is damaged.
    """
    from qlora.training.saving import load_adapter

    best, last = best_step(rows), max((row["step"] for row in rows), default=0)
    if session.setup.plan.settings["train.keep"] == "best" and best not in (None, last):
        load_adapter(model, session.store.at(best).path)


def needed_bytes(session: Session, rung: int) -> int:
    """What the process takes at its highest on a rung, counted as free memory is: without the CUDA context on a GPU, with the
    whole program on a CPU.
    """
    plan, ladder = session.setup.plan, session.ladder
    if plan.kind == "cuda":
        return ladder.peak_bytes_at(rung) - plan.parts["context"]
    return plan.host_peak_bytes - (plan.peak_bytes - ladder.peak_bytes_at(rung))


# --- judging and keeping -----------------------------------------------------------------------------------------------


def write_results(
    session: Session, model: PeftModel, rows: list[dict[str, Any]], before: Evaluation | None, after: Evaluation | None
) -> RunSummary:
    """Plots, the model card, report.md and, as the last of all, report.json: with it the run is finished."""
    from qlora.results.licence import licence_of_base
    from qlora.results.model_card import write_card
    from qlora.results.monitor_plots import draw_monitor
    from qlora.results.plan_plots import draw_planned_measured
    from qlora.results.plots import draw_all
    from qlora.results.report import write_report
    from qlora.training.summary import summarise

    setup, folder = session.setup, session.folder
    summary = summarise(setup, model, folder, rows, before, after, session.clock.seconds, session.clock.meter, session.record)
    keep_receipt(run_receipt(setup, session.clock.meter, summary.training.tokens_per_second), session.progress)
    lengths = setup.data.lengths
    draw_all(
        rows, lengths.histogram, setup.data.max_length, folder / "plots",
        max_grad_norm=setup.plan.settings["train.max_grad_norm"],
        length_percentiles={"p50": lengths.p50, "p95": lengths.p95},
    )
    draw_monitor(rows, folder / "plots")
    draw_planned_measured(
        summary.planned_phases, summary.measured_phases, setup.plan.budget_bytes,
        folder / "plots" / "memory.png",
    )
    write_card(summary, folder, licence=licence_of_base(setup.base, summary.model.revision))
    write_report(summary, folder)
    return summary


def keep_receipt(receipt: Receipt, progress: Progress) -> None:
    """Remember planned and measured, so that the margin of later plans follows. A run is not lost for it."""
    from qlora.planning.receipts import Receipts

    try:
        Receipts.load().add(receipt)
    except OutputError as error:
        progress.note(str(error))


def push(result: RunResult, recipe: Recipe, progress: Progress) -> RunResult:
    """Send the adapter to the Hub if the recipe asks for it. A failure here costs nothing that is on disk."""
    if recipe.hub is None:
        return result
    try:
        return replace(result, pushed=push_finished(recipe, result.folder, progress))
    except PushError as error:
        return replace(result, push_error=error)
