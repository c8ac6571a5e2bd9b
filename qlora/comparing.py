"""How good an adapter is beside its bare base: loss, perplexity and exact match of both on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora.adapted import Adapted, find_architecture, find_tokenizer, load_adapted
from qlora.errors import DataError, ModelError
from qlora.evaluation import Evaluation, exact_match
from qlora.hub.adapter import Adapter
from qlora.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from qlora.data import PreparedData, TokenRow
    from qlora.recipe import Recipe

# Answers are as long as the longest reference and a little more, at most this; and so many rows are answered where no run says
# how many. Both as in training (`qlora.training.probe`, train.sample_rows), so that figures can be compared.
_MAX_ANSWER_TOKENS, _NUM_ANSWERS = 256, 64
_CHUNK_BYTES = 2**26  # of logits at once; a row of 2,048 tokens of a large vocabulary has 1.2 GiB of them
_TRIED_TOKENS = 64
_NAME_THE_ROWS = "Name rows to measure on: --data FILE"


@dataclass(frozen=True)
class Candidate:
    """A model that was measured: "base", or an adapter's name."""

    name: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Comparison:
    """Candidates on the same rows, the base first.

    Attributes:
        files, sha256: of the rows.
        held_out: they are those that the adapter's own run held out, so it was not trained on them.
        max_length: tokens; longer rows were cut.
        notes: what should be known about the figures, one line each.
    """

    adapter: Adapter
    candidates: tuple[Candidate, ...]
    files: tuple[str, ...]
    sha256: str
    held_out: bool
    num_rows: int
    max_length: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's own types."""
        return {
            "adapter": self.adapter.name, "revision": self.adapter.revision,
            "base": self.adapter.base, "base_revision": self.adapter.base_revision,
            "data": {"files": list(self.files), "sha256": self.sha256, "held_out": self.held_out, "num_rows": self.num_rows,
                     "max_length": self.max_length},
            "results": [{"name": each.name, **each.evaluation.to_json()} for each in self.candidates],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Rows:
    """What is measured on."""

    data: PreparedData
    rows: Sequence[TokenRow]
    held_out: bool
    generation_tokens: int
    notes: tuple[str, ...] = ()


def compare(
    adapter: Adapter, *, data: str | None = None, num_rows: int | None = None, device: str = "auto",
    progress: Progress | None = None,
) -> Comparison:
    """Measure the base and the adapter on it. The model is loaded once, and the adapter switched off for the base.

    Args:
        data: a file, folder or Hub id of rows; None takes those that the adapter's run held out, if its data is here.
        num_rows: at most so many.

    Raises:
        DataError: no rows, or none that can be used.
        ModelError, HardwareError: see `qlora.adapted.load_adapted`.
    """
    progress = progress or Progress()
    tokenizer = find_tokenizer(adapter, progress)
    rows = (_rows_of_run(adapter, tokenizer, num_rows, progress) if data is None
            else _rows_in(data, adapter, tokenizer, num_rows, progress))
    for note in rows.notes:
        progress.note(note)
    adapted = load_adapted(adapter, device=device, tokenizer=tokenizer, progress=progress)
    candidates = []
    for name in ("base", adapter.name):
        with adapted.without_adapter() if name == "base" else nullcontext():
            candidates.append(Candidate(name, evaluate(adapted, rows, f"of {name}", progress)))
    return Comparison(
        adapter, tuple(candidates), tuple(rows.data.rowset.files), rows.data.rowset.sha256, rows.held_out, len(rows.rows),
        rows.data.max_length, (*adapted.notes, *rows.notes),
    )


def evaluate(adapted: Adapted, rows: Rows, what: str, progress: Progress) -> Evaluation:
    """Loss over all rows, and greedy answers to the sampled ones."""
    with progress.stage(f"Loss {what}") as update:
        found = measure(adapted, rows.rows, update)
    samples = rows.data.samples
    if not samples:
        return found
    with progress.stage(f"Answers {what}") as update:
        answers = _answers(adapted, rows, progress.note, update)
    match = exact_match(answers, [sample.reference for sample in samples])
    return replace(found, exact_match=match, num_answers=len(answers), answers=tuple(answers))


def measure(
    adapted: Adapted, rows: Sequence[TokenRow], update: Callable[[int, int], None] = lambda done, total: None
) -> Evaluation:
    """Mean loss in nats over the trained tokens of all rows, one row at a time, without storing its logits."""
    import torch

    total, num_tokens = 0.0, 0
    with adapted.computing():
        summed = _summed_loss(adapted, rows)
        for done, row in enumerate(rows, start=1):
            ids, labels = (torch.tensor([each], device=adapted.model.device) for each in (row.input_ids, row.labels))
            total += float(summed(ids, labels))
            num_tokens += row.num_trained
            update(done, len(rows))
    return Evaluation(loss=total / max(1, num_tokens), num_tokens=num_tokens)


# --- the rows ----------------------------------------------------------------------------------------------------------


def _rows_of_run(adapter: Adapter, tokenizer: PreTrainedTokenizerBase, num_rows: int | None, progress: Progress) -> Rows:
    """Those that the run held out, read and split as it did."""
    from qlora.training.setup import read_data

    recipe = _recipe_of(adapter)
    if recipe is None:
        raise DataError(f"{adapter.name} is no run folder, so it is not known which rows it has not seen.", _NAME_THE_ROWS)
    try:
        # The tokenizer came with the run's template on it; a file that the recipe named may be gone.
        kept = recipe.replace({"data.chat_template": None}) if tokenizer.chat_template else recipe
        data = read_data(kept, tokenizer, find_architecture(adapter).max_positions, progress)
        data.refuse_errors()
    except DataError as error:
        raise DataError(f"The run's own rows cannot be read: {error.problem}", f"{error.fix}\n{_NAME_THE_ROWS}") from error
    if not data.validation:
        raise DataError(f"The run {adapter.name} held no rows out, so all that are there were trained on.", _NAME_THE_ROWS)
    num_answers = adapter.run.setting("train.sample_rows")
    if isinstance(num_answers, int):  # none were asked for where layers were streamed
        data = replace(data, samples=data.samples[:num_answers])
    known, notes = _known(adapter.run.resolved, "data", "fingerprint"), []
    if known is not None and known != data.fingerprint:
        notes.append("The rows are not what they were when the run was made: some of those measured may have been trained on.")
    if adapter.run.setting("memory.head_format") in ("int8", "nf4"):
        notes.append("The run kept its output head in fewer bits than here, so its report has other figures than these.")
    generation_tokens = adapter.run.setting("memory.generation_tokens")
    return Rows(
        replace(data, samples=data.samples[:num_rows]), data.validation[:num_rows], known in (None, data.fingerprint),
        generation_tokens if isinstance(generation_tokens, int) else 0, tuple(notes),
    )


def _rows_in(path: str, adapter: Adapter, tokenizer: PreTrainedTokenizerBase, num_rows: int | None, progress: Progress) -> Rows:
    """All rows of a file, or so many, drawn by a fixed seed."""
    from qlora.data import prepare

    with progress.stage(f"Reading {path}") as update:
        data = prepare(path, tokenizer, validation=0.0, max_rows=num_rows, num_samples=_NUM_ANSWERS,
                       context_limit=find_architecture(adapter).max_positions, progress=update)
    data.refuse_errors()
    return Rows(data, data.train, False, 0)


def _recipe_of(adapter: Adapter) -> Recipe | None:
    """The recipe of the run whose folder this is."""
    from qlora.recipe import Recipe

    if adapter.run is None or not adapter.run.is_run_folder:
        return None
    try:
        return Recipe.model_validate(adapter.run.resolved.get("recipe"))
    except ValueError as error:
        raise ModelError(f"{adapter.run.folder / 'resolved.json'} holds no recipe that this version can read.",
                         _NAME_THE_ROWS) from error


def _known(document: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document


# --- figures -----------------------------------------------------------------------------------------------------------


def _summed_loss(adapted: Adapted, rows: Sequence[TokenRow]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of ids and labels of shape (1, tokens) that gives the sum of the losses.

    The chunked one knows what most models do between their last states and their logits. A model that does something else is
    found out on one short row, and takes the memory of its logits.
    """
    import torch

    from qlora.engine.head import make_head
    from qlora.engine.loss import LanguageModelLoss

    model, device = adapted.model, adapted.model.device
    one = torch.ones((), device=device)

    def plainly(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")

    if type(model.get_output_embeddings()) is not torch.nn.Linear or not rows:  # an adapter sits on the head
        return plainly
    loss = LanguageModelLoss(model, make_head(model, "resident", device), _CHUNK_BYTES)

    def in_chunks(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(model, {"input_ids": ids, "labels": labels}, one)

    ids = torch.tensor([rows[0].input_ids[:_TRIED_TOKENS]], device=device)
    return in_chunks if torch.isclose(in_chunks(ids, ids), plainly(ids, ids), rtol=1e-2, atol=1e-2) else plainly


def _answers(adapted: Adapted, rows: Rows, tell: Callable[[str], None], update: Callable[[int, int], None]) -> list[str]:
    """As a run writes them, in smaller batches where memory runs out."""
    from qlora.generation import answer
    from qlora.training.stages import in_smaller_batches

    samples, tokenizer = rows.data.samples, adapted.tokenizer
    longest = max(len(tokenizer(sample.reference, add_special_tokens=False).input_ids) for sample in samples)

    def attempt(num_tokens: int) -> list[str]:
        with adapted.computing():
            return answer(
                adapted.model, tokenizer, [sample.prompt_ids for sample in samples], stop_ids=rows.data.stop_ids,
                max_new_tokens=min(longest + 8, _MAX_ANSWER_TOKENS), progress=update, tokens_per_batch=num_tokens,
            )

    return in_smaller_batches(attempt, rows.generation_tokens, tell)
