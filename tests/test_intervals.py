"""Statistics with intervals, compared with numbers computed by hand."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo_mini.intervals import (
    auc,
    bootstrap_interval,
    expected_calibration_error,
    format_interval,
    holm,
    mean_interval,
    p_above,
    spearman,
)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12))
def test_auc_counts_pairs(pairs):
    scores, positive = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    if positive.all() or not positive.any():
        return
    wins = [
        (a > b) + 0.5 * (a == b) for a, b in itertools.product(scores[positive], scores[~positive])
    ]
    assert auc(scores, positive) == pytest.approx(np.mean(wins))


def test_spearman_of_ranks():
    a = np.array([1.0, 2.0, 3.0, 10.0])
    assert spearman(a, a**3) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    # Ties share the mean rank: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    tied = np.array([0.0, 5.0, 5.0, 9.0])
    expected = np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]
    assert spearman(tied, a) == pytest.approx(expected)


def test_interval_holds_the_value_and_resamples_whole_groups():
    groups = [(np.array([1.0, 1.0]),), (np.array([3.0]),)]
    value, low, high = bootstrap_interval(lambda x: float(x.mean()), groups)
    assert value == pytest.approx(5 / 3)
    assert low == 1.0 and high == 3.0  # draws of one group only


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_interval_is_students(n, t):
    values = [0.1 * i * i for i in range(n)]
    mean, low, high = mean_interval(values)
    half = t * statistics.stdev(values) / math.sqrt(n)
    assert mean == pytest.approx(sum(values) / n)
    assert (low, high) == pytest.approx((mean - half, mean + half))


def test_interval_by_hand():
    """1, 2, 3, 4, 5: mean 3, deviation sqrt(2.5), half width 2.776 sqrt(2.5 / 5) = 1.963."""
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 1.037, 4.963), abs=1e-3)


@pytest.mark.parametrize(("n", "t"), [(32, 2.040), (61, 2.000), (121, 1.980), (1001, 1.962)])
def test_interval_of_many_values(n, t):
    values = [float(i % 2) for i in range(n)]
    mean, _, high = mean_interval(values)
    assert (high - mean) / statistics.stdev(values) * math.sqrt(n) == pytest.approx(t, abs=0.005)


def test_interval_of_one_value_is_unknown():
    mean, low, high = mean_interval([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)


def test_interval_of_equal_values_is_a_point():
    assert mean_interval([0.25] * 3) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("values", "border", "p"),
    [
        # t = 1 with one degree of freedom: 1/2 - atan(1) / pi.
        ([0, 2], 0, 0.25),
        ([0, 2], 2, 0.75),
        ([0, 2], 1, 0.5),
        # t = sqrt(3), two degrees of freedom: 1/2 - t / (2 sqrt(2 + t^2)).
        ([0, 1, 2], 0, 0.5 - 3**0.5 / (2 * 5**0.5)),
        # t = 3 sqrt(2), four degrees of freedom, from a table of the distribution.
        ([1, 2, 3, 4, 5], 0, 0.00662),
        ([0.25] * 3, 0.2, 0.0),
        ([0.25] * 3, 0.25, 1.0),
        ([0.25] * 3, 0.3, 1.0),
        ([0, 2], -math.inf, 0.0),
        ([0, 2], math.inf, 1.0),
    ],
)
def test_p_value_that_the_mean_lies_above_a_border(values, border, p):
    assert p_above(values, border) == pytest.approx(p, abs=1e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 31])
def test_the_border_of_the_interval_has_a_p_value_of_0_025(n):
    values = [0.1 * i * i for i in range(n)]
    _, low, high = mean_interval(values)
    assert p_above(values, low) == pytest.approx(0.025, abs=1e-4)
    assert p_above([-x for x in values], -high) == pytest.approx(0.025, abs=1e-4)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan]])
def test_no_p_value_without_two_numbers(values):
    assert math.isnan(p_above(values, 0.0))


@pytest.mark.parametrize(
    ("p", "stands"),
    [
        # Holm's levels at 0.06 for three tests are 0.02, 0.03 and 0.06.
        ([0.05, 0.01, 0.025], [True, True, True]),
        ([0.021, 0.025, 0.05], [False, False, False]),  # the least one fails, and all with it
        ([0.01, 0.05, 0.031], [True, False, False]),
        ([0.02, 0.03, 0.06], [True, True, True]),
        # Two tests were made, with levels 0.03 and 0.06.
        ([math.nan, 0.03, 0.06], [False, True, True]),
        ([math.nan], [False]),
        ([], []),
    ],
)
def test_holm_by_hand(p, stands):
    assert holm(p, 0.06) == stands


def test_interval_as_text():
    assert format_interval((0.5, 0.4, 0.61), 1) == "0.5 [0.4, 0.6]"
    assert format_interval(mean_interval([0.5])) == "0.500 (one seed)"


@pytest.mark.parametrize(
    ("confidence", "correct", "error"),
    [
        ([1.0] * 4, [1, 1, 1, 1], 0.0),
        ([0.0] * 4, [0, 0, 0, 0], 0.0),
        ([0.8] * 5, [1, 1, 1, 1, 0], 0.0),
        ([1.0] * 4, [1, 0, 1, 0], 0.5),
        ([0.5] * 4, [1, 1, 1, 1], 0.5),
        # Two bins: three at 0.9 with 1/3 right (gap 17/30), one at 0.1 that is right (gap 0.9).
        ([0.9, 0.9, 0.9, 0.1], [1, 0, 0, 1], 0.75 * (0.9 - 1 / 3) + 0.25 * 0.9),
        # Gaps of opposite sign in two bins do not cancel.
        ([0.75, 0.25], [0, 1], 0.75),
    ],
)
def test_calibration_error_by_hand(confidence, correct, error):
    found = expected_calibration_error(torch.tensor(confidence), torch.tensor(correct).bool())
    assert found == pytest.approx(error, abs=1e-6)


def test_calibration_error_with_one_bin_is_the_overall_gap():
    confidence, correct = torch.tensor([0.75, 0.25]), torch.tensor([False, True])
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(0.0)
