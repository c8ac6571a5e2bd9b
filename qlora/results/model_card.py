"""README.md of an adapter, on the Hub and in the run folder: what it does, how to load it, what it was made of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from qlora.durable import write_text
from qlora.errors import OutputError
from qlora.results.facts import ModelFacts, RunSummary, memory_by_phase, num_of, outcome, scores, verdict
from qlora.results.licence import BUILTIN, Licence
from qlora.results.report import PLOTS, escape, fenced, samples_tables, shown_value, table
from qlora.results.sharing import LEFT_OUT, for_others, hub_dataset
from qlora.results.usage import (
    VLLM_RANKS, answer_with_model, four_bits_instead, load_with_peft, load_with_transformers, serve_with_vllm,
)
from qlora.units import format_bytes, format_count, format_seconds

CARD = "README.md"
_HUB = "https://huggingface.co"
_TAGS = ("lora", "qlora", "4-bit", "nf4", "sft", "trl")
# What a reader asks about first; resolved.json has the rest.
_SETTINGS = (
    "lora.r", "lora.alpha", "lora.targets", "lora.dropout", "train.learning_rate", "train.schedule", "train.epochs",
    "train.max_steps", "train.batch", "train.optimizer", "train.keep", "train.seed", "data.max_length", "data.train_on",
    "data.packing", "model.dtype", "memory.checkpointing", "memory.streaming",
)
_MAX_EXAMPLE_CHARACTERS = 1500
_ROWS = "The rows may have terms of their own."
_MARK = "<!-- written by qlora, sha256 "
_MARKED = re.compile(r"(?P<digest>[0-9a-f]{64}) -->\s*")


@dataclass(frozen=True)
class _Places:
    """Links of the card, which differ between the Hub and the run folder."""

    adapter: str
    run: str
    hub_base: str | None
    plots: frozenset[str]


def render_card(
    summary: RunSummary, *, repo: str | None, licence: Licence | None, plots: Iterable[str] = (), template: str | None = None,
    samples: bool = False, base: str | None = None,
) -> str:
    """The card as text. The same run gives the same text; paths, rows and secrets are taken out, see `for_others`.

    Args:
        repo: owner/name on the Hub; None for the card in the run folder.
        licence: of the base; None where it is not known, which the card says.
        plots: file names in plots/.
        template: the adapter's chat_template.jinja, for runs whose summary does not say how it writes a conversation.
        samples: show held-out prompts and answers.
        base: what a base that was a folder is called on the Hub.
    """
    summary = for_others(summary, repo=repo, samples=samples)
    if base is not None and summary.model.is_folder:
        summary = replace(summary, model=replace(summary.model, base=base, is_folder=False, revision=None))
    licence = licence or (BUILTIN if summary.model.base == "builtin:tiny" else None)
    places = _Places(repo or "adapter", "run/" if repo else "", _hub_id(summary.model), frozenset(plots))
    shown = _resolved_link(licence, places)
    parts = [
        f"---\n{_front_matter(summary, places, shown)}\n---",
        f"# {escape(repo or summary.name)}", *_verdict(summary), _what(summary, places), *_pictures(places, "loss.png"),
        *samples_tables(summary.samples),
        "## Use it", *_usage(summary, places),
        "## Chat template", *_template(summary, template),
        "## Limits", _limits(summary),
        "## Data", *_data(summary),
        "## Settings", *_settings(summary, places),
        "## What it took", *_cost(summary), *_pictures(places, "memory.png"),
        "## How it was made", *_making(summary, places),
        "## Licence", _licence(summary, shown, places),
    ]
    text = _plain("\n\n".join(parts).encode("utf-8", "replace").decode()) + "\n\n"
    return f"{text}{_MARK}{_digest(text)} -->\n"


def is_unedited(text: str) -> bool:
    """Whether nobody has changed a card since it was written; other line ends, and none at the end, are no change."""
    above, mark, rest = _plain(text).rpartition(_MARK)
    match = _MARKED.fullmatch(rest)
    return bool(mark) and match is not None and match["digest"] == _digest(above)


def write_card(summary: RunSummary, folder: Path, *, licence: Licence | None = None, template: str | None = None) -> Path:
    """Write README.md into the run folder and return its path; one that a person has edited stays as it is.

    Raises:
        OutputError: it cannot be read or written.
    """
    path, plots = folder / CARD, [name for name in PLOTS if (folder / "plots" / name).is_file()]
    try:
        if not path.exists() or is_unedited(path.read_text(encoding="utf-8", errors="replace")):
            write_text(path, render_card(summary, repo=None, licence=licence, plots=plots, template=template))
    except OSError as error:
        raise OutputError(f"The model card cannot be written to {path}: {error.strerror or error}.",
                          "Free space there or make it writable; the adapter is saved already.") from error
    return path


# --- metadata ---------------------------------------------------------------------------------------------------------


def _front_matter(summary: RunSummary, places: _Places, licence: Licence | None) -> str:
    """YAML of what the Hub sorts and links models by. What is not known is left out."""
    from huggingface_hub import ModelCardData

    datasets = list(dict.fromkeys(found for file in summary.data.files if (found := hub_dataset(file)) and _is_valid_id(found)))
    relation = {"base_model_relation": "adapter"} if places.hub_base else {}
    card = ModelCardData(
        base_model=places.hub_base, library_name="peft", pipeline_tag="text-generation", tags=list(_TAGS),
        license=licence.id if licence else None, license_name=licence.name if licence else None,
        license_link=licence.link if licence else None, datasets=datasets or None, **relation,
    )
    return card.to_yaml()


def _hub_id(model: ModelFacts) -> str | None:
    """The base where it is a model of the Hub, not a folder or the embedded one."""
    return model.base if not model.is_folder and _is_valid_id(model.base) else None


def _is_valid_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _resolved_link(licence: Licence | None, places: _Places) -> Licence | None:
    """The licence with a link that works outside the base's repository too, where it names a file in it."""
    if licence is None or licence.link is None or "://" in licence.link or places.hub_base is None:
        return licence
    return replace(licence, link=f"{_HUB}/{places.hub_base}/blob/main/{quote(licence.link)}")


# --- what people look for first ---------------------------------------------------------------------------------------


def _verdict(summary: RunSummary) -> list[str]:
    text = f"**{escape(verdict(summary))}**"
    if outcome(summary) in ("worse", "broken"):
        text = f"> **Warning.** {text} The base without this adapter does better."
    parts = [text]
    rows = [(f"{s.measure} ({s.good_direction})", s.before, s.after, s.outcome) for s in scores(summary)]
    return parts + ([table(("on held-out rows", "before", "after", ""), rows)] if rows else [])


def _what(summary: RunSummary, places: _Places) -> str:
    model, data = summary.model, summary.data
    return (
        f"A LoRA adapter of rank {summary.settings['lora.r'].value} for {_base_link(model, places)}: "
        f"{format_count(model.trainable_parameters)} parameters, {100 * model.trainable_share:.2g} % of the base's, trained on "
        f"{num_of(data.num_train, 'row')} while the base stood frozen in 4 bits (QLoRA)."
    )


def _base_link(model: ModelFacts, places: _Places) -> str:
    if places.hub_base is None:
        kind = "the small model that comes with qlora, " if model.base.startswith("builtin:") else ""
        return f"{'a model in a folder, ' if model.is_folder else kind}**{escape(model.base)}**"
    link = f"[{escape(model.base)}]({_HUB}/{places.hub_base})"
    if not model.revision:
        return link
    tree = f"{_HUB}/{places.hub_base}/tree/{quote(model.revision, safe='', errors='replace')}"
    return f"{link} at revision [{escape(model.revision[:12])}]({tree})"


def _pictures(places: _Places, *names: str) -> list[str]:
    return [f"![{PLOTS[name]}]({places.run}plots/{name})" for name in names if name in places.plots]


def _usage(summary: RunSummary, places: _Places) -> Iterator[str]:
    where = "" if summary.on_hub else ", in the run folder"
    yield f"With qlora, which finds base and template by itself{where}:"
    yield fenced(f"qlora chat {places.adapter}", "sh")
    yield "With PEFT, the base in 16 bits:"
    yield fenced(f"{load_with_peft(summary, four_bits=False)}\n\n{answer_with_model(summary)}", "python")
    yield ("With the base in 4 bits, as it was in training, which takes about a quarter of the memory: these lines in place of "
           "the one that makes `base`.")
    yield fenced(four_bits_instead(summary), "python")
    yield "With Transformers (PEFT must be installed):"
    yield fenced(load_with_transformers(summary), "python")
    command = serve_with_vllm(summary)
    if command:
        yield "With vLLM:"
        yield fenced(command, "sh")
    else:
        is_embedded = summary.model.base.startswith("builtin:")
        why = "does not know the embedded base" if is_embedded else f"takes ranks up to {VLLM_RANKS[-1]}"
        yield f"vLLM {why}; `qlora merge` makes a model of base and adapter that it takes."


def _template(summary: RunSummary, jinja: str | None) -> Iterator[str]:
    found, file = summary.data.template, f"{'' if summary.on_hub else 'adapter/'}chat_template.jinja"
    if not summary.data.is_chat:
        yield "None: the rows are no conversations. Give the model a text that begins as those in the data do."
        return
    if found is None:
        yield f"The adapter's tokenizer applies it{f', from {file}' if jinja else ''}."
        return
    own = "The tokenizer's own." if found.name == "tokenizer" else f"{escape(found.name)}: {escape(found.reason)}."
    stops = ", ".join(escape(token) for token in found.stop_tokens)
    ends = f"Answers end at {stops}." if stops else "No token ends an answer."
    yield f"{own} The adapter's tokenizer applies it ({file}). {ends} A question and its answer look like this:"
    example = found.example.rstrip("\n")
    yield fenced(example if len(example) <= _MAX_EXAMPLE_CHARACTERS else example[:_MAX_EXAMPLE_CHARACTERS] + " …", "text")


def _limits(summary: RunSummary) -> str:
    data = summary.data
    lines = []
    if summary.before is None or summary.after is None:
        lines.append("Nothing was measured on rows that it was not trained on.")
    else:
        rows = num_of(data.num_validation, "held-out row")
        lines.append(f"It was measured on {rows} of its own data, and on nothing else: not on other tasks, languages or "
                     "questions of safety. What the base does wrong, it may do wrong too.")
    if data.max_length:
        lines.append(f"It has seen rows of up to {data.max_length:,} tokens.")
    lines += [f"{found.text} {found.fix}".strip() for found in data.findings if found.level == "warning"]
    return "\n".join(f"- {escape(line)}" for line in lines)


# --- what it was made of ----------------------------------------------------------------------------------------------


def _data(summary: RunSummary) -> list[str]:
    data, lengths = summary.data, summary.data.lengths
    counts = (
        ("cut", data.num_truncated), ("without their answer after the cut", data.num_answer_lost),
        ("with nothing to train on", data.num_fully_masked), ("unreadable", data.num_bad_rows), ("repeated", data.num_duplicates),
    )
    rows = [
        ("files", "<br>".join(map(_file, data.files))),
        ("sha256", data.sha256),
        ("size", f"{format_bytes(data.size_bytes)} ({data.size_bytes:,} bytes)"),
        ("rows", f"{data.num_rows:,} read; {data.num_train:,} to train on, {data.num_validation:,} held out"),
        ("format", escape(data.format)),
        ("tokens in a row",
         f"p50 {lengths.p50:,.0f}, p95 {lengths.p95:,.0f}, longest {lengths.max:,.0f}; cut at {data.max_length:,}"),
        *((name, num_of(count, "row")) for name, count in counts if count),
    ]
    return [table(("", ""), rows)]


def _file(name: str) -> str:
    found = hub_dataset(name)
    return f"[{escape(name)}]({_HUB}/datasets/{found})" if found and _is_valid_id(found) else escape(name)


def _settings(summary: RunSummary, places: _Places) -> list[str]:
    rows = [(f"`{key}`", escape(shown_value(found.value)), "default" if found.source == "default" else escape(found.reason))
            for key in _SETTINGS if (found := summary.settings.get(key)) is not None and found.value is not None]
    return [table(("setting", "value", "why"), rows),
            f"All others, each with its reason: [resolved.json]({places.run}resolved.json)."]


def _cost(summary: RunSummary) -> list[str]:
    training, device = summary.training, summary.device
    is_cpu = device.kind == "cpu"
    host = "" if is_cpu else f"; host with {format_bytes(device.host_bytes)} of RAM"
    rows = [
        ("hardware", f"{escape(device.name)}, {format_bytes(device.memory_bytes)} of {'RAM' if is_cpu else 'memory'}{host}"),
        ("peak memory", f"{format_bytes(summary.peak_bytes)}; budget {format_bytes(summary.budget_bytes)}"),
        ("time", f"{format_seconds(summary.total_seconds)}, training {format_seconds(summary.seconds.get('train', 0.0))} of it"),
        ("steps", f"{training.num_steps:,}, {training.epochs:.3g} epochs"),
        ("tokens", f"{training.tokens:,}, of which {training.trained_tokens:,} count in the loss; "
                   f"{training.tokens_per_second:,.0f} a second"),
    ]
    parts = [table(("", ""), rows)]
    phases = [(escape(found.phase), *(_size(size) for size in (found.planned_bytes, found.measured_bytes)),
               "-" if found.error_percent is None else f"{found.error_percent:+.2f} %") for found in memory_by_phase(summary)]
    if phases:
        parts.append(table(("tensors at their highest", "planned", "measured", "error of the plan"), phases))
    return parts


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_bytes(size_bytes)


def _making(summary: RunSummary, places: _Places) -> Iterator[str]:
    if summary.command:
        yield fenced(summary.command, "sh")
    else:
        yield "The recipe was built in Python."
    yield (f"Finished {escape(summary.finished_at)}. The [training report]({places.run}report.md) has every figure and curve, "
           f"[resolved.json]({places.run}resolved.json) every setting, [plan.json]({places.run}plan.json) the plan.")
    yield f"Versions: {', '.join(f'{escape(name)} {escape(version)}' for name, version in summary.versions.items())}."
    notes = [note for note in summary.notes if note != LEFT_OUT]
    if notes:
        yield "\n".join(f"- {escape(note)}" for note in notes)


def _licence(summary: RunSummary, licence: Licence | None, places: _Places) -> str:
    if licence is None:
        where = f"at [{escape(summary.model.base)}]({_HUB}/{places.hub_base})" if places.hub_base else "where the base came from"
        return f"The licence of the base is not known to qlora. Look {where} before you use or share this adapter. {_ROWS}"
    name = escape(licence.name or licence.id)
    linked = f"[{name}]({licence.link})" if licence.link and "://" in licence.link else name
    return f"The base is under {linked}, and whoever uses the two together is held to it. {_ROWS}"


# --- edited or not ----------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
