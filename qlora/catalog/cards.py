"""Cards that need not be in this machine: memory, abilities and speeds of NVIDIA's consumer, workstation and server cards.

The numbers and where they come from are in cards.json.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

from qlora.errors import HardwareError


@dataclass(frozen=True)
class Card:
    """One model of graphics card.

    Attributes:
        name: the driver's name without "NVIDIA", and with "Laptop" for "Laptop GPU".
        memory_mib: the total that nvidia-smi shows, else the nominal size. CUDA sees a little less of it.
        capability: CUDA's (major, minor).
        bandwidth: of the card's own memory, in GB/s (1e9 bytes).
        tflops: TFLOP/s of dense products of 16-bit matrices accumulated in fp32, at the boost clock.
        pcie: generation and lanes of the link to the host.
        note: what was assumed where a text fits several sizes of a card.
    """

    name: str
    family: str
    memory_mib: int
    capability: tuple[int, int]
    bandwidth: float
    tflops: float
    pcie: tuple[int, int]
    laptop: bool = False
    note: str = ""

    @property
    def has_bf16(self) -> bool:
        """Arithmetic in bf16 rather than its emulation: from Ampere on."""
        return self.capability >= (8, 0)


@functools.cache
def cards() -> tuple[Card, ...]:
    """All cards by family, oldest first; of one card in several sizes, the one that was sold first comes first."""
    text = resources.files("qlora.catalog").joinpath("cards.json").read_text(encoding="utf-8")
    return tuple(
        Card(**{**entry, "capability": tuple(entry["capability"]), "pcie": tuple(entry["pcie"])})
        for entry in json.loads(text)["cards"]
    )


def find_card(text: str, memory_mib: float | None = None) -> Card:
    """The card that a person or a driver means: "4060", "rtx4060ti 16gb", "NVIDIA GeForce RTX 3060 Laptop GPU".

    Args:
        memory_mib: what is known of its memory; tells sizes of one card apart where the text does not.

    Raises:
        HardwareError: no such card, none in that size, or several that differ in more than their memory.
    """
    words, size_gb = _read(text)
    # One letter is a slip of the hand, even where a card has it in its name.
    found = _nearest(words) if len(text.strip()) > 1 else []
    if not found:
        raise HardwareError(f"{text.strip()!r} is not in the table of NVIDIA cards.", _near_names(text))
    if len({_read(card.name)[0] - _OPTIONAL for card in found}) > 1:
        names = _either([card.name for card in found])
        raise HardwareError(f"{text.strip()!r} may be {names}.", "Write one of these names.")
    if size_gb is not None:
        return _of_size(found, size_gb, text)
    if memory_mib is not None:
        return min(found, key=lambda card: abs(card.memory_mib - memory_mib))
    return replace(found[0], note=_note(found))


def slowest_of_size(size_bytes: int) -> Card | None:
    """The slowest card with bf16 and about so much memory, cards of notebooks only where there are no others; None where nobody
    sells one.
    """
    fitting = [card for card in cards() if card.has_bf16 and abs(card.memory_mib * 2**20 / size_bytes - 1) < 0.1]
    return min(fitting, key=lambda card: (card.laptop, card.tflops), default=None)


# --- details ----------------------------------------------------------------------------------------------------------

# Words that tell no card from another, words that may be left out or be too many, and other words for the same thing.
_NOISE = frozenset(
    "nvidia geforce gpu graphics card design with edition generation tesla workstation server hbm gddr".split()
)
_OPTIONAL = frozenset("rtx gtx blackwell pcie sxm nvl".split())
_SAME = {"mobile": "laptop", "notebook": "laptop", "max": "laptop", "q": "laptop", "m": "laptop", "s": "super"}
_SIZE = re.compile(r"\b(\d+)\s*g(?:i?b)?\b")


@functools.cache
def _read(text: str) -> tuple[frozenset[str], int | None]:
    """The words that matter, and the size in GB if one is named."""
    text = re.sub(r"\b(sxm|hbm|gddr)\d\w*", r"\1", re.sub(r"[^a-z0-9]+", " ", text.lower()))
    # "rtx4070tisuper" is four words, "a4000" one
    text = re.sub(r"(?<=\d)(?=[a-z])|(?<=[a-z]{2})(?=\d)|(?<=ti)(?=super)", " ", text)
    size = _SIZE.search(text)
    words = {_SAME.get(word, word) for word in _SIZE.sub(" ", text).split()}
    return frozenset(words - _NOISE), int(size[1]) if size else None


def _nearest(words: frozenset[str]) -> list[Card]:
    """The cards that have all the words, and of these the ones with the fewest words besides."""
    ranks: dict[tuple[int, int], list[Card]] = {}
    for card in cards():
        own = _read(card.name)[0]
        if words - _OPTIONAL and words - _OPTIONAL <= own:
            ranks.setdefault((len(own - words - _OPTIONAL), len(words - own)), []).append(card)
    return ranks[min(ranks)] if ranks else []


def _of_size(found: Sequence[Card], size_gb: int, text: str) -> Card:
    """A card that shows up to 7 % less than its size counts: error correction takes a sixteenth of some."""
    for card in found:
        if 0 <= 1 - card.memory_mib / (size_gb * 1024) <= 0.07:
            return card
    sizes = _either([f"{card.memory_mib / 1024:.3g} GB" for card in found])
    raise HardwareError(
        f"{text.strip()!r} names {size_gb} GB, but {_without_size(found[0])} has {sizes}.",
        "Leave the size out, or name a card that has it.",
    )


def _note(found: Sequence[Card]) -> str:
    first, others = found[0], [card for card in found[1:] if card.memory_mib != found[0].memory_mib]
    if not others:
        return ""
    return (
        f"{_without_size(first)} is sold in several sizes; {first.name} was taken. "
        f"For the other write {_either([card.name for card in others])}."
    )


def _without_size(card: Card) -> str:
    return re.sub(r" \d+GB$", "", card.name)


def _near_names(text: str) -> str:
    names = {" ".join(sorted(_read(card.name)[0])): card.name for card in reversed(cards())}
    near = difflib.get_close_matches(" ".join(sorted(_read(text)[0])), names, n=3, cutoff=0.6)
    hint = f"Near names: {', '.join(names[name] for name in near)}. " if near else ""
    return f"{hint}For any other card give its memory instead, for example --vram 8GB."


def _either(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return " or ".join(names if len(names) <= 4 else [*names[:4], "others"])
