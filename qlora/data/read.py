"""Read a whole data set: find the files, tell the format, normalise every row, and report every bad row at once."""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora.data.files import SUFFIXES, RawRow, find_files, read_file
from qlora.data.formats import FIELDS, Layout, choose_layout
from qlora.data.hub_rows import hub_digest, is_hub_id, read_hub
from qlora.data.normalise import normalise
from qlora.data.rows import BadRow, Row, RowSet, Unusable, bad_rows_error, count_duplicates
from qlora.errors import DataError


def read_rows(
    path: str,
    *,
    split: str = "train",
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    max_rows: int | None = None,
    seed: int = 42,
) -> RowSet:
    """Read a file, a folder of files or a Hub data set into normalised rows.

    Args:
        path: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a Hub id (owner/name, or
            owner/name:configuration).
        split: the split of a Hub data set; files have none.
        format: one of FIELDS, or "auto" to tell from the columns of the first rows.
        columns: field of the format -> column of the data.
        on_bad_row: "error" stops at bad rows, after all of them are known; "skip" leaves them out and counts them.
        max_rows: keep only so many rows, drawn with `seed`, in their order.

    Raises:
        DataError: no such data, no format that fits, bad rows, or no usable row at all.
    """
    if format not in ("auto", *FIELDS):
        raise DataError(f'There is no format "{format}".', f"Formats: auto, {', '.join(FIELDS)}.")
    source = _open(path, split)
    bad_rows: list[BadRow] = []
    raws: list[RawRow] = []
    for item in source.items:
        (raws if isinstance(item, RawRow) else bad_rows).append(item)
    rows: list[Row] = []
    layout = Layout(format, {}, "")
    if raws:
        layout = choose_layout([raw.values for raw in raws[:100]], format, columns or {}, path)
        for raw in raws:
            try:
                rows += normalise(raw, layout)
            except Unusable as unusable:
                bad_rows.append(BadRow(raw.file, raw.line, str(unusable)))
    order = {file: number for number, file in enumerate(source.files)}
    bad_rows.sort(key=lambda bad: (order.get(bad.file, 0), bad.line))
    if bad_rows and (on_bad_row == "error" or not rows):
        raise _bad_rows(bad_rows, len(rows), layout, path)
    if not rows:
        raise DataError(f"{path} holds no rows.", "Check data.path and data.split.")
    if max_rows is not None and max_rows < len(rows):
        rows = [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), max_rows))]
    return RowSet(
        rows,
        layout.format,
        source.files,
        source.digest.hexdigest(),
        source.size_bytes,
        bad_rows,
        count_duplicates(rows),
        layout.reason,
        source.notes,
    )


class _Source:
    """Where the raw rows come from, with a running digest and size that are complete once `items` is used up."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.notes: list[str] = []
        self.size_bytes = 0
        self.digest: Any = hashlib.sha256()
        self.items: Iterator[RawRow | BadRow] = iter(())


def _open(path: str, split: str) -> _Source:
    source = _Source()
    try:
        local = Path(path).expanduser()
        exists = path.strip() != "" and local.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, an unknown ~user, a NUL character
        raise DataError(
            f"data.path is no path that this system takes: {error}.", "Name a file, a folder or a Hub id."
        ) from None
    if exists and not (local.is_file() or local.is_dir()):
        raise DataError(f"{path} is neither a file nor a folder.", "Name a data file, or a folder of them.")
    if exists:
        files, source.notes = find_files(local)
        source.files = [str(file) for file in files]
        source.size_bytes = sum(file.stat().st_size for file in files)
        source.items = (item for file in files for item in read_file(file, source.digest))
    elif local.suffix.lower() in SUFFIXES or not is_hub_id(path):
        raise _no_such_file(path, local)
    else:
        source.files = [f"{path}[{split}]"]
        source.items = _hashed(read_hub(path, split), source)
    return source


def _hashed(rows: Iterator[RawRow], source: _Source) -> Iterator[RawRow]:
    for row in rows:
        source.size_bytes += hub_digest(row.values, source.digest)
        yield row


def _no_such_file(given: str, path: Path) -> DataError:
    if "://" in given:
        return DataError(
            f"{given} is a web address, which is not read.", "Download the file and name it, or name a Hub id."
        )
    siblings = [entry.name for entry in path.parent.iterdir() if entry.exists()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    folder = "" if path.parent.is_dir() else f" There is no folder {path.parent} either."
    hint = (
        f"Did you mean {path.parent / close[0]}?"
        if close
        else "Check data.path; it is relative to the recipe's folder."
    )
    return DataError(f"There is no data at {given!r}.{folder}", hint)


def _bad_rows(bad_rows: list[BadRow], num_good: int, layout: Layout, path: str) -> DataError:
    count = f"{len(bad_rows):,} {'rows' if len(bad_rows) > 1 else 'row'}"
    if not num_good:
        return bad_rows_error(
            bad_rows,
            f"{path} has no usable row; {count} cannot be used:",
            "Correct them."
            + (
                f" They were read as {layout.format} ({layout.reason}); if that is not what "
                "they are, set data.format or data.columns."
                if layout.reason
                else ""
            ),
        )
    as_format = f" as {layout.format}" if layout.reason else ""
    folders = " Files of different formats need folders of their own." if Path(path).is_dir() else ""
    return bad_rows_error(
        bad_rows,
        f"{count} of {len(bad_rows) + num_good:,} in {path} cannot be read{as_format}:",
        f"Correct them, or leave them out with data.on_bad_row: skip.{folders}",
    )
