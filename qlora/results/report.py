"""report.md and report.json: what was trained, on what, how it went and how to use it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qlora.durable import write_text
from qlora.errors import OutputError
from qlora.evaluation import Evaluation
from qlora.redact import redact, redact_values
from qlora.results.facts import (
    DataFacts,
    ModelFacts,
    MonitorFacts,
    RunSummary,
    Sample,
    TrainingFacts,
    memory_by_phase,
    num_of,
    printable,
    scores,
    verdict,
    without_private_paths,
)
from qlora.results.usage import load_with_peft
from qlora.units import format_bytes, format_count, format_seconds

__all__ = [
    "DataFacts", "ModelFacts", "RunSummary", "Sample", "TrainingFacts", "load_report", "render_markdown",
    "reproduce_command", "without_secrets", "write_report",
]

PLOTS = {
    "loss.png": "Loss on training and held-out rows",
    "learning_rate.png": "Learning rate",
    "grad_norm.png": "Gradient norm",
    "lengths.png": "Length of the rows",
    "memory.png": "Memory by phase, planned and measured",
    "gradients.png": "Gradient norm by group of layers",
    "adapters.png": "Adapters against the weights and outputs that they change",
}
# Longer samples are cut: a report is for reading, and metrics rest on the whole answers anyway.
_MAX_SAMPLE_CHARACTERS = 1500


def write_report(summary: RunSummary, folder: Path) -> Path:
    """Write report.json and report.md into the run folder; return the path of report.md.

    Plots that are in `folder`/plots are shown. Paths are made relative and the user's home is not named, see
    `qlora.results.facts.without_private_paths`. Secrets are taken out, of samples as well.

    Raises:
        OutputError: the folder cannot be written.
    """
    shared = without_secrets(without_private_paths(summary, folder))
    document = json.dumps(shared.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    plots = [name for name in PLOTS if (folder / "plots" / name).is_file()]
    report = folder / "report.md"
    try:
        report.write_text(render_markdown(shared, plots), encoding="utf-8")
        write_text(folder / "report.json", document + "\n")  # a folder with report.json is a finished run, so it comes last
    except OSError as error:
        raise OutputError(f"The report cannot be written to {folder}: {error.strerror}.",
                          "Free space there or make it writable; the adapter is saved already.") from error
    return report


def without_secrets(summary: RunSummary) -> RunSummary:
    """The summary with *** for every secret in its texts, those of rows and answers as well, see `qlora.redact`."""
    return RunSummary.from_json(redact_values(summary.to_json()))


def load_report(folder: Path) -> RunSummary:
    """The summary in a run folder's report.json.

    Raises:
        OutputError: there is none, or it is not one of ours.
    """
    path = folder / "report.json"
    try:
        return RunSummary.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        raise OutputError(f"{path} cannot be read as a report: {str(error).splitlines()[0]}.",
                          "Name the folder of a finished run.") from error


def reproduce_command(recipe: str | None, overrides: Sequence[str] = ()) -> str:
    """The command line that runs a recipe again, quoted for a shell, with *** for secrets; empty for a recipe that was built
    in Python.
    """
    return redact(shlex.join(["qlora", "train", recipe, *overrides])) if recipe else ""


def render_markdown(summary: RunSummary, plots: Iterable[str] = ()) -> str:
    """The report as text; `plots` are file names in plots/."""
    plots = set(plots)

    def pictures(*names: str) -> list[str]:
        return [f"![{PLOTS[name]}](plots/{name})" for name in names if name in plots]

    parts = [
        f"# Training report: {escape(summary.name)}", f"**{escape(verdict(summary))}**",
        *_scores(summary), *pictures("loss.png"), *samples_tables(summary.samples),
        "## What it took", *_cost(summary),
        *_memory(summary, pictures("memory.png")),
        *_monitor(summary.monitor, pictures("gradients.png", "adapters.png")),
        "## Model", *_model(summary.model),
        "## Data", *_data(summary.data), *pictures("lengths.png"),
        "## Settings", *_settings(summary), *pictures("learning_rate.png", "grad_norm.png"),
        "## Machine", *_machine(summary),
        "## Use the adapter", *_usage(summary),
        "## Run it again", *_again(summary),
    ]
    if summary.notes:
        parts += ["## Notes", "\n".join(f"- {escape(note)}" for note in summary.notes)]
    return "\n\n".join(parts) + "\n"


# --- the sections -----------------------------------------------------------------------------------------------------


def _scores(summary: RunSummary) -> list[str]:
    rows = [(s.measure, s.before, s.after, f"{s.outcome} ({s.good_direction})") for s in scores(summary)]
    if not rows:
        return []
    measured = list(dict.fromkeys(map(_basis, (summary.before, summary.after))))
    return [
        table(("on held-out rows", "before", "after", ""), rows),
        "Loss is in nats per trained token, perplexity its exponential. "
        f"Measured on {', afterwards on '.join(measured)}.",
    ]


def _basis(found: Evaluation) -> str:
    return f"{num_of(found.num_tokens, 'token')} and {num_of(found.num_answers, 'answer')}"


def samples_tables(samples: Sequence[Sample]) -> list[str]:
    parts = ["## Answers to held-out prompts"] if samples else []
    for i, sample in enumerate(samples, 1):
        texts = (
            ("prompt", sample.prompt), ("in the data", sample.reference),
            ("before", sample.before), ("after", sample.after),
        )
        parts.append(table((f"{i}", ""), [(name, escape(_cut(text)) or "*(empty)*") for name, text in texts]))
    return parts


def _cost(summary: RunSummary) -> list[str]:
    training, model = summary.training, summary.model
    device = "RAM" if summary.device.kind == "cpu" else escape(summary.device.name)
    rows = [
        ("peak memory", f"{_exact_bytes(summary.peak_bytes)} of {device}; budget {_exact_bytes(summary.budget_bytes)}"),
        ("trainable parameters", f"{model.trainable_parameters:,}, {100 * model.trainable_share:.3f} % of the base's"),
        ("steps", f"{training.num_steps:,}"),
        ("epochs", f"{training.epochs:g}"),
        ("tokens", f"{training.tokens:,}, of which {training.trained_tokens:,} count in the loss"),
        ("speed", f"{training.tokens_per_second:,.1f} tokens/s"),
        ("time", format_seconds(summary.total_seconds)),
        *((f"&nbsp;&nbsp;{escape(phase)}", format_seconds(seconds)) for phase, seconds in summary.seconds.items()),
        ("finished", escape(summary.finished_at)),
    ]
    return [table(("", ""), rows)]


def _memory(summary: RunSummary, pictures: Sequence[str]) -> list[str]:
    """Planned against measured by phase; nothing where neither is known."""
    phases = memory_by_phase(summary)
    if not phases:
        return []
    rows = [(escape(found.phase), _bytes_or_dash(found.planned_bytes), _bytes_or_dash(found.measured_bytes),
             "-" if found.error_percent is None else f"{found.error_percent:+.2f} %") for found in phases]
    return [
        "## Memory", table(("phase", "planned", "measured", "error"), rows),
        f"Tensors {'in RAM' if summary.device.kind == 'cpu' else 'on the GPU'} at the highest, when the longest rows were tried out"
        f"{'' if summary.device.kind == 'cpu' else ' and in the run'}. The error is that of the plan, in percent of what was "
        "measured: above 0 the plan asked for more than the run took.",
        *pictures,
    ]


def _monitor(monitor: MonitorFacts | None, pictures: Sequence[str]) -> list[str]:
    """What was seen while the run trained; nothing where nobody looked."""
    if monitor is None:
        return []
    advice = [f"- **Step {each.step:,}, rule {escape(each.rule)}**: {escape(each.text)} Try: `{each.override}`"
              for each in monitor.advice]
    parts = ["## Monitor", "\n".join(advice) if advice else "No rule fired: there is nothing to advise."]
    if not monitor.last:
        return parts
    rows = [(escape(name), *(_figure(found.get(key)) for key in ("grad_a", "grad_b", "update_ratio", "path_ratio")))
            for name, found in monitor.last.items()]
    sentence = (f"{num_of(monitor.num_looks, 'look')}, one every {num_of(monitor.every, 'step')}; the table is of step "
                f"{monitor.last_step:,}. Gradients are L2 norms before clipping. *Update* is the norm of (alpha / r) B A against "
                "that of the frozen weights; *path* is what an adapter adds to an output against what the base gives, for some "
                "tokens of the step in one module of the group.")
    missing = "" if all("path_ratio" in found for found in monitor.last.values()) else (
        " A dash: that module takes its tokens in another shape than the batch has, so its path was not measured.")
    return [*parts, table(("layers", "dL/dA", "dL/dB", "update", "path"), rows), sentence + missing, *pictures]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _model(model: ModelFacts) -> list[str]:
    rows = [
        ("base", escape(model.base) + (" (a folder)" if model.is_folder else "")),
        ("revision", escape(model.revision or "not known")),
        ("architecture", f"{escape(model.model_type)}: {model.num_layers:,} layers, hidden size {model.hidden_size:,}, "
                         f"vocabulary {model.vocab_size:,}"),
        ("parameters", f"{model.num_parameters:,} ({format_count(model.num_parameters)})"),
        ("in 4 bits", f"{model.quantised_parameters:,} in {model.num_4bit_modules:,} layers"),
        ("adapted", f"{model.num_adapted_modules:,} layers"),
    ]
    return [table(("", ""), rows)]


def _data(data: DataFacts) -> list[str]:
    lengths = data.lengths
    rows = [
        ("files", "<br>".join(escape(file) for file in data.files)),
        ("sha256", data.sha256),
        ("size", _exact_bytes(data.size_bytes)),
        ("format", escape(data.format)),
        ("rows", f"{data.num_rows:,} read; {data.num_train:,} to train on, {data.num_validation:,} held out"),
        ("tokens in a row", f"p50 {lengths.p50:,.0f}, p95 {lengths.p95:,.0f}, p99 {lengths.p99:,.0f}, "
                            f"longest {lengths.max:,.0f}, mean {lengths.mean:,.1f}; cut at {data.max_length:,}"),
        ("cut", num_of(data.num_truncated, "row")),
        ("left out", f"{data.num_answer_lost:,} lost their answer to the cut, {data.num_fully_masked:,} have nothing "
                     f"to train on, {data.num_bad_rows:,} could not be read"),
        ("duplicates", num_of(data.num_duplicates, "row")),
    ]
    if data.template is not None:
        stops = ", ".join(escape(token) for token in data.template.stop_tokens)
        rows.append(("chat template", f"{escape(data.template.name)}; answers end at {stops or 'nothing'}"))
    parts = [table(("", ""), rows)]
    if data.findings:
        texts = [(found.level, f"{found.text} {found.fix}".strip()) for found in data.findings]
        parts.append("\n".join(f"- **{escape(level)}**: {escape(text)}" for level, text in texts))
    return parts


def _settings(summary: RunSummary) -> list[str]:
    rows = [(f"`{key}`", escape(shown_value(decision.value)), decision.source, escape(decision.reason))
            for key, decision in summary.settings.items()]
    return [table(("setting", "value", "source", "why"), rows)]


def _machine(summary: RunSummary) -> list[str]:
    device = summary.device
    arithmetic = "bf16" if device.has_bf16 else "no bf16"
    if device.capability is not None:
        arithmetic += f", compute capability {'.'.join(map(str, device.capability))}"
    speeds = (device.bandwidth, "GB/s"), (device.tflops, "TFLOP/s")
    arithmetic += "".join(f", {value:g} {unit}" for value, unit in speeds if value)
    others = f"{format_bytes(device.used_by_others_bytes)} in use by others" if device.used_by_others_bytes else ""
    shared = [others, "draws the desktop" if device.display else "", "Windows or WSL" if device.windows else "",
              "" if device.present else "not in this machine"]
    rows = [
        ("device", f"{escape(device.name)} ({escape(device.kind)}), {arithmetic}"),
        ("its memory", f"{format_bytes(device.memory_bytes)}, {format_bytes(device.free_bytes)} free at the start"),
        *((("shared", ", ".join(filter(None, shared))),) if any(shared) else ()),
        ("host", f"{format_bytes(device.host_bytes)} RAM, {format_bytes(device.host_free_bytes)} free at the start, "
                 f"{device.num_threads:,} threads"),
        *((escape(name), escape(version)) for name, version in summary.versions.items()),
    ]
    return [table(("", ""), rows)]


def _usage(summary: RunSummary) -> list[str]:
    where = "is beside this folder, as [the model card](../README.md) says." if summary.on_hub else (
        f"is in [{escape(summary.adapter)}/]({summary.adapter}/).")
    how = "" if summary.on_hub else "; run this in the run folder"
    return [f"The adapter {where} It is a plain PEFT adapter{how}:",
            fenced(load_with_peft(summary, four_bits=True), "python")]


def _again(summary: RunSummary) -> list[str]:
    sentence = "For the same run take the same rows (sha256 above), library versions and machine."
    if not summary.command:
        return [f"The recipe was built in Python; resolved.json holds every value. {sentence}"]
    return [fenced(summary.command, "sh"), f"resolved.json holds every value. {sentence}"]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells must be escaped already."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escape(text: str) -> str:
    """Any text as the content of one Markdown line or table cell, showing exactly what it says.

    Punctuation that Markdown or HTML would act on is escaped, line ends become <br>, leading spaces stay visible, and
    control characters (a model may write any) become U+FFFD.
    """
    lines = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ").split("\n"):
        body = line.lstrip(" ")
        shown = "".join(_escaped(character) for character in printable(body))
        lines.append("&nbsp;" * (len(line) - len(body)) + shown)
    return "<br>".join(lines)


def _escaped(character: str) -> str:
    if character == "|":
        return "&#124;"  # a backslash before it means different things to different renderers of tables
    if character in "\\`*_{}[]<>#~&!$@":
        return f"\\{character}"
    return character


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SAMPLE_CHARACTERS else text[:_MAX_SAMPLE_CHARACTERS] + " …"


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks within it, free of control characters."""
    text = "\n".join(printable(line) for line in text.expandtabs(4).split("\n"))
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def shown_value(value: Any) -> str:
    """A setting's value as a recipe would write it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(shown_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown_value(item)}' for key, item in value.items())}}}"
    return str(value)


def _bytes_or_dash(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else _exact_bytes(size_bytes)


def _exact_bytes(size_bytes: int) -> str:
    return f"{format_bytes(size_bytes)} ({size_bytes:,} bytes)"
