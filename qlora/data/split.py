"""Hold rows out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from qlora.data.rows import Row

AUTO_SHARE = 0.05
AUTO_MIN_ROWS, AUTO_MAX_ROWS = 8, 256
MIN_DISTINCT_ROWS = 20  # under this, eight held-out rows would be most of the data


def num_held_out(num_rows: int, num_distinct: int, validation: float | Literal["auto"]) -> int:
    """How many rows are to be held out."""
    if validation != "auto":
        return round(validation * num_rows)
    if num_distinct < MIN_DISTINCT_ROWS:
        return 0
    return min(AUTO_MAX_ROWS, max(AUTO_MIN_ROWS, round(AUTO_SHARE * num_rows)))


def split_rows(rows: Sequence[Row], validation: float | Literal["auto"], seed: int) -> tuple[list[Row], list[Row]]:
    """Train and validation rows, disjoint, both in their old order.

    A row's place is drawn from a hash of the seed and of what the row says. So the order of the rows does not matter,
    equal rows land on the same side, and adding rows moves few others. The validation side has the number of rows that
    was asked for wherever rows that come in several copies allow it, and never takes the last row from training.
    """
    copies: dict[bytes, int] = {}
    for row in rows:
        copies[row.key] = copies.get(row.key, 0) + 1
    wanted = num_held_out(len(rows), len(copies), validation)
    salt = str(seed).encode()
    held_out: set[bytes] = set()
    for key in sorted(copies, key=lambda key: hashlib.sha256(salt + key).digest()):
        if copies[key] <= wanted and len(held_out) < len(copies) - 1:
            held_out.add(key)
            wanted -= copies[key]
        if wanted == 0:
            break
    return [row for row in rows if row.key not in held_out], [row for row in rows if row.key in held_out]
