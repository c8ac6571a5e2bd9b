"""Where a run lives: a folder of its own, new, or that of the same run which was cut short.

resolved.json is the first document written into a folder, and report.json the last: the one makes it a run of ours, the
other a finished run. Everything between is a run that can be gone on with.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora.errors import OutputError
from qlora.recipe import Recipe

LOCK, RUNNING, METRICS = ".lock", ".running.json", "metrics.jsonl"
RESOLVED, PLAN, PROGRESS, REPORT = "resolved.json", "plan.json", "progress.json", "report.json"
# All that a run killed before resolved.json was whole can have left.
_BEGINNINGS = {LOCK, RUNNING, METRICS, ".running.json.part", ".resolved.json.part"}


@dataclass(frozen=True)
class Found:
    """The place where a recipe's run belongs.

    Attributes:
        unfinished: a run of ours has begun there and has not finished: it is gone on with. Otherwise the folder is empty or
            not there yet.
    """

    path: Path
    unfinished: bool


def find_run(recipe: Recipe, *, fresh: bool = False) -> Found:
    """The folder of this recipe's run. Nothing is created or changed.

    A named output.dir is taken as it is. An automatic one is the newest of runs/<name>, runs/<name>-2, ... if that is
    unfinished, and otherwise the next number.

    Args:
        fresh: never go on; a folder that is not free gets the next number beside it.

    Raises:
        OutputError: the named folder holds a finished run or something else, or cannot be looked into.
    """
    try:
        if recipe.output.dir == "auto":
            return _find_numbered(Path("runs"), _folder_name(recipe.name), fresh)
        named = Path(recipe.output.dir).expanduser()
        return Found(_free_beside(named), unfinished=False) if fresh else _find_named(named)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{error.filename} cannot be looked into: {error.strerror}.",
                          "Set output.dir to a folder you may read and write.") from error


def _find_named(folder: Path) -> Found:
    state = _state(folder)
    if state == "finished":
        report = folder / "report.md"
        raise OutputError(f"output.dir {folder} is not empty: the run in it is finished, and its report is {report}.",
                          "Add --fresh to start anew beside it, or name a new folder.")
    if state == "foreign":
        what = "is not empty" if folder.is_dir() else "is not a folder"
        raise OutputError(f"output.dir {folder} {what}, and nothing there is overwritten.",
                          "Name a new folder, or leave output.dir out for a numbered one.")
    return Found(folder, unfinished=state == "unfinished")


def _find_numbered(parent: Path, name: str, fresh: bool) -> Found:
    pattern = re.compile(re.escape(name) + r"(?:-([2-9]|[1-9][0-9]+))?")
    entries = os.listdir(parent) if parent.is_dir() else []
    newest = max((int(match[1] or 1) for entry in entries if (match := pattern.fullmatch(entry))), default=1)
    folder = _numbered(parent / name, newest)
    state = _state(folder)
    if state == "free" or (state == "unfinished" and not fresh):
        return Found(folder, unfinished=state == "unfinished")
    return Found(_numbered(parent / name, newest + 1), unfinished=False)


def _free_beside(folder: Path) -> Path:
    """The first of folder, folder-2, folder-3, ... that is not there or empty."""
    if folder.name in ("", ".."):  # "." and ".." have no name that a number could be put to
        folder = Path(os.path.abspath(folder))
    number = 1
    while _state(candidate := _numbered(folder, number)) != "free":
        number += 1
    return candidate


def _numbered(folder: Path, number: int) -> Path:
    return folder if number == 1 else folder.with_name(f"{folder.name}-{number}")


def _folder_name(name: str) -> str:
    """A recipe's name as the name of one folder: no separators, nothing that leads out of runs/, nothing Windows refuses."""
    return re.sub(r'[\x00-\x1f<>:"/\\|?*]', "-", name).strip(". ") or "run"


def _state(folder: Path) -> Literal["free", "unfinished", "finished", "foreign"]:
    if not os.path.lexists(folder):
        return "free"
    if not folder.is_dir():
        return "foreign"
    names = set(os.listdir(folder))
    if not names:
        return "free"
    if names & {RESOLVED, PROGRESS}:  # with one of them alone, somebody has removed the other: `read_saved` says so
        return "finished" if REPORT in names else "unfinished"
    # Rows come after resolved.json: a metrics.jsonl with something in it and no resolved.json is somebody else's.
    empty = METRICS not in names or (folder / METRICS).stat().st_size == 0
    return "unfinished" if names <= _BEGINNINGS and empty else "foreign"


def open_folder(found: Found) -> Path:
    """Create the folder if it is not there, and find out whether it can be written.

    Raises:
        OutputError: it cannot.
    """
    try:
        found.path.mkdir(parents=True, exist_ok=True)
        with (found.path / METRICS).open("ab"):
            pass
    except OSError as error:
        raise OutputError(f"The run folder {found.path} cannot be written: {error.strerror or error}.",
                          "Set output.dir to a folder you may write to.") from error
    return found.path


def refuse_taken(folder: Path) -> None:
    """A folder that was free when it was looked for may have become another run's before this one locked it. To be called with
    the lock held.

    Raises:
        OutputError: there is something of another run in it.
    """
    names = set(os.listdir(folder))
    if not names <= _BEGINNINGS or (METRICS in names and (folder / METRICS).stat().st_size):
        raise OutputError(f"{folder} is not empty any more: another run took it while this one was being prepared.",
                          "Run the same command again, which looks at that run anew, or add --fresh to start beside it.")


def refuse_links(folder: Path) -> None:
    """A run makes no links. One in its folder may lead anywhere, and what is written or removed there would not be the run's.

    The folder itself may be reached by a link: whoever named it chose that. Call this before anything in it is read.

    Raises:
        OutputError: names the first few.
    """
    def fail(error: OSError) -> None:
        raise OutputError(f"{error.filename} cannot be looked into: {error.strerror}.", "Make it readable, or name another "
                          "output.dir.") from error

    links = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        links += [path for name in folders + files if os.path.islink(path := os.path.join(parent, name))]
    if links:
        more = f" and {len(links) - 3} more" if len(links) > 3 else ""
        raise OutputError(
            f"The run folder {folder} holds links, and a run does not follow them: {', '.join(sorted(links)[:3])}{more}.",
            f"Put what they point to in their place, or remove them. To leave them alone, add --fresh to start anew beside it.",
        )
