"""The rows that models are measured on, as tokens of each adapter that writes them in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora.errors import DataError, ModelError
from qlora.generation import longest_answer
from qlora.hub.adapter import Adapter
from qlora.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora.data import PreparedData, TokenRow
    from qlora.data.tokenise import GenerationSample
    from qlora.recipe import Recipe

# So many rows are answered where no run says how many, as in training (train.sample_rows), so that figures can be compared.
_NUM_ANSWERS = 64
_NAME_THE_ROWS = "Name rows to measure on: --data FILE"


@dataclass(frozen=True)
class Rows:
    """What is measured on, as tokens.

    Attributes:
        held_out: they are those that the first adapter's own run held out, so it was not trained on them.
        samples: prompts that are answered.
        answer_tokens: of an answer at most: as the longest reference, and a little more.
        bytes: of each row's trained text, in UTF-8; see `trained_bytes`.
        notes: what should be known about the figures, one line each.
    """

    data: PreparedData
    rows: Sequence[TokenRow]
    samples: Sequence[GenerationSample]
    held_out: bool
    answer_tokens: int
    bytes: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def places(self) -> list[str]:
        """File and line of each row."""
        return [row.row.place for row in self.rows]

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.input_ids) for row in self.rows)

    @property
    def prompt_tokens(self) -> int:
        """Of the longest prompt; 0 where none is answered."""
        return max((len(sample.prompt_ids) for sample in self.samples), default=0)


def read_rows(
    adapter: Adapter, tokenizer: PreTrainedTokenizerBase, max_positions: int | None, progress: Progress, *,
    path: str | None = None, num_rows: int | None = None, num_answers: int | None = None,
) -> Rows:
    """The rows of a file, or without one those that the adapter's run held out, read and split as it did.

    Args:
        tokenizer: by which they are written; given a chat template and special tokens if it has none.
        max_positions: tokens that the model takes at most; longer rows are cut.
        num_rows: at most so many; of a file, drawn by a fixed seed.
        num_answers: that are to be written; None is as many as in training.

    Raises:
        DataError: no rows, or none that can be used.
    """
    if path is None:
        return _of_run(adapter, tokenizer, max_positions, progress, num_rows, num_answers)
    return _in_file(path, tokenizer, max_positions, progress, num_rows, num_answers)


def common(groups: Sequence[Rows]) -> list[Rows]:
    """Of the same rows, written in different ways, those that all ways have kept; a long row may be lost to one of them."""
    def places_of(items: Sequence[Any]) -> list[str]:
        return [item.row.place for item in items]

    if all(group.places == groups[0].places and places_of(group.samples) == places_of(groups[0].samples) for group in groups):
        return list(groups)
    shared = set.intersection(*(set(group.places) for group in groups))
    answered = set.intersection(*(set(places_of(group.samples)) for group in groups))
    kept = []
    for group in groups:
        chosen = [i for i, place in enumerate(group.places) if place in shared]
        kept.append(replace(
            group, rows=[group.rows[i] for i in chosen], bytes=tuple(group.bytes[i] for i in chosen),
            samples=[sample for sample in group.samples if sample.row.place in answered],
        ))
    if not kept[0].rows:
        raise DataError("No row is left that can be written for all of these adapters.",
                        "Compare them two at a time, on shorter rows.")
    return kept


def trained_bytes(row: TokenRow, decode: Callable[[list[int]], str]) -> int:
    """Bytes, in UTF-8, of the text whose tokens the loss counts.

    Each run of trained tokens stands for what it adds to the text of all tokens before it, so that a space which a tokenizer
    drops at the begin of a text is counted once and in its place. The first token of a row has nothing before it and is not
    predicted, so it counts no bytes; special tokens, such as the one that ends a turn, are no text and count none either,
    although their loss is counted: to stop in time is a part of the answer.

    Args:
        decode: of token ids, without special tokens.
    """
    trained = [False, *(label != -100 for label in row.labels[1:])]
    total, shown = 0, 0
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[end - 1]:
            size = len(decode(row.input_ids[:end]).encode("utf-8", "surrogatepass"))
            total += (size - shown) * trained[end - 1]
            shown = size
    return total


# --- details -----------------------------------------------------------------------------------------------------------


def _of_run(
    adapter: Adapter, tokenizer: PreTrainedTokenizerBase, max_positions: int | None, progress: Progress, num_rows: int | None,
    num_answers: int | None,
) -> Rows:
    from qlora.training.setup import read_data

    recipe = _recipe_of(adapter)
    if recipe is None:
        raise DataError(f"{adapter.name} is no run folder, so it is not known which rows it has not seen.", _NAME_THE_ROWS)
    decided = adapter.run.setting("train.sample_rows")  # none were asked for where layers were streamed
    wanted = num_answers if num_answers is not None else decided if isinstance(decided, int) else recipe.train.sample_rows
    try:
        # The tokenizer came with the run's template on it; a file that the recipe named may be gone.
        changed = {"data.chat_template": None} if tokenizer.chat_template else {}
        data = read_data(recipe.replace({**changed, "train.sample_rows": wanted}), tokenizer, max_positions, progress)
        data.refuse_errors()
    except DataError as error:
        raise DataError(f"The run's own rows cannot be read: {error.problem}", f"{error.fix}\n{_NAME_THE_ROWS}") from error
    if not data.validation:
        raise DataError(f"The run {adapter.name} held no rows out, so all that are there were trained on.", _NAME_THE_ROWS)
    known, notes = fingerprint_of(adapter), []
    if known is not None and known != data.fingerprint:
        notes.append("The rows are not what they were when the run was made: some of those measured may have been trained on.")
    rows, samples = data.validation[:num_rows], data.samples[:wanted][:num_rows]
    return _made(data, rows, samples, known in (None, data.fingerprint), tokenizer, notes)


def _in_file(
    path: str, tokenizer: PreTrainedTokenizerBase, max_positions: int | None, progress: Progress, num_rows: int | None,
    num_answers: int | None,
) -> Rows:
    from qlora.data import prepare

    wanted = _NUM_ANSWERS if num_answers is None else num_answers
    with progress.stage(f"Reading {path}") as update:
        data = prepare(path, tokenizer, validation=0.0, max_rows=num_rows, num_samples=wanted, context_limit=max_positions,
                       progress=update)
    data.refuse_errors()
    notes = []
    if wanted and not data.samples:
        notes.append("The rows are plain text: there are no answers to write, so the loss is all there is.")
    if data.fit.num_truncated:
        notes.append(f"{data.fit.num_truncated:,} rows are longer than {data.max_length:,} tokens and were cut.")
    return _made(data, data.train, data.samples, False, tokenizer, notes)


def _made(
    data: PreparedData, rows: Sequence[TokenRow], samples: Sequence[GenerationSample], held_out: bool,
    tokenizer: PreTrainedTokenizerBase, notes: Sequence[str],
) -> Rows:
    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return Rows(data, rows, samples, held_out, longest_answer([sample.reference for sample in samples], tokenizer),
                tuple(trained_bytes(row, decode) for row in rows), tuple(notes))


def fingerprint_of(adapter: Adapter) -> str | None:
    """Of the rows that the adapter's run was trained on, as it wrote it down; None where that is not known."""
    return _known(adapter, "fingerprint")


def seen_before(adapter: Adapter, sha256: str) -> bool:
    """Whether the adapter's run was made with the file of this checksum."""
    return _known(adapter, "sha256") == sha256


def _known(adapter: Adapter, key: str) -> Any:
    data = adapter.run.resolved.get("data") if adapter.run else None
    return data.get(key) if isinstance(data, Mapping) else None


def _recipe_of(adapter: Adapter) -> Recipe | None:
    """The recipe of the run whose folder this is."""
    from qlora.training.evaluating import recipe_of

    if adapter.run is None or not adapter.run.is_run_folder:
        return None
    recipe = recipe_of(adapter)
    if recipe is None:
        raise ModelError(f"{adapter.run.folder / 'resolved.json'} holds no recipe that this version can read.", _NAME_THE_ROWS)
    return recipe
