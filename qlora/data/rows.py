"""The plain data that the rest of `qlora.data` hands around: one normalised row, one bad row, one data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from qlora.errors import DataError

BAD_ROWS_SHOWN = 10


@dataclass(frozen=True)
class Row:
    """One row to learn from. Exactly one of `messages`, `prompt` + `completion` and `text` is set.

    `messages` are {"role": "system|user|assistant|tool", "content": str} in order, assistant ones optionally with
    "tool_calls": [{"type": "function", "function": {"name": str, "arguments": dict}}], and with "weight": 0 where they
    are only read and not trained. `line` is 1-based: the line of a JSONL or CSV file, the row of a JSON array, Parquet
    file or Hub data set.
    """

    messages: tuple[dict, ...] | None
    prompt: str | None
    completion: str | None
    text: str | None
    tools: tuple[dict, ...] | None
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @cached_property
    def key(self) -> bytes:
        """Digest of what the row says, not of where it stands: equal rows have equal keys.

        Raises:
            UnicodeEncodeError: the row holds half of a surrogate pair, which no tokenizer can read.
        """
        content = [self.messages, self.prompt, self.completion, self.text, self.tools]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode("utf-8")).digest()

    @cached_property
    def num_characters(self) -> int:
        """Length of everything that is said in the row; the measure of length where there is no tokenizer."""
        if self.messages is None:
            return len(self.text or "") + len(self.prompt or "") + len(self.completion or "")
        calls = [call for message in self.messages for call in message.get("tool_calls", ())]
        return sum(len(message["content"]) for message in self.messages) + sum(
            len(json.dumps(call["function"], ensure_ascii=False)) for call in calls
        )


class Unusable(ValueError):
    """One row cannot be used; the text says why. Caught where the row's place is known, and turned into a BadRow."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class RowSet:
    """A data set as read: normalised rows in their order, and what there is to say about it.

    `format_reason` says why the rows were taken for `format`; `notes` are remarks for the user (files left out and the
    like); `sha256` and `size_bytes` are those of the files, in order, before `max_rows` drew from them.
    """

    rows: list[Row]
    format: str
    files: list[str]
    sha256: str
    size_bytes: int
    bad_rows: list[BadRow]
    num_duplicates: int
    format_reason: str = ""
    notes: list[str] = field(default_factory=list)


def bad_rows_error(bad_rows: Sequence[BadRow], problem: str, fix: str) -> DataError:
    """One error for many rows: the first ten by file and line, then how many more."""
    lines = [f"  {bad}" for bad in bad_rows[:BAD_ROWS_SHOWN]]
    if len(bad_rows) > BAD_ROWS_SHOWN:
        lines.append(f"  and {len(bad_rows) - BAD_ROWS_SHOWN:,} more")
    return DataError("\n".join([problem, *lines]), fix)


def count_duplicates(rows: Sequence[Row]) -> int:
    """Rows that say the same as an earlier one."""
    return len(rows) - len({row.key for row in rows})


@dataclass(frozen=True)
class Finding:
    """Something the user should know about the data.

    `level` is "error" (training on this is refused), "warning" or "note"; `code` is a fixed word for programs; `fix` is
    what to change, empty where there is nothing to.
    """

    level: str
    code: str
    text: str
    fix: str = ""
