"""From a path to everything that training and `qlora check` need to know about the data, in one call."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.data.chat_template import TemplateChoice, set_chat_template, set_special_tokens
from qlora.data.conversation import ChatWriter
from qlora.data.findings import Measured, end_ids, findings
from qlora.data.lengths import FitResult, LengthStats, choose_max_length, fit_length, length_stats
from qlora.data.read import read_rows
from qlora.data.rows import BadRow, Finding, Row, RowSet
from qlora.data.split import split_rows
from qlora.data.tokenise import IGNORED, GenerationSample, Progress, TokenRow, generation_samples, tokenise
from qlora.errors import DataError


@dataclass(frozen=True)
class PreparedData:
    """Rows ready to train on, and all that there is to say about them.

    Attributes:
        train, validation: tokenised and cut; empty where there was no tokenizer.
        train_rows, validation_rows: the rows behind them, before any was dropped for its length.
        samples: prompts for generation, from the validation rows, or from the train rows where there are none.
        max_length: tokens that a row may have; 0 where there was no tokenizer.
        lengths: of all rows before cutting, in `length_unit` ("tokens" or "characters").
        rowset: what was read: format, files, sha256, bytes, duplicates.
        bad_rows: rows left out because they could not be read, or not be written by the chat template.
        fit: counts of cut and dropped rows, of train and validation together; its `rows` are those of both.
        template: None where no row is a conversation and none was asked for.
        stop_ids: token ids that generation should stop at.
        fingerprint: sha256 over the tokens and labels of `train`; equal data in equal order have equal ones.
    """

    train: list[TokenRow]
    validation: list[TokenRow]
    train_rows: list[Row]
    validation_rows: list[Row]
    samples: list[GenerationSample]
    max_length: int
    lengths: LengthStats
    length_unit: str
    rowset: RowSet
    bad_rows: list[BadRow]
    fit: FitResult
    findings: list[Finding]
    template: TemplateChoice | None
    stop_ids: list[int]
    fingerprint: str
    tokenizer: Any = field(repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of the train rows, trained or only read."""
        return sum(len(row.input_ids) for row in self.train)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens of the train rows that the loss counts."""
        return sum(row.num_trained for row in self.train)

    def pieces(self, index: int) -> list[tuple[str, bool]]:
        """The text of train row `index` in pieces, each with whether it is trained; joined they are the whole text."""
        row = self.train[index]
        trained = [label != IGNORED for label in row.labels]
        ends = [i + 1 for i in range(len(trained)) if i + 1 == len(trained) or trained[i + 1] != trained[i]]
        pieces, shown = [], ""
        for end in ends:  # whole prefixes are decoded, as a tokenizer may drop the space at the begin of a piece
            text = self.tokenizer.decode(row.input_ids[:end], clean_up_tokenization_spaces=False)
            pieces.append((text[len(shown) :], trained[end - 1]))
            shown = text
        return pieces

    def refuse_errors(self) -> None:
        """Raise the findings of level "error", if there are any.

        Raises:
            DataError: with the text and the fix of all of them.
        """
        errors = [finding for finding in self.findings if finding.level == "error"]
        if errors:
            raise DataError(
                "\n".join(error.text for error in errors), "\n".join(error.fix for error in errors if error.fix)
            )


def prepare(
    path: str,
    tokenizer: Any,
    *,
    split: str = "train",
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    validation: float | str = "auto",
    max_rows: int | None = None,
    max_length: int | str = "auto",
    chat_template: str | None = None,
    train_on: str = "answers",
    packing: bool = False,
    on_bad_row: str = "error",
    seed: int = 42,
    context_limit: int | None = None,
    num_samples: int = 3,
    progress: Progress | None = None,
) -> PreparedData:
    """Read, check, split, tokenise and cut a data set.

    The settings are those of the recipe's data section. A tokenizer without a chat template or pad token is given one
    (see `findings`). With `tokenizer=None` the rows are only read and checked, and lengths are in characters.

    Args:
        validation: "auto", a share, or the path of a file of its own, which is read with the same settings.
        context_limit: tokens that the model takes at most; None where that is not known.
        num_samples: prompts to make for generation.
        progress: called with (rows done, rows in all) while tokenising.

    Raises:
        DataError: data that cannot be read or tokenised. That nothing is left to train is a finding, not an exception,
            so that a check can print the rest; `refuse_errors` raises it.
    """
    is_file = isinstance(validation, str) and validation != "auto"
    reading = {"split": split, "format": format, "columns": columns, "on_bad_row": on_bad_row, "seed": seed}
    rowset = read_rows(path, max_rows=max_rows, **reading)
    bad_rows = list(rowset.bad_rows)
    if is_file:
        held_out = read_rows(validation, **reading)
        train_rows, validation_rows = rowset.rows, held_out.rows
        bad_rows += held_out.bad_rows
    else:
        train_rows, validation_rows = split_rows(rowset.rows, validation, seed)
    train_keys = {row.key for row in train_rows}
    num_shared = sum(row.key in train_keys for row in validation_rows)
    all_rows = [*train_rows, *validation_rows]
    if tokenizer is None:
        lengths = length_stats([row.num_characters for row in all_rows])
        found = findings(rowset, train_rows, validation_rows, bad_rows=bad_rows, num_shared=num_shared)
        return PreparedData(
            [],
            [],
            train_rows,
            validation_rows,
            [],
            0,
            lengths,
            "characters",
            rowset,
            bad_rows,
            FitResult([], 0, 0, 0),
            found,
            None,
            [],
            "",
            None,
        )

    special = set_special_tokens(tokenizer)
    template = writer = None
    has_chat = any(row.messages is not None for row in all_rows)
    if has_chat or chat_template is not None:
        template = set_chat_template(tokenizer, chat_template)
    if has_chat:
        writer = ChatWriter(tokenizer, all_rows)
    # Both sides at once, so that one error names the bad rows of both.
    token_rows = tokenise(
        all_rows,
        tokenizer,
        train_on=train_on,
        on_bad_row=on_bad_row,
        rejected=bad_rows,
        writer=writer,
        progress=progress,
    )
    lengths = [len(row.input_ids) for row in token_rows]
    limit = choose_max_length(lengths, max_length, context_limit)
    held_out_ids = {id(row) for row in validation_rows}
    train = fit_length([row for row in token_rows if id(row.row) not in held_out_ids], limit)
    held_out_fit = fit_length([row for row in token_rows if id(row.row) in held_out_ids], limit)
    samples = generation_samples(
        [row.row for row in held_out_fit.rows or train.rows], tokenizer, num_samples, writer=writer
    )
    measured = Measured(train.rows, held_out_fit.rows, train + held_out_fit, limit, max(lengths, default=0), samples)
    found = special + findings(
        rowset,
        train_rows,
        validation_rows,
        bad_rows=bad_rows,
        num_shared=num_shared,
        tokenizer=tokenizer,
        template=template,
        writer=writer,
        measured=measured,
    )
    found += _about_packing(train.rows, limit) if packing else []
    found.sort(key=lambda finding: ("error", "warning", "note").index(finding.level))
    return PreparedData(
        train.rows,
        held_out_fit.rows,
        train_rows,
        validation_rows,
        samples,
        limit,
        length_stats(lengths),
        "tokens",
        rowset,
        bad_rows,
        measured.fit,
        found,
        template,
        end_ids(tokenizer, writer),
        fingerprint(train.rows),
        tokenizer,
    )


def fingerprint(token_rows: Sequence[TokenRow]) -> str:
    """sha256 over the ids and labels of rows, their borders included."""
    digest = hashlib.sha256()
    for row in token_rows:
        digest.update(array("q", [len(row.input_ids), *row.input_ids, *row.labels]).tobytes())
    return digest.hexdigest()


def _about_packing(rows: Sequence[TokenRow], max_length: int) -> list[Finding]:
    if not rows:
        return []
    mean = sum(len(row.input_ids) for row in rows) / len(rows)
    if mean * 2 <= max_length:
        return [
            Finding(
                "note",
                "packing",
                f"Packing puts about {max_length / mean:.0f} rows of {mean:.0f} tokens into one "
                f"sequence of {max_length:,}.",
            )
        ]
    return [
        Finding(
            "warning",
            "packing",
            f"Packing gains little: rows have {mean:.0f} tokens on average, over half of the "
            f"{max_length:,} of a sequence.",
            "Set data.packing: false, or a higher data.max_length.",
        )
    ]
