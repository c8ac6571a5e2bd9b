"""What a user should know about a data set before hours are spent on it: `prepare` has the facts, this the words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora.data.chat_template import CHATML_TOKENS, TemplateChoice, single_token
from qlora.data.conversation import ChatWriter
from qlora.data.lengths import FitResult
from qlora.data.rows import BadRow, Finding, Row, RowSet
from qlora.data.split import MIN_DISTINCT_ROWS
from qlora.data.tokenise import IGNORED, GenerationSample, TokenRow
from qlora.units import format_count

MANY_DUPLICATES_SHARE = 0.05


@dataclass(frozen=True)
class Measured:
    """What tokenising told: everything that the findings about tokens look at.

    `train` and `validation` are what is left after cutting; `fit` counts for both together.
    """

    train: Sequence[TokenRow]
    validation: Sequence[TokenRow]
    fit: FitResult
    max_length: int
    longest: int
    samples: Sequence[GenerationSample]


def findings(
    rowset: RowSet,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    *,
    bad_rows: Sequence[BadRow] = (),
    num_shared: int = 0,
    tokenizer: Any = None,
    template: TemplateChoice | None = None,
    writer: ChatWriter | None = None,
    measured: Measured | None = None,
) -> list[Finding]:
    """All findings, errors first, then warnings, then notes.

    Args:
        rowset: what was read for training (and, unless a file was given for it, validation).
        bad_rows: rows that were left out.
        num_shared: validation rows of a file of their own that also occur in the training rows.
        measured: None where there was no tokenizer.
    """
    found = [*_about_rows(rowset, train_rows, validation_rows, bad_rows, num_shared)]
    if measured is None:
        found.append(
            Finding(
                "note",
                "no_tokenizer",
                "Without a tokenizer nothing is known about tokens: lengths are in "
                "characters, and neither the template nor what is trained was looked at.",
            )
        )
    else:
        found += _about_template(tokenizer, template, writer)
        found += _about_labels(measured, tokenizer, writer)
        found += _about_cuts(measured)
        found += _about_prompts(measured)
        found += _about_control_tokens(train_rows, tokenizer, writer)
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def _about_rows(
    rowset: RowSet,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    bad_rows: Sequence[BadRow],
    num_shared: int,
) -> list[Finding]:
    found = [Finding("note", "format", f"Read as {rowset.format}: {rowset.format_reason}.")]
    found += [Finding("note", "files", note) for note in rowset.notes]
    if bad_rows:
        text = f"{_rows(len(bad_rows))} could not be used and {_were(len(bad_rows))} left out."
        found.append(Finding("note", "skipped_rows", f"{text} The first: {bad_rows[0]}."))
    if rowset.num_duplicates > MANY_DUPLICATES_SHARE * len(rowset.rows):
        found.append(
            Finding(
                "warning",
                "duplicates",
                f"{rowset.num_duplicates:,} of {len(rowset.rows):,} rows repeat an earlier one, and count "
                "more than the others.",
                "Remove the copies, unless that is meant.",
            )
        )
    if not validation_rows:
        num_distinct = len(rowset.rows) - rowset.num_duplicates
        few = f" Under {MIN_DISTINCT_ROWS} distinct rows are not split." if num_distinct < MIN_DISTINCT_ROWS else ""
        found.append(
            Finding(
                "note",
                "no_validation",
                f"No rows are held out ({_rows(len(train_rows))} in all), so the loss on "
                f"unseen data will not be known.{few}",
                "Set data.validation to a share or a file.",
            )
        )
    if num_shared:
        found.append(
            Finding(
                "warning",
                "validation_overlap",
                f"{num_shared:,} of {len(validation_rows):,} validation rows are also in the "
                "training data, so the validation loss will look better than it is.",
                "Take them out of one of the two.",
            )
        )
    return found


def _about_template(tokenizer: Any, template: TemplateChoice | None, writer: ChatWriter | None) -> list[Finding]:
    if template is None:
        return []
    found = [Finding("note", "template", f"Chat template {template.name}: {template.reason}.")]
    if writer is None:
        return found
    found += writer.style.findings
    if not writer.end_of_turn:
        found.append(
            Finding(
                "warning",
                "no_end_of_turn",
                "The chat template writes nothing after the last answer, so the model will not learn to stop.",
                "Set data.chat_template to one that ends answers, for example plain.",
            )
        )
    elif template.name == "chatml" and any(single_token(tokenizer, token) is None for token in CHATML_TOKENS):
        length = len(tokenizer(CHATML_TOKENS[0], add_special_tokens=False)["input_ids"])
        found.append(
            Finding(
                "warning",
                "template_without_tokens",
                f"{CHATML_TOKENS[0]} is no token of this tokenizer; it takes {length} tokens "
                "of ordinary text, and generation cannot stop at it.",
                "Set data.chat_template: plain.",
            )
        )
    elif tokenizer.eos_token and tokenizer.eos_token not in writer.end_of_turn:
        found.append(
            Finding(
                "note",
                "end_of_turn",
                f"Answers end with {writer.end_of_turn}, and the tokenizer's eos token is "
                f"{tokenizer.eos_token}: generation has to stop at both.",
            )
        )
    return found


def _about_labels(measured: Measured, tokenizer: Any, writer: ChatWriter | None) -> list[Finding]:
    num_trained = sum(row.num_trained for row in measured.train)
    if not num_trained:
        masked, lost = measured.fit.num_fully_masked, measured.fit.num_answer_lost
        why = f"{_rows(lost)} lost the whole answer to the cut at {measured.max_length:,} tokens, and " if lost else ""
        return [
            Finding(
                "error",
                "nothing_to_train",
                f"No token is left to train: {why}{_rows(masked)} had none from the start.",
                f"Set data.max_length above {measured.max_length:,} (the longest row has {measured.longest:,} tokens)."
                if lost
                else "Check data.format and the answers in the data.",
            )
        ]
    found: list[Finding] = []
    trained_ids = {label for row in measured.train for label in row.labels[1:] if label != IGNORED}
    ends = set(end_ids(tokenizer, writer))
    if not ends & trained_ids:
        pad_is_eos = tokenizer.pad_token_id == tokenizer.eos_token_id
        text = "No end-of-turn or eos token is trained, so the model will not learn to stop."
        if pad_is_eos:
            text = text[:-1] + "; padding is also eos, so nothing else could teach it."
        found.append(
            Finding(
                "warning",
                "pad_is_eos" if pad_is_eos else "end_never_trained",
                text,
                "Raise data.max_length if the rows are cut; otherwise choose a chat template that ends answers.",
            )
        )
    bos = tokenizer.bos_token_id
    doubled = sum(row.input_ids[:2] == [bos, bos] for row in measured.train) if bos is not None else 0
    if doubled:
        found.append(
            Finding(
                "warning",
                "double_bos",
                f"{_rows(doubled)} {'begin' if doubled > 1 else 'begins'} with {tokenizer.bos_token} twice.",
                f"Take {tokenizer.bos_token} out of the data or the template.",
            )
        )
    if measured.fit.num_fully_masked:
        found.append(
            Finding(
                "warning",
                "fully_masked",
                f"{_rows(measured.fit.num_fully_masked)} had no token to train and "
                f"{_were(measured.fit.num_fully_masked)} dropped.",
                "Check the answers in these rows.",
            )
        )
    return found


def _about_cuts(measured: Measured) -> list[Finding]:
    fit, found = measured.fit, []
    raise_it = f"Raise data.max_length (the longest row has {measured.longest:,} tokens), or shorten the rows."
    if fit.num_answer_lost:
        found.append(
            Finding(
                "warning",
                "answer_lost",
                f"{_rows(fit.num_answer_lost)} lost the whole answer to the cut at "
                f"{measured.max_length:,} tokens and {_were(fit.num_answer_lost)} dropped.",
                raise_it,
            )
        )
    num_left = len(fit.rows)
    if fit.num_truncated and fit.num_truncated == num_left:
        found.append(Finding("warning", "all_cut", f"Every row is cut at {measured.max_length:,} tokens.", raise_it))
    elif fit.num_truncated:
        found.append(
            Finding(
                "note",
                "cut",
                f"{fit.num_truncated:,} of {num_left:,} rows are cut at {measured.max_length:,} tokens.",
                raise_it,
            )
        )
    if fit.num_end_lost:
        found.append(
            Finding(
                "warning",
                "end_lost",
                f"{_rows(fit.num_end_lost)} {'are' if fit.num_end_lost > 1 else 'is'} cut in the "
                "middle of an answer, which loses its end-of-turn: they teach to go on, not to stop.",
                raise_it,
            )
        )
    return found


def _about_prompts(measured: Measured) -> list[Finding]:
    by_row = {id(row.row): row.input_ids for row in (*measured.train, *measured.validation)}
    differ = sum(
        sample.prompt_ids != by_row[id(sample.row)][: len(sample.prompt_ids)]
        for sample in measured.samples
        if len(sample.prompt_ids) < len(by_row.get(id(sample.row), ()))
    )
    if not differ:
        return []
    return [
        Finding(
            "warning",
            "prompt_boundary",
            "The tokens of a prompt are not the begin of the tokens trained on: the "
            "tokenizer merges the end of the prompt with the begin of the answer, or the template writes them apart.",
            "End prompts without a space, and begin completions with it.",
        )
    ]


def _about_control_tokens(rows: Sequence[Row], tokenizer: Any, writer: ChatWriter | None) -> list[Finding]:
    """Special tokens spelt out in what people said: they would end turns in the middle of one."""
    special = {*tokenizer.all_special_tokens, *([writer.end_of_turn] if writer and writer.end_of_turn else [])}
    with_special = [
        row for row in rows for message in row.messages or () if any(token in message["content"] for token in special)
    ]
    if not with_special:
        return []
    count = len({id(row) for row in with_special})
    return [
        Finding(
            "warning",
            "special_tokens_in_content",
            f"{_rows(count)} {'have' if count > 1 else 'has'} special tokens "
            f"written in the text (first: {with_special[0].place}), which act as if the template had written them.",
            "Take them out of the data.",
        )
    ]


def end_ids(tokenizer: Any, writer: ChatWriter | None) -> list[int]:
    """Ids that generation should stop at: the tokenizer's eos, and the first token of what ends an answer in this chat
    template, where that is a token made for it and no ordinary text."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made_for_it = set(tokenizer.get_added_vocab().values())
    for marker in (writer.end_of_turn, writer.end_between) if writer is not None else ():
        first = tokenizer(marker, add_special_tokens=False)["input_ids"][:1]
        ids += [token for token in first if token in made_for_it and token not in ids]
    return ids


def _rows(count: int) -> str:
    return f"{format_count(count) if count >= 1e6 else format(count, ',')} {'row' if count == 1 else 'rows'}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
