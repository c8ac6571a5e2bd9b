"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora.errors import BusyError, OutputError
from qlora.training.run_documents import write_json
from qlora.training.run_folder import LOCK, RUNNING


class RunLock:
    """Holds a run folder for this process while within it.

    The lock is the operating system's and ends with its holder, however that ends: a killed run leaves nothing to clean up.
    Beside it .running.json says who the holder is, for those who have to wait; it is removed at the end, so that one that
    is found by the next holder belongs to a run that was killed.

    Attributes:
        taken_over: "process 1234 on HOST, at work since 14:02" of a run that was killed in this folder; None if there was none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.taken_over: str | None = None
        self._lock = FileLock(folder / LOCK)

    def __enter__(self) -> RunLock:
        """Take the lock, at once or not at all.

        Raises:
            BusyError: names the process that holds it.
            OutputError: the folder cannot be written, or its file system knows no locks.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(
                f"{self.folder} is being worked on by {_holder(self.folder) or 'another process'}.",
                "Wait until it has ended, stop that process, or add --fresh to start anew beside it.",
            ) from None
        except (OSError, NotImplementedError) as error:  # the latter: filelock, of a file system without locks
            raise self._cannot_be_locked(error) from error
        try:
            self.taken_over = _holder(self.folder)
            started = datetime.now().astimezone().isoformat(timespec="seconds")
            write_json(self.folder / RUNNING, {"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            # A folder that went away under the run, or became read-only, is for those who write results into it to report.
            with contextlib.suppress(OSError):
                (self.folder / RUNNING).unlink(missing_ok=True)
        finally:
            self._lock.release()

    def _cannot_be_locked(self, error: Exception) -> OutputError:
        reason = getattr(error, "strerror", None) or error
        return OutputError(
            f"The run folder {self.folder} cannot be locked, so a second run could write into it: {reason}.",
            "Set output.dir to a folder that you may write to, on a local disk.",
        )


def _holder(folder: Path) -> str | None:
    """Whom .running.json names; None without such a file."""
    try:
        entry = json.loads((folder / RUNNING).read_text(encoding="utf-8"))
        return f"process {int(entry['pid'])} on {entry['host']}, at work since {_clock_time(entry)}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it informs and decides nothing
        return f"a process that left an unreadable {RUNNING}"


def _clock_time(entry: dict[str, Any]) -> str:
    """Hours and minutes here; with the date where that is not today."""
    started, now = datetime.fromisoformat(entry["started"]).astimezone(), datetime.now().astimezone()
    return f"{started:%H:%M}" if started.date() == now.date() else f"{started:%Y-%m-%d %H:%M}"
