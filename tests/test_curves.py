"""Properties of training curves, computed by hand."""

import pytest

from iapo_mini.lab.curves import (
    MATCHED,
    WINDOW,
    accuracy_at,
    area,
    curves_table,
    of_curves,
    steps_table,
)


def curve(length, accuracy=None):
    return {"length": length, "accuracy": accuracy or [0.5] * len(length)}


def test_area_is_the_mean_length_of_a_training_completion():
    assert area(curve([60.0, 40.0, 20.0])) == 40.0


def test_accuracy_is_that_of_the_first_window_that_is_short_enough():
    lengths = [60.0] * 5 + [40.0] * 5 + [30.0] * 5
    accuracies = [0.5] * 5 + [0.6] * 5 + [0.9] * 5
    found = curve(lengths, accuracies)
    assert accuracy_at(found, 60) == pytest.approx(0.5)
    assert accuracy_at(found, 40) == pytest.approx(0.6)
    # The trailing mean is 36 after two steps of 30.
    assert accuracy_at(found, 36) == pytest.approx((3 * 0.6 + 2 * 0.9) / 5)
    assert accuracy_at(found, 29.9) is None


def test_one_short_step_is_not_enough():
    assert accuracy_at(curve([60.0] * 9 + [10.0]), 40) is None


def test_a_curve_shorter_than_the_window_has_no_accuracy():
    assert accuracy_at(curve([10.0] * (WINDOW - 1)), 40) is None


def test_runs_that_end_early_are_left_out():
    whole, early = curve([60.0] * 5 + [30.0] * 5), curve([1.0] * 5)
    results = {
        "config": {"evaluation": {"max_steps": 10}},
        "curves": {"iapo": [whole, whole, early], "grpo": [curve([70.0] * 10)]},
    }
    found = of_curves(results)
    assert found["area"] == {"iapo": [45.0, 45.0], "grpo": [70.0]}
    assert found["matched"].keys() == {str(tokens) for tokens in MATCHED}
    assert found["matched"]["35"] == {"iapo": [0.5, 0.5], "grpo": [None]}
    table = curves_table(found)
    assert "| IAPO | 45.0 [45.0, 45.0] |" in table
    assert table.count("0.500 (2 of 2)") == len(MATCHED)
    assert table.count("(0 of 1)") == len(MATCHED)


def test_policies_on_the_way_are_told_for_runs_that_reach_the_last_step():
    early = {"length": [60.4, 30.0, 50.0], "pass@1": [0.6, 0.8, 0.1]}  # the third run ends here
    late = {"length": [31.0, 30.0], "pass@1": [0.7, 0.9]}
    rows = {"start": {}, "iapo": {"on_the_way": {"22": early, "60": late}}}
    title, _, row = steps_table({"methods": rows}).splitlines()
    assert title == "| method | tokens at 22 | tokens at 60 | Pass@1 at 22 | Pass@1 at 60 |"
    assert row == "| IAPO | 60, 30 | 31, 30 | 0.700 | 0.800 |"
