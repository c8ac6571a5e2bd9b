"""The search: what fits is within the budget, more budget is never worse, and the order of what is given up is the stated one."""

import itertools
import random

import pytest

from qlora.planning.depth import depths_to_simulate, extend
from qlora.planning.search import Candidate, Options, largest_length, last_ranks, search

OPTIONS = Options(
    ranks=(16, 32, 64), micro_batches=(1, 2, 4, 8, 16), checkpointing=(True, False),
    optimizers=("paged_adamw_8bit", "adamw_8bit", "adamw"), max_length=512, last_ranks=(8, 4),
    spare_micro_batches=(32, 64),
)
STATE = {"paged_adamw_8bit": 0, "adamw_8bit": 2, "adamw": 4}


def need_of(weights, seed):
    """A monotone need, such as the simulator's, with made-up slopes."""
    draw = random.Random(seed)
    per_rank, per_row, kept = draw.uniform(0.1, 5), draw.uniform(1, 100), draw.uniform(1.5, 12)

    def need(candidate):
        rows = candidate.micro_batch * per_row * (1 if candidate.checkpointing else kept)
        return weights + candidate.r * per_rank * (2 + STATE[candidate.optimizer]) + rows

    return need


def quality(found):
    """Compared from the left: fits, a rank of 16, rows at once, rank, speed, state, spare rows."""
    return (True, *in_order(found.candidate)) if found.fits else (False,)


def in_order(c):
    return min(c.r, 16), min(c.micro_batch, 16), c.r, not c.checkpointing, STATE[c.optimizer], c.micro_batch


@pytest.mark.parametrize("seed", range(60))
def test_fits_means_within_and_more_is_never_worse(seed):
    need = need_of(100, seed)
    before = (False,)
    for budget in (90, 120, 150, 200, 260, 330, 500, 900, 2000, 6000, 20000, 90000):
        found = search(OPTIONS, lambda candidate: need(candidate) <= budget)
        assert not found.fits or need(found.candidate) <= budget
        assert quality(found) >= before
        before = quality(found)
    assert before == (True, 16, 16, 64, True, 4, 64)


@pytest.mark.parametrize("seed", range(30))
def test_nothing_better_was_left_out(seed):
    """Against all candidates, one by one."""
    need = need_of(100, seed)
    budget = random.Random(-seed).uniform(120, 3000)
    found = search(OPTIONS, lambda candidate: need(candidate) <= budget)
    every = [Candidate(r, rows, kept, state, 512) for r, rows, kept, state in itertools.product(
        (4, 8, *OPTIONS.ranks), (*OPTIONS.micro_batches, *OPTIONS.spare_micro_batches), OPTIONS.checkpointing, OPTIONS.optimizers)]
    fitting = [candidate for candidate in every if need(candidate) <= budget]
    assert found.fits == bool(fitting)
    if fitting:
        assert in_order(found.candidate) == max(map(in_order, fitting))


def test_a_small_rank_only_where_nothing_else_fits_and_it_is_said():
    found = search(OPTIONS, lambda candidate: candidate.r <= 8 and candidate.micro_batch == 1 and candidate.checkpointing)
    assert found.fits and found.candidate.r == 8
    assert "under 16" in found.reasons["r"]
    assert last_ranks(16) == (8, 4) and last_ranks(4) == ()


def test_what_is_fixed_stays():
    fixed = Options(ranks=(32,), micro_batches=(4,), checkpointing=(False,), optimizers=("adamw",), max_length=100)
    for fits in (True, False):
        found = search(fixed, lambda candidate: fits)
        assert found.candidate == Candidate(32, 4, False, "adamw", 100)
        assert found.fits is fits


def test_few_are_tried():
    found = search(OPTIONS, lambda candidate: True)
    assert found.num_tried <= 6


@pytest.mark.parametrize("kink", [0, 300, 4000])
@pytest.mark.parametrize("limit", [128, 190, 500, 1000, 4095, 4096, 99_999])
def test_longest_length(limit, kink):
    """On a line with a kink: within a step of the true crossing, never beyond it, in a few simulations."""
    asked = []

    def need(length):
        asked.append(length)
        return 1000 + 10 * length + 15 * max(0, length - kink)

    found = largest_length(need, need(limit), 128, 4096)
    assert found <= limit
    assert found > min(limit, 4096) - 64
    assert len(asked) <= 12


@pytest.mark.parametrize("layers, depths", [
    ("a" * 32, (2, 3)), ("aab" * 8, (3, 6)), ("ab" * 13, (2, 4)), ("aaaaab" * 5 + "aa", (8, 14)), ("a", None), ("aa", None),
    ("abcdefg", None), ("b" + "a" * 20, None),
])
def test_depths_follow_the_pattern_of_layers(layers, depths):
    assert depths_to_simulate(list(layers)) == depths
    if depths:
        period = depths[1] - depths[0]
        assert (len(layers) - depths[0]) % period == 0


def test_extension_is_exact_on_a_line():
    line = {depth: {"train": 1000 + 37 * depth, "eval": 5} for depth in (2, 3, 32)}
    assert extend(line[2], line[3], (2, 3), 32) == line[32]
    assert extend({"a": 1}, {"a": 1, "b": 4}, (2, 4), 8) == {"a": 1, "b": 12}
