"""The validation split, and cutting rows to a length."""

import random

import pytest

from qlora.data import Row, TokenRow, fit_length, length_stats, split_rows
from qlora.data.lengths import choose_max_length
from qlora.errors import DataError


def text_rows(texts):
    return [Row(None, None, None, text, None, "f", line) for line, text in enumerate(texts, start=1)]


def texts(rows):
    return {row.text for row in rows}


@pytest.mark.parametrize(
    "num, validation, expected",
    [
        (19, "auto", 0),
        (20, "auto", 8),
        (400, "auto", 20),
        (9000, "auto", 256),
        (100, 0.13, 13),
        (7, 0.5, round(3.5)),
        (100, 0.0, 0),
        (3, 0.99, 2),
    ],
)
def test_the_number_of_held_out_rows_is_exact(num, validation, expected):
    train, held_out = split_rows(text_rows(map(str, range(num))), validation, 42)
    assert (len(held_out), len(train)) == (expected, num - expected)


def test_the_split_is_disjoint_and_does_not_depend_on_the_order():
    rows = text_rows(str(i % 300) for i in range(400))  # a hundred rows come twice
    train, held_out = split_rows(rows, 0.2, 42)
    assert not texts(train) & texts(held_out) and len(train) + len(held_out) == 400 and len(held_out) == 80
    assert [row.line for row in train] == sorted(row.line for row in train)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert texts(split_rows(shuffled, 0.2, 42)[1]) == texts(held_out)
    assert texts(split_rows(rows, 0.2, 43)[1]) != texts(held_out)
    more = split_rows(rows + text_rows(f"new {i}" for i in range(20)), 0.2, 42)[1]
    assert len(texts(held_out) - texts(more)) < 15  # most rows stay where they are when others come


def test_twenty_copies_of_one_row_are_not_split():
    assert split_rows(text_rows(["same"] * 50), "auto", 42)[1] == []


def row(num_tokens, trained):
    ids = list(range(num_tokens))
    return TokenRow(ids, [i if i in trained else -100 for i in ids], text_rows(["x"])[0])


def test_cutting_counts_every_row_once():
    rows = [
        row(5, {3, 4}),  # fits
        row(20, {2, 3, 15}),  # cut, its first answer is whole
        row(20, {8, 9, 10, 11}),  # cut in the middle of the answer
        row(20, {15}),  # loses its answer
        row(20, set()),
        row(5, {0}),  # nothing to train: the first token has nothing before it
    ]
    fit = fit_length(rows, 10)
    assert [len(kept.input_ids) for kept in fit.rows] == [5, 10, 10] and all(kept.num_trained for kept in fit.rows)
    assert (fit.num_truncated, fit.num_end_lost, fit.num_answer_lost, fit.num_fully_masked) == (2, 1, 1, 2)
    assert fit.rows[2].labels[8:] == [8, 9] and len(rows[2].input_ids) == 20  # the given rows are left alone
    assert len(fit.rows) + fit.num_answer_lost + fit.num_fully_masked == len(rows)


def test_max_length():
    assert choose_max_length([5, 300], "auto", None) == 300
    assert choose_max_length([5, 9000], "auto", None) == 9000  # nothing is cut unasked
    assert choose_max_length(range(1, 1001), "p99", None) == 990
    assert choose_max_length(range(1, 1001), "p99", 512) == 512
    assert choose_max_length([7], "p1", None) == 7
    assert choose_max_length([5, 9000], "auto", 512) == 512
    assert choose_max_length([5], 512, 512) == 512
    with pytest.raises(DataError, match="1,024 tokens, but the model takes at most 512"):
        choose_max_length([5], 1024, 512)


@pytest.mark.parametrize("seed", range(20))
def test_length_statistics(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 10 ** rng.randint(1, 4)) for _ in range(rng.randint(1, 500))]
    stats = length_stats(lengths)
    for share, value in ((0.5, stats.p50), (0.95, stats.p95), (0.99, stats.p99), (1, stats.max)):
        assert value in lengths and sum(length <= value for length in lengths) >= share * len(lengths)
        assert sum(length < value for length in lengths) < share * len(lengths)
    assert 1 <= len(stats.histogram) <= 12
    for low, high, count in stats.histogram:
        assert count == sum(low <= length <= high for length in lengths)
    assert sum(count for _, _, count in stats.histogram) == len(lengths)


def test_no_lengths():
    assert length_stats([]).max == 0
