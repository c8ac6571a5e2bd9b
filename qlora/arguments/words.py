"""What a single word on the command line may be: numbers, sizes, durations."""

from __future__ import annotations

import argparse

from qlora.errors import RecipeError
from qlora.units import parse_size


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def whole(text: str) -> int:
    """A whole number from 0, as large as a seed may be."""
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**63 - 1}")
    return int(text)


def minutes(text: str) -> float:
    """Minutes above 0."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return minutes


def temperature(text: str) -> float:
    """From 0 to 10."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 10")
    return value


def size(text: str) -> int:
    """Bytes, of a size such as 5GB."""
    try:
        return parse_size(text)
    except RecipeError as error:
        raise argparse.ArgumentTypeError(f"{error.problem} {error.fix}") from None
