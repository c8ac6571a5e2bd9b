"""Gather what a run did into the plain data that the report is written from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.architecture import lora_parameters
from qlora.evaluation import Evaluation
from qlora.results.facts import (
    AdviceFacts, DataFacts, ModelFacts, MonitorFacts, RunSummary, Sample, TemplateFacts, TrainingFacts,
)
from qlora.results.report import reproduce_command
from qlora.training.meter import MemoryMeter, planned_phases
from qlora.training.run_documents import RunProgress
from qlora.training.setup import Setup, base_revision, library_versions
from qlora.units import spread

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora.data import GenerationSample

_NUM_SAMPLES = 3


def summarise(
    setup: Setup, model: PeftModel, folder: Path, rows: Sequence[Mapping[str, Any]], before: Evaluation | None,
    after: Evaluation | None, seconds: Mapping[str, float], meter: MemoryMeter, record: RunProgress,
) -> RunSummary:
    """Everything a report says. `rows` are the lines of metrics.jsonl, `record` is what was written down on the way."""
    steps = [row for row in rows if "loss" in row]
    step_seconds = sum(row["tokens"] / row["tokens_per_second"] for row in steps if row["tokens_per_second"])
    tokens = sum(row["tokens"] for row in steps)
    data, settings = setup.data, setup.plan.settings
    measured = measured_phases(setup, meter, record)
    return RunSummary(
        name=setup.recipe.name,
        folder=str(folder),
        command=reproduce_command(setup.recipe.source, setup.recipe.overrides),
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        before=before,
        after=after,
        samples=samples(setup, before, after),
        model=model_facts(setup, model),
        data=DataFacts(
            files=tuple(data.rowset.files), sha256=data.rowset.sha256, format=data.rowset.format,
            num_rows=len(data.train_rows) + len(data.validation_rows), num_train=len(data.train),
            num_validation=len(data.validation), max_length=data.max_length, lengths=data.lengths,
            num_truncated=data.fit.num_truncated, num_answer_lost=data.fit.num_answer_lost,
            num_fully_masked=data.fit.num_fully_masked, num_duplicates=data.rowset.num_duplicates,
            num_bad_rows=len(data.bad_rows), findings=tuple(data.findings),
            size_bytes=data.rowset.size_bytes, template=template_facts(setup),
        ),
        training=TrainingFacts(
            num_steps=steps[-1]["step"] if steps else 0, epochs=steps[-1]["epoch"] if steps else 0.0, tokens=tokens,
            trained_tokens=sum(row["trained_tokens"] for row in steps),
            tokens_per_second=tokens / step_seconds if step_seconds else 0.0,
        ),
        peak_bytes=meter.peak_bytes,
        budget_bytes=setup.plan.budget_bytes,
        seconds=dict(seconds),
        settings=setup.plan.decisions,
        device=setup.device,
        versions=library_versions(),
        notes=(*notes(setup, settings), *sessions(record), *record.events),
        planned_phases=planned_phases(setup.plan, measured),
        measured_phases=measured,
        monitor=monitor_facts(rows, settings.get("train.monitor_every", 0)),
    )


def monitor_facts(rows: Sequence[Mapping[str, Any]], every: int) -> MonitorFacts | None:
    """What the rows of metrics.jsonl hold of looks and advice; None where nobody looked."""
    looks = [row for row in rows if "monitor" in row]
    advice = tuple(AdviceFacts(row["step"], **row["advice"]) for row in rows if "advice" in row)
    if not looks and not advice:
        return None
    return MonitorFacts(
        every=every, num_looks=len(looks), last_step=looks[-1]["step"] if looks else 0, last=looks[-1]["monitor"] if looks else {},
        advice=advice,
    )


def sessions(record: RunProgress) -> tuple[str, ...]:
    """That the run was not made in one go, where it was not."""
    times = record.sessions - 1
    return (f"The run was cut short and gone on with {'once' if times == 1 else f'{times} times'}.",) if times else ()


def measured_phases(setup: Setup, meter: MemoryMeter, record: RunProgress) -> dict[str, int]:
    """Tensor memory at its highest by phase, in bytes: what the trial took, and on a GPU what the run took beside it."""
    trial = (record.probe or {}).get("measured", {})
    run = {phase: size for phase, size in meter.allocated.items() if phase in setup.plan.phases}
    return {phase: max(trial.get(phase, 0), run.get(phase, 0)) for phase in setup.plan.phases if phase in trial or phase in run}


def samples(setup: Setup, before: Evaluation | None, after: Evaluation | None) -> tuple[Sample, ...]:
    """Three held-out rows, spread over those that were answered, with both answers."""
    if before is None or after is None or not before.answers:
        return ()
    found = setup.data.samples
    return tuple(
        Sample(prompt=question(found[i]), reference=found[i].reference, before=before.answers[i], after=after.answers[i])
        for i in spread(len(found), _NUM_SAMPLES)
    )


def question(sample: GenerationSample) -> str:
    """What a reader takes for the question: the last thing said to the model, without the template's marks."""
    messages = sample.row.messages
    if messages is None:
        return sample.prompt
    said = [message["content"] for message in messages if message["role"] != "assistant" and message.get("content")]
    return said[-1] if said else sample.prompt


def model_facts(setup: Setup, model: PeftModel) -> ModelFacts:
    """The base and its adapters as they were built."""
    import bitsandbytes as bnb

    architecture = setup.architecture
    return ModelFacts(
        base=setup.recipe.model.base,
        revision=base_revision(setup),
        model_type=architecture.model_type,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        num_parameters=architecture.num_parameters,
        quantised_parameters=architecture.quantised_parameters,
        num_4bit_modules=sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()),
        num_adapted_modules=setup.selection.num_modules,
        trainable_parameters=lora_parameters(setup.selection, setup.plan.settings["lora.r"]),
        is_folder=setup.recipe.model.base == setup.base and Path(setup.base).expanduser().is_dir(),
    )


def template_facts(setup: Setup) -> TemplateFacts | None:
    """How conversations were written, with an example; None where no row is one."""
    data = setup.data
    if data.template is None or not any(row.messages is not None for row in (*data.train_rows, *data.validation_rows)):
        return None
    # The two turns that reading the data has tried the template with.
    turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "the answer"}]
    return TemplateFacts(
        name=data.template.name, reason=data.template.reason,
        example=setup.tokenizer.apply_chat_template(turns, tokenize=False),
        stop_tokens=tuple(setup.tokenizer.convert_ids_to_tokens(data.stop_ids)),
    )


def notes(setup: Setup, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What a person should know about this run, one line each."""
    from qlora import guidance

    lines = [*setup.notes, *setup.selection.notes]
    r, alpha = settings["lora.r"], settings["lora.alpha"]
    offers = (guidance.offer_smaller_rank(len(setup.data.train), r),
              guidance.check_learning_rate(settings["train.learning_rate"], r, alpha))
    lines += [f"{offer.reason[0].upper()}{offer.reason[1:]}" for offer in offers if offer is not None]
    if setup.recipe.model.trust_remote_code:
        lines.append("Python code that came with the model was run, because model.trust_remote_code is true.")
    if setup.recipe.model.weights == "random":
        lines.append("The base has random weights: this run shows memory and speed, not learning.")
    return tuple(lines)
