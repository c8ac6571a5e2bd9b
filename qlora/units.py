"""Sizes, counts and durations: read what people type, print what people read.

Memory is counted in GiB = 2**30 bytes. "GB" is accepted where a person types the size of a card, and means the same
2**30 bytes, because that is what "an 8 GB card" has.
"""

import re

from qlora.errors import RecipeError

KIB, MIB, GIB = 2**10, 2**20, 2**30

_FACTORS = {"KB": KIB, "KIB": KIB, "MB": MIB, "MIB": MIB, "GB": GIB, "GIB": GIB, "TB": 2**40, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def parse_size(text: str) -> int:
    """Bytes from a size such as "8GB", "7.5GiB" or "500MB".

    Raises:
        RecipeError: no unit, an unknown unit, or a size that is not above zero.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None or match[2].upper() not in _FACTORS:
        hint = f'"{str(text).strip()}GB"' if re.fullmatch(r"\s*\d+(\.\d+)?\s*", str(text)) else '"8GB", "7.5GiB" or "500MB"'
        raise RecipeError(f'"{text}" is not a size with a unit.', f"Write {hint}.")
    size_bytes = int(float(match[1]) * _FACTORS[match[2].upper()])
    if size_bytes <= 0:
        raise RecipeError(f'"{text}" is not above zero, and nothing fits into it.', 'Write a size such as "8GB".')
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """'7.25 GiB', '512.0 MiB' or '830 KiB': three significant places, the largest unit that keeps a whole number."""
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:.2f} GiB"
    if size_bytes >= MIB:
        return f"{size_bytes / MIB:.1f} MiB"
    return f"{size_bytes / KIB:.0f} KiB"


def exact_size(size_bytes: int) -> str:
    """'128MiB': what `parse_size` makes the same number of, for settings; whole KiB, and in MiB where they are whole too."""
    return f"{size_bytes // KIB}KiB" if size_bytes % MIB else f"{size_bytes // MIB}MiB"


def format_count(count: float) -> str:
    """'8.03B', '811K', '384': for numbers of parameters or tokens."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if count >= limit:
            scaled = count / (1e3 if suffix == "K" else limit)
            return f"{scaled:.2f}{suffix}" if suffix != "K" else f"{scaled:.0f}K"
    return f"{count:,.0f}"


def format_seconds(seconds: float) -> str:
    """'42 s', '3 min 05 s' or '2 h 07 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices spread evenly over `count` things."""
    num = min(count, wanted)
    return [i * count // num for i in range(num)]
