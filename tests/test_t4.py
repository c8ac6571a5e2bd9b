"""The planner's simulator against what somebody measured on a Tesla T4: 40 rows, nothing fitted. See t4.py.

`scripts/score_planner.py` prints the same rows as a table.
"""

import statistics

import pytest
from faults.parameters import in_long
from t4 import read_rows, score

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module", params=["half of the rows", *in_long("all rows")])
def scores(shared, request):
    rows = read_rows(shared / "facts" / "t4-measurements.json")
    assert len(rows) == 40
    # They come in pairs, one in 4 bits and one in 16.
    return [score(row) for i, row in enumerate(rows) if request.param == "all rows" or i % 4 < 2]


def worst(scores, error, most):
    """The rows that are off by more than `most`, for the message of a failure."""
    return [f"{score.row}: {getattr(score, error):+.2%}" for score in scores if abs(getattr(score, error)) > most]


def test_peak_allocated(scores):
    assert not worst(scores, "allocated_error", 0.015)
    assert statistics.mean(abs(score.allocated_error) for score in scores) < 0.003


def test_peak_reserved(scores):
    assert not [row for row in worst(scores, "reserved_error", 0.10) if "-" in row.rpartition(":")[2]]
    assert statistics.mean(abs(score.reserved_error) for score in scores) < 0.05


def test_rows_in_16_bits_are_reserved_as_measured(scores):
    """Loaded on the CPU and then moved, they leave nothing to chance: the whole history of the allocator is reproduced."""
    sixteen = [score for score in scores if not score.row.four_bit]
    assert len(sixteen) == len(scores) // 2 and not worst(sixteen, "reserved_error", 0.005)
