"""Facts about models that are known without a network: the config of each, and how many parameters it has.

`configs/` holds one Hub-style config.json a model, `parameters.json` the counts, SOURCES.md where each number comes
from. A planner can so answer for gated models, and on a machine that has never been online.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from qlora.errors import ModelError


@dataclass(frozen=True)
class CatalogEntry:
    """One model of the catalog.

    Attributes:
        parameters: counted on the model that the config builds, tied weights once; the text part of a multimodal model.
        published: the number that its makers or the Hub give for the same part, or None where there is none.
        published_from: where that number was seen, in the words of SOURCES.md.
        linear_parameters: weights of `nn.Linear` modules outside the output head.
        tied_embeddings: the output head is the embedding's weight.
    """

    id: str
    parameters: int
    published: int | None
    published_from: str | None
    linear_parameters: int
    tied_embeddings: bool


def catalog_ids() -> tuple[str, ...]:
    """Hub ids of all models, as their makers write them."""
    return tuple(sorted(_entries(), key=str.lower))


def find_id(name: str) -> str | None:
    """The catalog's spelling of a Hub id, whatever its case; None when it is not there."""
    return _spellings().get(name.strip().lower())


def catalog_entry(name: str) -> CatalogEntry:
    """Counts of one model.

    Raises:
        ModelError: not in the catalog.
    """
    return _entries()[_known(name)]


def catalog_config(name: str) -> dict[str, Any]:
    """The config.json of one model, as a dict of its own that the caller may change.

    Raises:
        ModelError: not in the catalog.
    """
    file = resources.files(__name__) / "configs" / f"{_known(name).replace('/', '--')}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def published_parameters(name: str) -> int | None:
    """The published number of parameters, or None where none is published or the model is not in the catalog."""
    id = find_id(name)
    return None if id is None else _entries()[id].published


def nearest_ids(name: str, num_names: int = 3) -> list[str]:
    """Ids that look like `name`, best first; compared with and without the owner and "-Instruct", whatever the case."""
    wanted = name.strip().lower()
    scores = {}
    for lowered, id in _spellings().items():
        whole = difflib.SequenceMatcher(None, wanted, lowered).ratio()
        scores[id] = max(whole, difflib.SequenceMatcher(None, _bare(wanted), _bare(lowered)).ratio())
    close = sorted((id for id in scores if scores[id] >= 0.6), key=lambda id: (-scores[id], id))
    return close[:num_names]


def _bare(name: str) -> str:
    """Owner and tuning left out: what says which model it is."""
    return re.sub(r"-(instruct|chat|base|it)(?=-|$)", "", name.rpartition("/")[2])


def _known(name: str) -> str:
    id = find_id(name)
    if id is None:
        near = nearest_ids(name)
        hint = f"Did you mean {' or '.join(near)}?" if near else "`qlora models` lists what it holds."
        raise ModelError(f"{name!r} is not in the catalog of {len(_entries())} models.", hint)
    return id


@functools.cache
def _entries() -> dict[str, CatalogEntry]:
    text = (resources.files(__name__) / "parameters.json").read_text(encoding="utf-8")
    return {id: CatalogEntry(id=id, **facts) for id, facts in json.loads(text).items()}


@functools.cache
def _spellings() -> dict[str, str]:
    return {id.lower(): id for id in _entries()}
