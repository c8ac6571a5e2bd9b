"""Remember what took long to work out. An entry is found again only if everything that it rests on is the same: the question,
this program's own source, and the versions of the libraries.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

_Document = TypeVar("_Document", bound=Any)
_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "tokenizers", "datasets")
_MAX_ENTRIES = 4000


def remembered(folder: Path, question: Mapping[str, Any], work_out: Callable[[], _Document]) -> _Document:
    """The answer on file, else the one of `work_out`, which is then filed. Both are plain JSON values.

    A cache that cannot be read or written is no cache; nothing fails for it.
    """
    answer = recall(folder, question)
    if answer is None:
        answer = work_out()
        keep(folder, question, answer)
    return answer


def recall(folder: Path, question: Mapping[str, Any]) -> Any:
    """The answer on file; None where there is none that can be read."""
    try:
        return json.loads((folder / f"{_digest(question)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(folder: Path, question: Mapping[str, Any], answer: Any) -> None:
    """File an answer, if that can be done."""
    path = folder / f"{_digest(question)}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(answer), encoding="utf-8")
        os.replace(aside, path)
        _forget_oldest(folder)
    except OSError:
        pass  # a full or read-only disk; the answer is worth as much


def _digest(question: Mapping[str, Any]) -> str:
    text = json.dumps({**question, "code": _code(), "versions": library_versions()}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@functools.cache
def _code() -> str:
    """This program's source and facts: a plan of yesterday's code is no plan of today's."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of what a plan rests on, read without importing it."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _forget_oldest(folder: Path) -> None:
    files = list(folder.glob("*.json"))
    if len(files) > _MAX_ENTRIES:
        for path in sorted(files, key=lambda path: path.stat().st_mtime)[: _MAX_ENTRIES // 4]:
            path.unlink(missing_ok=True)
