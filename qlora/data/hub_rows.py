"""Read a data set of the Hub through `datasets`, which caches it on disk. No code of the data set is ever run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from qlora.data.files import RawRow, arrow_values
from qlora.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def is_hub_id(path: str) -> bool:
    """Whether `path` reads as name, owner/name or owner/name:configuration."""
    return _HUB_ID.fullmatch(path) is not None


def read_hub(path: str, split: str) -> Iterator[RawRow]:
    """Every row of one split, in order. The file of a row is `owner/name[split]`, its line the 1-based row.

    Raises:
        DataError: not found, not reachable, no such split or configuration, or a data set that needs its own code.
    """
    import datasets

    name, _, configuration = path.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    # What `datasets` raises for an unknown id, split or configuration, a private data set, no network, broken files.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _explained(path, split, error) from None
    return _hub_rows(rows, f"{path}[{split}]")


def _hub_rows(rows: Any, file: str) -> Iterator[RawRow]:
    for number, values in enumerate(rows, start=1):
        yield RawRow(arrow_values(values), file, number)


def hub_digest(values: dict[str, Any], digest: Any) -> int:
    """Feed one row to `digest`, in the place of the bytes of a file; returns how many bytes that were."""
    data = json.dumps(values, ensure_ascii=True, sort_keys=True, default=repr).encode()
    digest.update(data)
    return len(data)


def _explained(path: str, split: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    local = "or download its files and give their folder as data.path"
    if "Unknown split" in reason:
        return DataError(
            f'The Hub data set "{path}" has no split "{split}": {reason}', "Set data.split to one of these."
        )
    if "Config name is missing" in reason or "BuilderConfig" in reason:
        names = ", ".join(re.findall(r"'([\w.-]+)'", str(error))[:12])
        return DataError(
            f'The Hub data set "{path}" comes in several configurations: {names or reason}',
            f"Name one after a colon, for example data.path: {path.partition(':')[0]}:NAME.",
        )
    if "loading script" in str(error) or "scripts are no longer supported" in str(error):
        return DataError(
            f'The Hub data set "{path}" needs Python code of its own to be read, which is never run here.',
            "Use a copy of it that is stored as Parquet or JSON, " + local + ".",
        )
    if isinstance(error, ConnectionError):
        return DataError(
            f'"{path}" is no local file or folder, and the Hub cannot be reached to look for it there: {reason}.',
            f"If it is meant as a file, check the path. If it is on the Hub, connect, unset HF_HUB_OFFLINE, {local}.",
        )
    return DataError(
        f'"{path}" is no local file or folder, and cannot be read from the Hub: {reason}',
        f"Check the path or id; log in with `hf auth login` if it is private; {local}.",
    )
