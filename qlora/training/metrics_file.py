"""metrics.jsonl: what a run has measured, row by row, on disk as soon as it is known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qlora.errors import OutputError, ResumeError
from qlora.progress import Progress

_FRESH = "To start anew beside it, add --fresh."


class MetricsFile:
    """One line of JSON for each step and evaluation. A context manager: the file is open within it.

    A full disk does not end a run here: lines that cannot be written wait in memory and go out, whole and in order, with
    the next row.

    Args:
        keep_bytes: what `position` returned when the checkpoint was made that the run goes on from; rows behind it are
            those of steps that will be done again, and are cut off. None for a file that is only added to.

    Attributes:
        rows: every row kept or added, in order; none of those that were there before where `keep_bytes` is None.
    """

    def __init__(self, path: Path, progress: Progress, keep_bytes: int | None = None):
        self.path, self.progress, self.keep_bytes = path, progress, keep_bytes
        self.rows: list[dict[str, Any]] = []
        self._unwritten = bytearray()
        self._told = False

    def __enter__(self) -> MetricsFile:
        """Open the file, after reading and cutting it where a run goes on.

        Raises:
            ResumeError: rows that were there at the checkpoint are missing or damaged.
            OutputError: the file cannot be opened or cut.
        """
        if self.keep_bytes is not None:
            self.rows = self._read_kept(self.keep_bytes)
        try:
            # Unbuffered, so that what a failed write has left unwritten is known to the byte.
            self._file = self.path.open("ab", buffering=0)
            if self.keep_bytes is not None:
                self._file.truncate(self.keep_bytes)
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_be_written(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with self._file:
                self._write()
        except OSError as error:
            self.progress.note(f"The last rows of {self.path} could not be written: {error.strerror or error}.")

    def add(self, row: dict[str, Any]) -> None:
        """Keep, write and show one row. Never raises for a disk that is full."""
        self.rows.append(row)
        self._unwritten += json.dumps(row).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._told:
                self._told = True
                self.progress.note(
                    f"{self.path} cannot be written at the moment: {error.strerror or error}. "
                    f"Its lines are kept in memory and tried again with every row."
                )
        self.progress.row(row)

    def position(self) -> int:
        """Bytes of the file with every row in it and on the disk; for `keep_bytes` of a session that goes on from here.

        Raises:
            OutputError: a row cannot be written.
        """
        try:
            self._write()
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._cannot_be_written(error) from error

    def _write(self) -> None:
        """Everything that waits. A disk that fills up takes the first part of a line; the rest stays and follows later."""
        while self._unwritten:
            num_written = self._file.write(self._unwritten)
            del self._unwritten[:num_written]

    def _read_kept(self, keep_bytes: int) -> list[dict[str, Any]]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise ResumeError(f"{self.path} cannot be read: {error.strerror or error}.", _FRESH) from error
        if len(content) < keep_bytes:
            # Filling up with zeros, which is what truncate would do, or going on without: both lose rows in silence.
            raise ResumeError(
                f"{self.path} has {len(content):,} bytes, and had {keep_bytes:,} when the checkpoint was made: rows are missing.",
                _FRESH,
            )
        kept = content[:keep_bytes]
        if kept and not kept.endswith(b"\n"):
            raise ResumeError(f"{self.path} is damaged: no line ends at byte {keep_bytes:,}, where the checkpoint says.", _FRESH)
        rows = []
        for number, line in enumerate(kept.splitlines(), start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ResumeError(f"{self.path}:{number} is damaged: not a row of metrics.", _FRESH)
            rows.append(row)
        return rows

    def _cannot_be_written(self, error: OSError) -> OutputError:
        waiting = f" {len(self._unwritten):,} bytes wait in memory." if self._unwritten else ""
        return OutputError(
            f"{self.path} cannot be written: {error.strerror or error}.{waiting}",
            "Make room on that disk, or set output.dir to a folder you may write to.",
        )
