"""The rules: bands, order, and what they say."""

import itertools

import pytest

from qlora import guidance
from qlora.errors import RecipeError
from qlora.units import GIB

EXAMPLES = (None, 50, 999, 1_000, 9_999, 10_000, 99_999, 100_000, 2_000_000)
PARAMETERS = (int(1e8), int(1.2e9), int(8e9), int(70e9))
TASKS = (None, *guidance.RANKS_BY_TASK)
CARDS = tuple(gib * GIB for gib in (2, 4, 6, 7.6, 8, 11.6, 12, 16, 23.5, 24, 48, 80))


def test_rank_stays_in_the_band_and_never_falls_with_memory():
    for num_examples, num_parameters, task in itertools.product(EXAMPLES, PARAMETERS, TASKS):
        ranks = [guidance.choose_rank(num_examples, num_parameters, card, task).value for card in CARDS]
        assert ranks == sorted(ranks), (num_examples, num_parameters, task)
        assert 16 <= ranks[0] and ranks[-1] <= 64
        assert guidance.choose_rank(num_examples, num_parameters, None, task).value >= ranks[-1]


@pytest.mark.parametrize(
    ("num_examples", "num_parameters", "gib", "task", "rank", "rule"),
    [
        (200_000, 8e9, 4, None, 16, "rank by memory"),
        (200_000, 8e9, 8, None, 16, "rank by memory"),
        (200_000, 8e9, 12, None, 32, "rank by memory"),
        (200_000, 8e9, 23.5, None, 64, "default band"),  # a 24 GB card shows 23.5
        (500, 8e9, 24, None, 16, "rank by examples"),
        (50_000, 8e9, 24, None, 32, "rank by examples"),
        (50_000, 5e8, 24, None, 16, "rank by model size"),
        (200_000, 3e9, 24, None, 32, "rank by model size"),
        (None, 8e9, None, "short", 16, "rank by task"),
        (None, 8e9, None, "reasoning", 32, "rank by task"),
        (None, 70e9, None, None, 64, "default band"),
    ],
)
def test_the_deciding_rule_is_named(num_examples, num_parameters, gib, task, rank, rule):
    choice = guidance.choose_rank(num_examples, int(num_parameters), gib and int(gib * GIB), task)
    assert (choice.value, choice.rule) == (rank, rule), choice
    assert choice.reason and "\n" not in choice.reason


def test_small_data_offers_the_smaller_rank():
    assert guidance.choose_rank(999, int(8e9), 24 * GIB).value == 16
    assert guidance.offer_smaller_rank(999, 16).value == 8
    assert guidance.offer_smaller_rank(1_000, 16) is None
    assert guidance.offer_smaller_rank(None, 16) is None
    assert guidance.offer_smaller_rank(999, 8) is None


def test_ranks_under_the_band_come_only_as_a_last_resort():
    assert [choice and choice.value for choice in map(guidance.last_resort_rank, (64, 16, 8, 4))] == [8, 8, 4, None]
    assert "under 16" in guidance.last_resort_rank(16).reason


def test_alpha_policies():
    alphas = {policy: guidance.choose_alpha(policy, 16).value for policy in ("auto", *guidance.ALPHA_POLICIES, 24)}
    assert alphas == {"auto": 16, "conservative": 16, "standard": 32, "aggressive": 64, 24: 24}
    with pytest.raises(RecipeError, match="conservative"):
        guidance.choose_alpha("bold", 16)


@pytest.mark.parametrize("r", [4, 16, 24, 64])
@pytest.mark.parametrize("policy", ["conservative", "standard", "aggressive", 7])
def test_the_chosen_learning_rate_is_in_the_band(r, policy):
    alpha = guidance.choose_alpha(policy, r).value
    rate = guidance.choose_learning_rate(r, alpha).value
    assert guidance.effective_learning_rate(rate, r, alpha) == pytest.approx(2e-4, rel=1e-5)
    assert guidance.check_learning_rate(rate, r, alpha) is None


def test_rates_out_of_the_band_are_named_with_the_nearest_end():
    assert guidance.choose_learning_rate(16, 16).value == 2e-4
    assert guidance.check_learning_rate(5e-4, 16, 16) is None
    assert guidance.check_learning_rate(1e-3, 16, 32).value == 2.5e-4
    assert guidance.check_learning_rate(1e-5, 16, 16).value == 2e-4
