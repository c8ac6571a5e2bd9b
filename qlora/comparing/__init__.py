"""How good adapters are beside their bare base: loss, perplexity and matches on the same rows, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora.adapted import (
    Adapted, base_explained, find_architecture, find_precision, find_tokenizers, load_adapted, refuse_other_bases, short_names,
)
from qlora.comparing.figures import Measured, row_document
from qlora.comparing.measuring import measure
from qlora.comparing.rows import Rows, common, fingerprint_of, read_rows, seen_before
from qlora.errors import HardwareError
from qlora.hub.adapter import Adapter
from qlora.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora.training.evaluating import EvaluationPlan


@dataclass(frozen=True)
class Sample:
    """A prompt, the answer that the data gives, and what each model writes, by its name."""

    prompt: str
    reference: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Candidate:
    """A model that was measured, and what it is held against.

    Attributes:
        base: the bare base on the same tokens; None of the base itself.
    """

    measured: Measured
    base: Measured | None = None

    @property
    def name(self) -> str:
        return self.measured.name

    @property
    def evaluation(self) -> Any:
        """Its figures as a run's report has them."""
        return self.measured.evaluation


@dataclass(frozen=True)
class Comparison:
    """Candidates on the same rows, the base first.

    Attributes:
        adapters: by the names of the candidates.
        files, sha256: of the rows.
        held_out: they are those that the adapter's own run held out, so it was not trained on them.
        places: file and line of each row.
        max_length: tokens; longer rows were cut.
        samples: of the rows that were answered, in their order.
        machine: device, numbers, versions and what was planned, in JSON's own types.
        notes: what should be known about the figures, one line each.
    """

    adapters: Mapping[str, Adapter]
    candidates: tuple[Candidate, ...]
    files: tuple[str, ...]
    sha256: str
    held_out: bool
    places: tuple[str, ...]
    max_length: int
    samples: tuple[Sample, ...] = ()
    machine: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def adapter(self) -> Adapter:
        """The first one."""
        return next(iter(self.adapters.values()))

    @property
    def num_rows(self) -> int:
        return len(self.places)

    def to_json(self, *, num_samples: int | None = None, per_row: bool = False) -> dict[str, Any]:
        """Everything, in JSON's own types.

        Args:
            num_samples: at most so many of them; None is all.
            per_row: the loss of each row as well.
        """
        first = self.adapter
        results = []
        for each in self.candidates:
            found = each.measured.to_json(each.base)
            if per_row:
                found["rows"] = row_document(each.measured, self.places)
            results.append(found)
        return {
            "adapter": first.name, "revision": first.revision, "base": first.base, "base_revision": first.base_revision,
            "adapters": [{"name": name, "source": each.name, "revision": each.revision} for name, each in self.adapters.items()],
            "data": {"files": list(self.files), "sha256": self.sha256, "held_out": self.held_out, "num_rows": self.num_rows,
                     "max_length": self.max_length},
            "confidence": 0.95, "results": results,
            "samples": [{"prompt": each.prompt, "reference": each.reference, "answers": dict(each.answers)}
                        for each in self.samples[:num_samples]],
            "seconds": {each.name: dict(each.measured.seconds) for each in self.candidates},
            "machine": dict(self.machine or {}), "notes": list(self.notes),
        }


def compare(
    adapters: Adapter | Sequence[Adapter], *, data: str | None = None, num_rows: int | None = None,
    num_answers: int | None = None, device: str = "auto", progress: Progress | None = None,
) -> Comparison:
    """Measure the base and adapters on it, on the same rows. The base is loaded once, and adapters are switched on and off.

    Args:
        adapters: one, or several of the same base.
        data: a file, folder or Hub id of rows; None takes those that the first adapter's run held out, if its data is here.
        num_rows: at most so many.
        num_answers: rows that are answered; None is as many as in training, or 64.

    Raises:
        DataError: no rows, or none that can be used.
        ModelError, HardwareError: see `qlora.adapted.load_adapted`.
    """
    from qlora.training.evaluating import plan_evaluation

    adapters, progress = (adapters,) if isinstance(adapters, Adapter) else tuple(adapters), progress or Progress()
    refuse_other_bases(adapters)
    names, (found, precision) = short_names(adapters), find_precision(adapters[0], device)
    tokenizers = find_tokenizers(adapters, progress)
    ways = _ways(tokenizers)
    max_positions = find_architecture(adapters[0]).max_positions
    groups = common([read_rows(adapters[0], tokenizers[way[0]], max_positions, progress, path=data, num_rows=num_rows,
                               num_answers=num_answers) for way in ways])
    notes = [*groups[0].notes, *_notes(adapters, names, ways, groups[0])]
    for note in notes:
        progress.note(note)
    with base_explained(adapters[0]):
        plan = plan_evaluation(
            adapters, found, precision, max_length=max(rows.max_length for rows in groups), progress=progress,
            prompt_tokens=max(rows.prompt_tokens for rows in groups), answer_tokens=max(rows.answer_tokens for rows in groups),
            num_answers=len(groups[0].samples),
        )
    adapted = load_adapted(adapters, device=device, tokenizer=tokenizers, progress=progress, plan=plan)
    try:
        candidates = _measure_all(adapted, names, ways, groups, progress)
    finally:
        adapted.close()
    first = groups[0]
    return Comparison(
        dict(zip(names, adapters, strict=True)), candidates, tuple(first.data.rowset.files), first.data.rowset.sha256,
        first.held_out, tuple(first.places), first.data.max_length, _samples(first, candidates),
        _machine(adapted, plan, candidates),
        (*adapted.notes, *notes),
    )


# --- details -----------------------------------------------------------------------------------------------------------


def _ways(tokenizers: Sequence[PreTrainedTokenizerBase]) -> list[list[int]]:
    """Numbers of adapters that write rows in the same way: by the same tokens and the same chat template."""
    ways: list[list[int]] = []
    for number, tokenizer in enumerate(tokenizers):
        for way in ways:
            other = tokenizers[way[0]]
            if tokenizer.chat_template == other.chat_template and tokenizer.get_vocab() == other.get_vocab():
                way.append(number)
                break
        else:
            ways.append([number])
    return ways


def _notes(adapters: Sequence[Adapter], names: Sequence[str], ways: Sequence[Sequence[int]], rows: Rows) -> list[str]:
    held_out, sha256 = rows.held_out, rows.data.rowset.sha256
    notes = [f"{', '.join(names[number] for number in way)}: rows are written with another chat template than for {names[0]}; "
             "compare figures by byte, and each adapter with the base beside it." for way in ways[1:]]
    first = fingerprint_of(adapters[0])
    if held_out:
        others = [name for name, each in zip(names[1:], adapters[1:], strict=True) if fingerprint_of(each) != first]
        if others:
            notes.append(f"The rows are those that {names[0]} has not seen; {', '.join(others)} may have been trained on some of "
                         "them.")
    seen = [name for name, each in zip(names, adapters, strict=True) if not held_out and seen_before(each, sha256)]
    if seen:
        notes.append(f"{', '.join(seen)}: trained on rows of the same file, so the figures say how well these were learnt. "
                     "Without --data the rows are measured that a run held out.")
    return notes


def _measure_all(
    adapted: Adapted, names: Sequence[str], ways: Sequence[Sequence[int]], groups: Sequence[Rows], progress: Progress
) -> tuple[Candidate, ...]:
    """The base, once for each way in which rows are written, and every adapter; in the order of their names."""
    from qlora.training.recovery import is_out_of_memory

    bases, found = [], {}
    try:
        for way, rows in zip(ways, groups, strict=True):
            base = measure(adapted, None, rows, progress)
            base = replace(base, name=f"base for {names[way[0]]}") if bases else base
            bases.append(Candidate(base))
            for number in way:
                found[number] = Candidate(measure(adapted, names[number], rows, progress), base)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        length = max(rows.max_length for rows in groups)
        raise HardwareError(f"{adapted.device.name} has too little memory left for one row of {length:,} tokens.",
                            "Free some, or name shorter rows.") from error
    return (*bases, *(found[number] for number in range(len(names))))


def _samples(rows: Rows, candidates: Sequence[Candidate]) -> tuple[Sample, ...]:
    from qlora.training.summary import question

    return tuple(
        Sample(question(sample), sample.reference, {each.name: each.measured.answers[i] for each in candidates})
        for i, sample in enumerate(rows.samples)
    )


def _machine(adapted: Adapted, plan: EvaluationPlan, candidates: Sequence[Candidate]) -> dict[str, Any]:
    from qlora.training.setup import library_versions

    return {
        "device": adapted.device.name, "kind": adapted.device.kind, "dtype": adapted.precision.compute, "plan": plan.to_json(),
        "rows_at_once": {each.name: each.measured.rows_at_once for each in candidates}, "versions": library_versions(),
    }
