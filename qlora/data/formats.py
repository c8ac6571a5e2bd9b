"""Tell which format a data set is in, and which of its columns plays which part.

The decision is made once per data set, from the columns of its first rows, and comes with its reason. A mapping given
by the user (`data.columns`, field -> column) goes before every guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.errors import DataError

ROWS_LOOKED_AT = 100

_TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog")
# field of the format -> the column names that are taken for it without being told, in order of preference, lower case
FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {
        "messages": _TURNS,
        "prompt": ("prompt",),
        "completion": ("completion",),
        "tools": ("tools", "functions"),
    },
    "sharegpt": {"conversations": _TURNS, "tools": ("tools", "functions"), "system": ("system",)},
    "prompt_completion": {"prompt": ("prompt",), "completion": ("completion",)},
    "alpaca": {
        "instruction": ("instruction",),
        "input": ("input", "context"),
        "output": ("output", "response"),
        "instances": ("instances",),
        "system": ("system",),
        "history": ("history",),
    },
    "question_answer": {"question": (), "answer": (), "system": ("system", "system_prompt")},
    "text": {"text": ("text",)},
}
# Questions and answers go by many names, which only mean something in pairs: `input` alone says nothing.
_PAIRS = (
    ("question", "answer"),
    ("q", "a"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "response"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("input", "output"),
)
REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {  # one of these sets of fields must be there
    "messages": (("messages",), ("prompt", "completion")),
    "sharegpt": (("conversations",),),
    "prompt_completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"), ("instruction", "instances")),
    "question_answer": (("question", "answer"),),
    "text": (("text",),),
}


@dataclass(frozen=True)
class Layout:
    """A format, the column behind each of its fields, and why."""

    format: str
    columns: dict[str, str]
    reason: str


def choose_layout(
    first_rows: Sequence[Mapping[str, Any]], format: str, columns: Mapping[str, str], source: str
) -> Layout:
    """The layout of a data set from its first rows. `format` is a name or "auto"; `source` names the data in errors.

    Raises:
        DataError: nothing matches, a mapped column is missing, or data that holds nothing to train on.
    """
    first_rows = first_rows[:ROWS_LOOKED_AT]
    present = list(dict.fromkeys(str(column) for row in first_rows for column in row))
    _check_mapping(columns, present, format, source)
    candidates = [format] if format != "auto" else [name for name in FIELDS if set(columns) <= set(FIELDS[name])]
    for name in candidates:
        found = _find_columns(name, present, columns)
        if _has_required(name, found) and (format != "auto" or _looks_like(name, found, first_rows, bool(columns))):
            return Layout(name, found, _reason(name, found, present, format, columns))
    raise _refusal(first_rows, present, source) or _no_match(first_rows, present, format, columns, source)


def _find_columns(format: str, present: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """The column of every field that has one."""
    by_lower = {column.strip().lower(): column for column in reversed(present)}
    names = dict(FIELDS[format])
    if format == "question_answer":
        given = [field for field in ("question", "answer") if field in mapping]
        pairs = [pair for pair in _PAIRS if given or set(pair) <= set(by_lower)]
        questions, answers = zip(*(pairs if given else pairs[:1])) if pairs else ((), ())
        names |= {"question": questions, "answer": answers}
    found: dict[str, str] = {}
    for field, aliases in names.items():
        taken = {*found.values(), *mapping.values()}
        column = next((by_lower[name] for name in aliases if name in by_lower and by_lower[name] not in taken), None)
        column = mapping.get(field, column)
        if column is not None:
            found[field] = column
    if "messages" in found:
        found = {field: column for field, column in found.items() if field not in ("prompt", "completion")}
    return found


def _has_required(format: str, found: Mapping[str, str]) -> bool:
    return any(all(field in found for field in fields) for fields in REQUIRED[format])


def _looks_like(format: str, found: Mapping[str, str], rows: Sequence[Mapping[str, Any]], mapped: bool) -> bool:
    """Whether the values have the shape that the format's columns promise."""
    if format in ("text", "alpaca", "question_answer"):
        return True
    if format == "prompt_completion" or (format == "messages" and "messages" not in found):
        as_list = any(message_list(row.get(found["completion"])) is not None for row in rows)
        return as_list == (format == "messages")
    turns = [parse_list(row.get(found["messages" if format == "messages" else "conversations"])) for row in rows]
    first = next((items[0] for items in turns if items), None)
    if first is None:  # every list is empty; still this format, so that the rows get to say what is wrong
        return any(items is not None for items in turns)
    if not isinstance(first, dict):
        return False
    return mapped or ("from" in first) == (format == "sharegpt")


def parse_list(value: Any) -> list | None:
    """A list, also when it is written as JSON text (CSV and some Parquet files); else None."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def message_list(value: Any) -> list | None:
    """A list, or text that is a JSON list of messages. Any other text is text, even where it looks like a list."""
    if isinstance(value, list):
        return value
    items = parse_list(value) or []
    return items if items and all(isinstance(item, dict) and "role" in item for item in items) else None


def _reason(
    format: str, found: Mapping[str, str], present: Sequence[str], asked: str, mapping: Mapping[str, str]
) -> str:
    used = ", ".join(column if field == column else f"{column} (as {field})" for field, column in found.items())
    why = "data.format says so" if asked != "auto" else "data.columns says so" if mapping else "its columns say so"
    unused = [column for column in present if column not in found.values()]
    return f"{why}: {used}" + (f"; not used: {', '.join(unused[:8])}" if unused else "")


# --- complaints -------------------------------------------------------------------------------------------------------


def _check_mapping(columns: Mapping[str, str], present: Sequence[str], format: str, source: str) -> None:
    known = FIELDS[format] if format != "auto" else {field for fields in FIELDS.values() for field in fields}
    for field, column in columns.items():
        if field not in known:
            where = f"the format {format}" if format != "auto" else "any format"
            raise DataError(
                f'data.columns names "{field}", which is not a field of {where}.',
                f"Fields: {', '.join(known if format != 'auto' else sorted(known))}.",
            )
        if column not in present:
            raise DataError(
                f'data.columns takes {field} from the column "{column}", which {source} does not have.',
                f"Its columns: {', '.join(present) or 'none'}.",
            )
    if format == "auto" and not any(set(columns) <= set(fields) for fields in FIELDS.values()):
        raise DataError(
            f"data.columns mixes fields of different formats: {', '.join(columns)}.",
            "Fields by format: " + "; ".join(f"{name}: {', '.join(fields)}" for name, fields in FIELDS.items()),
        )


def _refusal(rows: Sequence[Mapping[str, Any]], present: Sequence[str], source: str) -> DataError | None:
    """Data that people try, and that holds nothing to learn from as it is."""
    columns = {column.lower() for column in present}
    first = {column.lower(): value for column, value in rows[0].items()} if rows else {}
    if isinstance(first.get("question"), list):
        return DataError(
            f"{source} holds questions without answers (BFCL, a function-calling benchmark): nothing to train on.",
            "The gold calls are in its possible_answer files, which name allowed values and not one answer. Write rows "
            "of messages with tool_calls, or train on a data set that has them, and keep this one for evaluation.",
        )
    if "ground_truth" in columns and isinstance(first.get("ground_truth"), list):
        return DataError(
            f"{source} holds answers without their questions (BFCL's possible_answer files): nothing to train on.",
            "Write rows of messages with tool_calls from the question file and this one, joined by id.",
        )
    if "turns" in columns and isinstance(first.get("turns"), list):
        return DataError(
            f"{source} holds the user's turns only (MT-bench): there are no answers, so there is nothing to train on.",
            "Keep it for evaluation, or add the assistant's answers as rows of messages.",
        )
    if {"chosen", "rejected"} <= columns:
        lists = isinstance(first.get("chosen"), list)
        example = "{messages: chosen}" if lists or "prompt" not in columns else "{prompt: prompt, completion: chosen}"
        return DataError(
            f"{source} holds pairs of a chosen and a rejected answer, which supervised fine-tuning has no use for.",
            f"To learn the chosen answers, set data.columns: {example}.",
        )
    return None


def _no_match(
    rows: Sequence[Mapping[str, Any]], present: Sequence[str], format: str, columns: Mapping[str, str], source: str
) -> DataError:
    texts = [column for column in present if any(isinstance(row.get(column), str) for row in rows)] or list(present)
    # Quoted as YAML needs it, so that the example can be copied.
    texts = [text if re.fullmatch(r"[^\W\d][\w ]*", text) else json.dumps(text, ensure_ascii=False) for text in texts]
    first, second = (*texts, "YOUR_COLUMN", "YOUR_OTHER_COLUMN")[:2]
    found = f"{source} has the columns {', '.join(present)}" if present else f"{source} has no columns"
    if format != "auto":
        needs = " or ".join(" and ".join(fields) for fields in REQUIRED[format])
        fields = REQUIRED[format][0]
        example = ", ".join(f"{field}: {column}" for field, column in zip(fields, (first, second)))
        return DataError(
            f"The format {format} needs {needs}, but {found}.",
            f"Say which column is which: data.columns: {{{example}}}. Or leave data.format out.",
        )
    return DataError(
        f"{found}, and no format fits.",
        f"Say which column is which: data.columns: {{question: {first}, answer: {second}}} for questions and answers, "
        f"{{prompt: {first}, completion: {second}}} for raw text with a prompt, or {{text: {first}}} to learn all of a "
        "text.",
    )
