"""Where runs are killed: a third at any time, a third within a checkpoint, a third in rotation and in first and last steps."""

from __future__ import annotations

import random
from collections.abc import Iterator

from faults.lab import NUM_STEPS, SAVE_EVERY, Lab
from faults.runner import Fault

_WRITING, _ROTATION = r"/checkpoints/(\.incoming-\d+|\S+ \S+/checkpoint-\d+$)", r"/checkpoints/\S*\.outgoing-"
_FIRST = r"/\.?(resolved|plan|progress|running)\.json|/\.lock"
LAST_STEPS = r"/(\.adapter\.part|adapter|plots)(/| |$)|/\.?report\."
_PATTERNS = {"in a checkpoint": _WRITING, "in rotation": _ROTATION, "in the first steps": _FIRST, "in the last steps": LAST_STEPS}
_NUM_CHECKPOINTS = NUM_STEPS // SAVE_EVERY

# What is done in one run after another, in this order; one of these a chain.
_ORDERS = (
    ("at a random time", "in a checkpoint", "in rotation"),
    ("in the first steps", "in a checkpoint", "at a random time"),
    ("in a checkpoint", "at a random time", "in the last steps"),
    ("in a checkpoint", "in rotation", "at a random time", "in the last steps"),
)


# What is killed in the long form, one after the other; in the short form, the first alone.
_WORDS = (
    (), ("train.keep=best",), ("model.dtype=bf16", "train.keep=best"),
    ("data.packing=true", "data.max_length=64", "train.epochs=8"),
)
_NUM_PLAIN = 10


def words(seed: int) -> tuple[str, ...]:
    """Words of the command."""
    return _WORDS[seed % len(_WORDS)] if seed >= _NUM_PLAIN else ()


def chain(seed: int, lab: Lab) -> Iterator[tuple[str, list[Fault], float | None]]:
    """For one session of a run after another: where it is killed, by which faults, or else after how many seconds."""
    chance = random.Random(seed)
    for kind in _ORDERS[seed * 7 // 4 % len(_ORDERS)]:
        if kind == "at a random time":
            yield kind, [], chance.uniform(0.1, 0.9) * lab.plain.seconds
        else:
            yield kind, [_fault(kind, chance, lab)], None


def _fault(kind: str, chance: random.Random, lab: Lab) -> Fault:
    pattern = _PATTERNS[kind]
    total = lab.plain.count(pattern)
    if kind == "in a checkpoint" and chance.random() < 0.3:  # in the middle of a file, not between two operations
        first = total // _NUM_CHECKPOINTS
        return "at_operation", {"pattern": pattern, "count": chance.randint(1, first), "action": "die_within_a_file",
                                "num_bytes": chance.randint(1_000, lab.plain.largest_file)}
    # Early enough that something is left for the kills that follow.
    share = {"in a checkpoint": 2 / _NUM_CHECKPOINTS, "in rotation": 1 / (_NUM_CHECKPOINTS - 2)}.get(kind, 1.0)
    return "at_operation", {"pattern": pattern, "count": chance.randint(1, max(1, int(total * share))), "action": "die"}
