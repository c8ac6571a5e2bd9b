"""Read JSONL, JSON, CSV and Parquet into raw rows that know their file and line.

Text files are parsed here, line by line, so that every complaint names a line. A row that cannot be parsed does not
stop the reading: it comes out as a BadRow, and the caller decides when all of them are known.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.data.rows import BadRow
from qlora.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
_BOM = b"\xef\xbb\xbf"
_FIELD_LIMIT_CHARACTERS = 2**31 - 1  # csv's own limit of 131,072 is shorter than many documents
_PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True)
class RawRow:
    """A row as the file has it: column name to value."""

    values: dict[str, Any]
    file: str
    line: int


def find_files(path: Path) -> tuple[list[Path], list[str]]:
    """The data files at `path` (a file or a folder), sorted, and a note on what was left out.

    Raises:
        DataError: a kind of file that is not read, or a folder without any.
    """
    kinds = ", ".join(SUFFIXES)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(
                f'{path} ends in "{path.suffix}", which is not a kind of data file that is read here.',
                f"Files that are read: {kinds}.",
            )
        return [path], []
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    others = [entry.name + ("/" if entry.is_dir() else "") for entry in entries if entry not in files]
    if not files:
        found = f"only {', '.join(others[:8])}" if others else "nothing"
        raise DataError(
            f"The folder {path} holds {found}; there is no data file in it.", f"Files that are read: {kinds}."
        )
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    return files, [f"Not read in {path}: {shown}."] if others else []


def read_file(path: Path, digest: Any = None) -> Iterator[RawRow | BadRow]:
    """Every row of one file, in order. `digest` (a hashlib object) is fed the file's bytes.

    Raises:
        DataError: the file cannot be opened, or cannot be told to be of its kind.
    """
    digest = hashlib.sha256() if digest is None else digest
    try:
        if path.suffix.lower() == ".parquet":
            return _read_parquet(path, digest)
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}.", "Check the path and its permissions."
        ) from None
    digest.update(data)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16 text; only UTF-8 is read.", "Save the file as UTF-8.")
    data = data.removeprefix(_BOM)
    if not data.strip():
        return iter([BadRow(str(path), 1, "the file is empty")])
    if path.suffix.lower() in (".csv", ".tsv"):
        return _read_csv(data, str(path))
    return _read_json(data, str(path))


# --- JSON and JSON lines ----------------------------------------------------------------------------------------------


def _read_json(data: bytes, file: str) -> Iterator[RawRow | BadRow]:
    """The content decides, not the suffix: an array, one object spread over lines, or one object per line."""
    if data.lstrip()[:1] == b"[":
        return _read_json_whole(data, file)
    first_line = data.lstrip().split(b"\n", 1)[0]
    if _parsed(first_line)[1] is not None and isinstance(_parsed(data)[0], dict):
        return _read_json_whole(data, file)
    return _read_json_lines(data, file)


def _parsed(data: bytes) -> tuple[Any, str | None]:
    """The JSON value, and what is wrong with it instead."""
    try:
        return json.loads(data.decode("utf-8")), None
    except UnicodeDecodeError as error:
        return None, f"not valid UTF-8 (byte {error.start + 1})"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error.msg} (column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists nested a thousand deep
        return None, f"not usable JSON: {error}"


def _read_json_lines(data: bytes, file: str) -> Iterator[RawRow | BadRow]:
    for line, text in enumerate(io.BytesIO(data), start=1):
        text = text.strip()
        if not text:
            continue
        value, problem = _parsed(text)
        yield _raw(value, file, line) if problem is None else BadRow(file, line, problem)


def _read_json_whole(data: bytes, file: str) -> Iterator[RawRow | BadRow]:
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield BadRow(file, data.count(b"\n", 0, error.start) + 1, "not valid UTF-8")
        return
    except json.JSONDecodeError as error:
        yield BadRow(file, error.lineno, f"not valid JSON: {error.msg} (column {error.colno})")
        return
    except (ValueError, RecursionError) as error:
        yield BadRow(file, 1, f"not usable JSON: {error}")
        return
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        # {"data": [...]} is a wrapped array, but a single pretty-printed conversation is a row.
        value = lists[0] if len(lists) == 1 and len(value) == 1 and not _is_conversation(lists[0]) else [value]
    if not value:
        yield BadRow(file, 1, "the file is empty (an empty list)")
    for number, item in enumerate(value, start=1):
        yield _raw(item, file, number)


def _is_conversation(items: list[dict]) -> bool:
    return "role" in items[0] or "from" in items[0]


def _raw(value: Any, file: str, line: int) -> RawRow | BadRow:
    if isinstance(value, dict):
        return RawRow(value, file, line)
    return BadRow(file, line, f"the row is {describe(value)}, not an object with named columns")


def describe(value: Any) -> str:
    """A JSON value in a person's words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"a number ({value})"
    kinds = {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


# --- CSV --------------------------------------------------------------------------------------------------------------


def _read_csv(data: bytes, file: str) -> Iterator[RawRow | BadRow]:
    """Rows of a CSV file with a header; a cell may hold quoted line breaks, and the row's line is its first one."""
    # Bytes that are not UTF-8 become lone surrogates here, and are told apart per row below.
    lines = io.StringIO(data.decode("utf-8", errors="surrogateescape"), newline="")
    header_line = lines.readline()
    while header_line and not header_line.strip():
        header_line = lines.readline()
    delimiter = max(_DELIMITERS, key=lambda mark: len(next(csv.reader([header_line], delimiter=mark))))
    lines.seek(0)
    limit = csv.field_size_limit(_FIELD_LIMIT_CHARACTERS)
    try:
        yield from _csv_rows(csv.reader(lines, delimiter=delimiter, strict=True), delimiter, file)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(reader: Any, delimiter: str, file: str) -> Iterator[RawRow | BadRow]:
    header: list[str] = []
    found_any = False
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            found_any = True
            if "unexpected end" in str(error):
                yield BadRow(file, line, "a quote is opened in this row and never closed")
            else:
                yield BadRow(file, line, f"not valid CSV: {error}")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = _checked_header(cells, line, file)
            continue
        found_any = True
        if _has_undecoded_bytes(cells):
            yield BadRow(file, line, "not valid UTF-8")
        elif len(cells) != len(header):
            yield BadRow(
                file,
                line,
                f"{len(cells)} cells, but the header has {len(header)} (separated by {_DELIMITERS[delimiter]})",
            )
        else:
            yield RawRow(dict(zip(header, cells)), file, line)
    if not found_any:
        yield BadRow(file, 1, "the file is empty (a header and no rows)")


def _checked_header(cells: list[str], line: int, file: str) -> list[str]:
    if _has_undecoded_bytes(cells):
        raise DataError(f"{file}:{line}: the header is not valid UTF-8.", "Save the file as UTF-8.")
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f'{file}:{line}: the header names the column "{twice[0]}" twice.', "Give every column its own name."
        )
    return names


def _has_undecoded_bytes(cells: list[str]) -> bool:
    return any("\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell)


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, digest: Any) -> Iterator[RawRow | BadRow]:
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return _parquet_rows(path)


def _parquet_rows(path: Path) -> Iterator[RawRow | BadRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(arrow_values(values), str(path), number)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield BadRow(str(path), number + 1, f"not a readable Parquet file: {str(error).splitlines()[0]}")
        return
    if number == 0:
        yield BadRow(str(path), 1, "the file is empty")


def arrow_values(values: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the null fields of its nested objects. Arrow gives every struct the fields of all
    of them, null where absent, so that a tool call would otherwise show the arguments of every other call."""
    return {column: _without_nulls(value) for column, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
