"""Turn rows into token ids and labels: what is trained, and what is only read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.data.chat_template import adds_bos
from qlora.data.conversation import ChatWriter, Rendered
from qlora.data.rows import BadRow, Row, Unusable, bad_rows_error

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
_BATCH_ROWS = 512

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenRow:
    """One row as tokens. `labels` has the length of `input_ids`: the id itself where it is trained, else -100."""

    input_ids: list[int]
    labels: list[int]
    row: Row

    @property
    def num_trained(self) -> int:
        """Tokens that the loss counts. The first one has nothing before it to be predicted from."""
        return len(self.labels) - self.labels.count(IGNORED) - (self.labels[:1] not in ([], [IGNORED]))


@dataclass(frozen=True)
class GenerationSample:
    """A prompt to answer, as text and tokens, with the answer that the data gives."""

    prompt_ids: list[int]
    prompt: str
    reference: str
    row: Row


def tokenise(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    train_on: str = "answers",
    on_bad_row: str = "error",
    rejected: list[BadRow] | None = None,
    writer: ChatWriter | None = None,
    progress: Progress | None = None,
) -> list[TokenRow]:
    """Token ids and labels of every row, not cut yet.

    Trained are the assistant's turns with their end-of-turn marker, the completion with the eos token, or the whole of
    a text with the eos token; with `train_on="all"` every token. A BOS token is never trained, stands at most once at
    the begin, and is put there where the tokenizer does so for any text.

    Args:
        tokenizer: a fast tokenizer with a chat template (see `set_chat_template`) and special tokens.
        on_bad_row: "skip" leaves rows out that the chat template rejects, and appends them to `rejected`.
        writer: the conversation writer to use, if there is one already.
        progress: called with (rows done, rows in all).

    Raises:
        DataError: rows that the chat template rejects, or whose answers cannot be located, all with file and line.
    """
    if writer is None and any(row.messages is not None for row in rows):
        writer = ChatWriter(tokenizer, rows)
    written: list[tuple[Row, Rendered]] = []
    bad_rows: list[BadRow] = []
    for row in rows:
        try:
            written.append((row, _written(row, writer)))
        except Unusable as unusable:
            bad_rows.append(BadRow(row.file, row.line, str(unusable)))
    if bad_rows and (on_bad_row == "error" or not written):
        raise bad_rows_error(
            bad_rows,
            f"The chat template cannot write {len(bad_rows):,} of {len(rows):,} rows:",
            "Change these rows, or set data.chat_template (chatml, plain or a .jinja file) to one that takes them"
            + (", or leave them out with data.on_bad_row: skip." if written else "."),
        )
    if rejected is not None:
        rejected += bad_rows
    with_bos = adds_bos(tokenizer)
    token_rows: list[TokenRow] = []
    for first in range(0, len(written), _BATCH_ROWS):
        batch = written[first : first + _BATCH_ROWS]
        encoded = _encode(tokenizer, [rendered.text for _, rendered in batch])
        for (row, rendered), ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"]):
            spans = [(0, len(rendered.text))] if train_on == "all" else rendered.spans
            labels = _labels(ids, offsets, spans, rendered.text)
            token_rows.append(_finished(row, ids, labels, tokenizer, with_bos))
        if progress is not None:
            progress(min(first + _BATCH_ROWS, len(written)), len(written))
    return token_rows


def _written(row: Row, writer: ChatWriter | None) -> Rendered:
    if row.messages is not None:
        return writer.conversation(row)
    if row.text is not None:
        return Rendered(row.text, [(0, len(row.text))])
    return Rendered(row.prompt + row.completion, [(len(row.prompt), len(row.prompt) + len(row.completion))])


def _encode(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


def _labels(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], text: str) -> list[int]:
    """A token is trained if it starts in a span.

    Two corrections make this the same for all tokenizers. Byte-level ones report tokens of white space as empty, at
    their end: their start is where the token before ended. SentencePiece-like ones glue a space to the word after it:
    where a prompt ends with that space, the word would be lost to the prompt, although it is the answer's.
    """
    labels = [IGNORED] * len(ids)
    span = 0
    last_end = 0
    for index, (start, end) in enumerate(offsets):
        if start == end:
            start = min(start, last_end)
        last_end = end
        while span < len(spans) and spans[span][1] <= start:
            span += 1
        if span == len(spans):
            break
        begin = spans[span][0]
        if start >= begin or (end > begin and text[start:begin].isspace()):
            labels[index] = ids[index]
    return labels


def _finished(row: Row, ids: list[int], labels: list[int], tokenizer: Any, with_bos: bool) -> TokenRow:
    """Special tokens around the text: BOS once where the tokenizer wants it, eos after raw text."""
    if row.messages is None and ids[-1:] != [tokenizer.eos_token_id]:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    if with_bos and ids[:1] != [tokenizer.bos_token_id]:
        ids, labels = [tokenizer.bos_token_id, *ids], [IGNORED, *labels]
    elif tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]:
        labels = [IGNORED, *labels[1:]]
    return TokenRow(ids, labels, row)


def generation_samples(
    rows: Sequence[Row], tokenizer: Any, limit: int, *, writer: ChatWriter | None = None
) -> list[GenerationSample]:
    """Prompts for the last answer of the first `limit` rows that have one, written as a chat program would write them.

    Rows of plain text have no prompt and give no sample. The prompt's ids are the begin of the row's training ids,
    unless the tokenizer merges the end of the prompt with the begin of the answer.
    """
    rows = [row for row in rows if row.text is None]
    if writer is None and any(row.messages is not None for row in rows):
        writer = ChatWriter(tokenizer, rows)
    with_bos = adds_bos(tokenizer)
    samples: list[GenerationSample] = []
    for row in rows:
        if len(samples) >= limit:
            break
        prompt = row.prompt if row.messages is None else writer.prompt(row)
        if prompt is None:
            continue
        ids = _encode(tokenizer, [prompt])["input_ids"][0]
        if with_bos and ids[:1] != [tokenizer.bos_token_id]:
            ids = [tokenizer.bos_token_id, *ids]
        if not ids:  # an empty prompt, and no BOS token to begin with
            continue
        reference = row.completion if row.messages is None else writer.reference(row)
        samples.append(GenerationSample(ids, prompt, reference, row))
    return samples
