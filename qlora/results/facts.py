"""Everything a report says, as plain data: it goes to report.json and comes back equal."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.data import Finding, LengthStats
from qlora.evaluation import Evaluation
from qlora.hardware import Device
from qlora.planning.plan import Decision

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# A smaller change of the loss than this share is called no change.
_CLEAR_CHANGE = 0.01
# With fewer held-out rows than this, a verdict says that it is rough.
_FEW_ROWS = 30


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, the answer in the data, and the model's greedy answer before and after training."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class ModelFacts:
    """The base and its adapters. `base` is what the user wrote; `revision` the commit that was loaded, if known.

    `quantised_parameters` are the base's weights held in 4 bits, in `num_4bit_modules` layers; `is_folder` says that the base
    was read from a folder, so that its name means nothing to others.
    """

    base: str
    revision: str | None
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_parameters: int
    quantised_parameters: int
    num_4bit_modules: int
    num_adapted_modules: int
    trainable_parameters: int
    is_folder: bool = False

    @property
    def trainable_share(self) -> float:
        """Trainable parameters as a share of the base's."""
        return self.trainable_parameters / self.num_parameters


@dataclass(frozen=True)
class TemplateFacts:
    """How conversations were written for the model.

    Attributes:
        name: "tokenizer" for the tokenizer's own, else a name or the name of a file; `reason` says why this one.
        example: a question and its answer, as the template writes them.
        stop_tokens: what ends an answer.
    """

    name: str
    reason: str
    example: str
    stop_tokens: tuple[str, ...]


@dataclass(frozen=True)
class DataFacts:
    """The rows. `num_rows` were read, before any was dropped; lengths are in tokens, before anything was cut.

    `size_bytes` is that of the files that `sha256` is the digest of; `template` is None where no row is a conversation.
    """

    files: tuple[str, ...]
    sha256: str
    format: str
    num_rows: int
    num_train: int
    num_validation: int
    max_length: int
    lengths: LengthStats
    num_truncated: int = 0
    num_answer_lost: int = 0
    num_fully_masked: int = 0
    num_duplicates: int = 0
    num_bad_rows: int = 0
    findings: tuple[Finding, ...] = ()
    size_bytes: int = 0
    template: TemplateFacts | None = None

    @property
    def is_chat(self) -> bool:
        """Rows are conversations; reports that know no template yet have the format alone to tell."""
        return self.template is not None or self.format not in ("text", "prompt_completion")


@dataclass(frozen=True)
class TrainingFacts:
    """What the loop did. `trained_tokens` are those that the loss counts; `tokens_per_second` is over all tokens."""

    num_steps: int
    epochs: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class AdviceFacts:
    """A rule that fired while the run trained, and the words to add to the command."""

    step: int
    rule: str
    text: str
    override: str


@dataclass(frozen=True)
class MonitorFacts:
    """What was seen in `num_looks` looks, one each `every` steps.

    `last` is the last look: by group of layers the norms `grad_a` and `grad_b`, the `update_ratio` and the `path_ratio`, as far as
    they were measured; see `qlora.training.monitor`.
    """

    every: int
    num_looks: int
    last_step: int
    last: dict[str, dict[str, float]]
    advice: tuple[AdviceFacts, ...] = ()


@dataclass(frozen=True)
class RunSummary:
    """A finished run.

    Args:
        name: the recipe's name.
        folder: the run folder, as the user would write it; `adapter` and the plots are relative to it.
        command: the command line that runs it again.
        finished_at: ISO 8601.
        before, after: the held-out rows; None where there were none.
        peak_bytes: of the device's memory: reserved by torch on a GPU, resident in RAM on a CPU.
        budget_bytes: what the run was allowed.
        seconds: duration of each phase, in order.
        settings: every setting by its dotted name.
        versions: of Python and the libraries.
        notes: remarks and warnings for the user, one line each.
        planned_phases, measured_phases: bytes of tensors at their highest in each phase; empty where nothing was planned or
            nothing could be measured.
        monitor: gradients and adapters while the run trained; None where nobody looked.
        on_hub: `adapter` is a repository, see `qlora.results.sharing`.
    """

    name: str
    folder: str
    command: str
    finished_at: str
    before: Evaluation | None
    after: Evaluation | None
    samples: tuple[Sample, ...]
    model: ModelFacts
    data: DataFacts
    training: TrainingFacts
    peak_bytes: int
    budget_bytes: int
    seconds: dict[str, float]
    settings: dict[str, Decision]
    device: Device
    versions: dict[str, str]
    adapter: str = "adapter"
    notes: tuple[str, ...] = ()
    planned_phases: dict[str, int] = field(default_factory=dict)
    measured_phases: dict[str, int] = field(default_factory=dict)
    on_hub: bool = False
    monitor: MonitorFacts | None = None

    @property
    def total_seconds(self) -> float:
        """All phases together."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """The summary as report.json holds it, in JSON's own types. Numbers that are not finite become text: "NaN"."""
        document = _plain(_adapter().dump_python(self))
        for name in ("before", "after"):
            found = getattr(self, name)
            if found is not None:
                document[name] = _plain(found.to_json())
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunSummary:
        """The summary that `to_json` wrote; the answers of `before` and `after` are only in `samples`.

        Raises:
            pydantic.ValidationError: a field is missing or of another type.
        """
        return _adapter().validate_python(dict(document))


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[RunSummary]:
    from pydantic import TypeAdapter

    return TypeAdapter(RunSummary)


def _plain(value: Any) -> Any:
    """Lists for tuples, and text for numbers that JSON has no way to write."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


# --- what the figures say ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One measure on the held-out rows, ready to print. `outcome` is "better", "worse" or "same"."""

    measure: str
    before: str
    after: str
    good_direction: str
    outcome: str


def scores(summary: RunSummary) -> list[Score]:
    """Loss, perplexity and exact match before and after; empty without held-out rows."""
    before, after = summary.before, summary.after
    if before is None or after is None:
        return []
    rows = [
        _score("loss", before.loss, after.loss, "{:.3f}", lower=True),
        _score("perplexity", before.perplexity, after.perplexity, "{:,.2f}", lower=True),
    ]
    if before.exact_match is not None and after.exact_match is not None:
        rows.append(_score("exact match", before.exact_match * 100, after.exact_match * 100, "{:.1f} %", lower=False))
    return rows


def _score(measure: str, before: float, after: float, style: str, *, lower: bool) -> Score:
    shown_before, shown_after = style.format(before), style.format(after)
    if shown_before == shown_after:
        outcome = "same"
    else:
        outcome = "better" if (after < before) == lower and math.isfinite(after) else "worse"
    return Score(measure, shown_before, shown_after, "lower is better" if lower else "higher is better", outcome)


@dataclass(frozen=True)
class PhaseMemory:
    """One phase: tensors at their highest, planned and measured, None where one of the two is not known."""

    phase: str
    planned_bytes: int | None
    measured_bytes: int | None

    @property
    def error_percent(self) -> float | None:
        """How far the plan is off, in percent of what was measured; under 0, the plan asked for too little."""
        if self.planned_bytes is None or not self.measured_bytes:
            return None
        return 100 * (self.planned_bytes - self.measured_bytes) / self.measured_bytes


def memory_by_phase(summary: RunSummary) -> list[PhaseMemory]:
    """Every phase that was planned or measured, in the order of the run."""
    planned, measured = summary.planned_phases, summary.measured_phases
    return [PhaseMemory(phase, planned.get(phase), measured.get(phase)) for phase in dict.fromkeys([*planned, *measured])]


def outcome(summary: RunSummary) -> str:
    """ "better", "worse", "same", "broken" (a loss that is not finite) or "unknown" (nothing was held out)."""
    if summary.before is None or summary.after is None:
        return "unknown"
    before, after = summary.before.loss, summary.after.loss
    if not math.isfinite(after):
        return "broken"
    if after < before * (1 - _CLEAR_CHANGE):
        return "better"
    return "worse" if after > before * (1 + _CLEAR_CHANGE) else "same"


def verdict(summary: RunSummary) -> str:
    """What came of the run, in plain words."""
    before, after, num_rows = summary.before, summary.after, summary.data.num_validation
    if before is None or after is None:
        return ("There were no held-out rows, so nothing tells whether the model got better. Set data.validation to a "
                "share such as 0.1, or to a file.")
    found = outcome(summary)
    if found == "broken":
        return "After training, the loss on held-out rows is not a finite number. Do not use this adapter."
    start = {"better": "The model got better", "worse": "The model got worse", "same": "No clear change"}[found]
    text = (f"{start}: on {num_of(num_rows, 'row')} that it was not trained on, the loss went from {before.loss:.3f} "
            f"to {after.loss:.3f}")
    if before.exact_match is not None and after.exact_match is not None and after.num_answers:
        matches = [round(evaluation.exact_match * evaluation.num_answers) for evaluation in (before, after)]
        answers = num_of(after.num_answers, "answer")
        text += f", and {matches[1]:,} of {answers} match word for word ({matches[0]:,} before)"
    if num_rows < _FEW_ROWS:
        text += ". So few rows give a rough measure"
    return f"{text}."


def num_of(count: int, noun: str) -> str:
    """'1 row', '1,200 rows'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Text with U+FFFD for characters that steer a terminal or turn the line round; a model may write any.

    Spaces of every width and the joiners of emoji and Indic scripts stay.
    """
    def is_safe(character: str) -> bool:
        return character.isprintable() or character in "\u200c\u200d" or unicodedata.category(character) == "Zs"

    return "".join(character if is_safe(character) else "\ufffd" for character in text)


# --- paths ------------------------------------------------------------------------------------------------------------


def without_private_paths(summary: RunSummary, folder: Path) -> RunSummary:
    """The summary as it may be shared: paths relative to the run folder, and nothing that names the user's home.

    The command and the samples stay as they are: the user wrote the one, the data and the model the other.
    """
    settings = {
        key: replace(decision, value=shown_path(decision.value, folder), reason=without_home(decision.reason))
        for key, decision in summary.settings.items()
    }
    data = replace(
        summary.data,
        files=tuple(shown_path(file, folder) for file in summary.data.files),
        findings=tuple(replace(f, text=without_home(f.text), fix=without_home(f.fix)) for f in summary.data.findings),
    )
    return replace(
        summary, settings=settings, data=data, folder=without_home(summary.folder),
        model=replace(summary.model, base=shown_path(summary.model.base, folder)),
        adapter=shown_path(summary.adapter, folder), notes=tuple(without_home(note) for note in summary.notes),
    )


def shown_path(value: Any, folder: Path) -> Any:
    """An absolute path relative to `folder`, with `~` for the home folder where they have nothing in common.

    Anything else (a Hub id, a number) comes back as it is.
    """
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    home, start = Path.home(), Path(os.path.abspath(folder))
    try:
        shared = Path(os.path.commonpath([value, start]))
    except ValueError:  # two drives of Windows
        return without_home(value)
    if shared == Path(shared.anchor) or shared in home.parents:
        return without_home(value)
    return Path(os.path.relpath(value, start)).as_posix()


def without_home(text: str) -> str:
    """The text with ~ for the user's home folder."""
    home = str(Path.home())
    return text if home == Path(home).anchor else text.replace(home + os.sep, "~/")
