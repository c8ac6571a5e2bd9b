"""The licence of a base, as its own model card states it. Nothing is guessed: what is not stated is not known."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_LINK = re.compile(r"https?://[^\s<>\"'()\\]+|[A-Za-z0-9][\w./-]*", re.ASCII)
_MAX_NAME = 200
# What a model card has at its head; a longer file is not read further.
_MAX_CHARACTERS = 2**20


@dataclass(frozen=True)
class Licence:
    """A licence as the Hub writes it: `id` is one of the Hub's list, such as apache-2.0, or "other" with a name and a link.

    `link` is a URL, or a file in the repository that states it.
    """

    id: str
    name: str | None = None
    link: str | None = None


# The embedded base and what it is made from are part of this project.
BUILTIN = Licence("apache-2.0")


def licence_of_base(located: str, revision: str | None = None) -> Licence | None:
    """That of a model folder, or of a model of the Hub whose card is in the cache; None where it is not known.

    Nothing is downloaded.

    Args:
        located: a folder, or owner/name.
        revision: the commit that is used; None for the newest in the cache.
    """
    if Path(located).expanduser().is_dir():
        return licence_of_folder(Path(located).expanduser())
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        card = try_to_load_from_cache(located, "README.md", revision=revision)
    except HFValidationError:
        return None
    return licence_of_folder(Path(card).parent) if isinstance(card, str) else None


def licence_of_card(text: str) -> Licence | None:
    """What the front matter of a README.md says; None where it says nothing, or nothing that can be passed on."""
    match = _FRONT_MATTER.match(text[:_MAX_CHARACTERS].lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n"))
    if match is None:
        return None
    try:
        front = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # written by hand, by anybody
        return None
    if not isinstance(front, dict):
        return None
    found = front.get("license")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, str) or not _ID.fullmatch(found):
        return None
    link = front.get("license_link")
    return Licence(found, _line(front.get("license_name")), link if isinstance(link, str) and _LINK.fullmatch(link) else None)


def licence_of_folder(folder: Path) -> Licence | None:
    """What the README.md of a model folder says; None without one."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            return licence_of_card(file.read(_MAX_CHARACTERS))
    except OSError:  # no card, or none that may be read: not known
        return None


def _line(value: Any) -> str | None:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text if text and text.isprintable() and len(text) <= _MAX_NAME else None
