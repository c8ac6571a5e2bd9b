"""How much of the matrix is run in the short form, and how much in the long one."""

from __future__ import annotations

from typing import Any

import pytest


def in_long(*values: object) -> list[Any]:
    """Parameters of the long form alone."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


def few_and_many(few: int, many: int) -> list[Any]:
    """So many seeds, and so many in the long form."""
    return [*range(few), *in_long(*range(few, many))]
