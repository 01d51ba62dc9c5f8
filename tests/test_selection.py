"""Selection effects: rules that choose a checkpoint, and the bias of its number."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import run_here

from iapo_mini.evaluation import pass_at_k
from iapo_mini.intervals import mean_interval
from iapo_mini.lab import ledger, runs, selection
from iapo_mini.lab.best_of import (
    RULES,
    bias_of,
    choose,
    jackknife,
    measures,
    on,
    repeat,
    untuned,
)
from iapo_mini.lab.sizes import Size

TURNS = 4


def equals(candidates, stories, seed, group=8):
    """Completions of candidates that are all the same policy, on stories of different length."""
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(30, 50, stories)
    right = rng.random((candidates, stories, group)) < 0.75
    tokens = rng.normal(lengths[:, None], 8.0, (candidates, stories, group)).clip(5)
    return right.astype(int), tokens


def world(seed, candidates=8, k=1):
    """(test, tune) of one run in which all candidates are equal."""
    return tuple(
        measures(*equals(candidates, stories, seed=2 * seed + part), k)
        for part, stories in enumerate((120, 60))
    )


def test_measures_of_a_story_by_hand():
    right = np.array([[[1, 0, 0, 0], [1, 1, 0, 1]]])
    tokens = np.array([[[10, 20, 30, 40], [5, 7, 9, 11]]])
    found = measures(right, tokens, 2)
    assert found["accuracy"].tolist() == [[0.25, 0.75]]
    assert found["pass"].tolist() == [[pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)]]
    assert found["length"].tolist() == [[15.0, 6.0]]
    means = on(found, np.array([[0], [1]]))
    assert means["ratio"].tolist() == [[0.5 / 15, 1.0 / 6]]
    both = on(found, np.array([[0, 1]]))  # a ratio of means, as Ratio@k is
    assert both["ratio"][0, 0] == pytest.approx(0.75 / 10.5)


def test_the_best_ratio_among_the_most_accurate_is_chosen():
    accuracy = np.array([[0.5, 0.9], [0.8, 0.8], [0.9, 0.7], [0.7, 0.7]])
    ratio = np.array([[9.0, 1.0], [1.0, 2.0], [2.0, 9.0], [3.0, 8.0]])
    assert choose(accuracy, ratio, 2).tolist() == [2, 1]  # a better ratio has too low an accuracy
    assert choose(accuracy, ratio, 3).tolist() == [3, 2]  # of 0.7 and 0.7 the earlier is kept
    assert choose(accuracy, ratio, 1).tolist() == [2, 0]
    assert choose(accuracy[:, :1], ratio, 1).tolist() == [2, 2]  # one accuracy for all draws


def test_reported_and_held_out_stories_of_a_draw_are_disjoint():
    """Each story has a different length, so the means show which stories were used."""
    stories, n = 8, 3
    tokens = np.broadcast_to(2.0 ** np.arange(stories)[:, None], (2, stories, 1))
    test = measures(np.ones_like(tokens, dtype=int), tokens, 1)
    found = repeat(test, test, n, 2, turns=6)
    reported = np.round(found["last"]["reported"]["length"] * n).astype(int)
    held_out = np.round(found["last"]["value"]["length"] * (stories // 2)).astype(int)
    assert not (reported & held_out).any() and len(set(reported.tolist())) > 5
    assert {bin(x).count("1") for x in reported} == {n}
    assert {bin(x).count("1") for x in held_out} == {stories // 2}
    assert len(reported) == 6 * stories
    # Every story is reported equally often, so no mean is off by chance.
    for part in ("reported", "value"):
        mean = found["last"][part]["length"].mean()
        assert mean == pytest.approx((2.0**stories - 1) / stories), part


def test_a_rule_chooses_on_its_own_stories():
    """Candidate 0 is the shorter one on tune stories, candidate 1 on test stories."""
    right = np.ones((2, 12, 1), dtype=int)
    tokens = np.ones((2, 12, 1))
    test = measures(right, tokens * np.array([20.0, 10.0])[:, None, None], 1)
    tune = measures(right, tokens * np.array([10.0, 20.0])[:, None, None], 1)
    found = repeat(test, tune, 3, 2, 5)
    for rule, length in (("test", 10), ("tune", 20), ("tune_pool", 20), ("last", 10)):
        assert set(found[rule]["reported"]["length"]) == {length}, rule
        assert set(found[rule]["value"]["length"]) == {length}, rule
    assert set(found["tune"]["score"]["ratio"]) == {0.1} == set(found["test"]["score"]["ratio"])
    assert set(found["last"]["score"]["ratio"]) == {0.1}


def test_bias_by_hand():
    def row(reported, value):
        return {"test": {"reported": {"ratio": np.array(reported)}, "value": {"ratio": value}}}

    told = [row([3.0, 5.0], np.array([2.0, 2.0])), row([3.0, 3.0], np.array([1.0, 3.0]))]
    found = bias_of(told, "test", "ratio")
    assert found["reported"][0] == 3.5 and found["value"][0] == 2.0
    mean, low, high = found["bias"]
    assert mean == 1.5 and (low, high) == pytest.approx((1.5 - 6.353, 1.5 + 6.353))
    assert found["share"][0] == 0.75
    assert found["spread"] == pytest.approx([0.5, 1.5], abs=0.1)  # draws of 3, 5 and 3, 3 against 2


def test_for_equal_candidates_only_the_choice_on_reported_stories_is_biased():
    told = [repeat(*world(seed), 15, 5, TURNS) for seed in range(8)]
    shares = {rule: bias_of(told, rule, "ratio")["share"] for rule in RULES}
    assert shares["test"][1] > 0.02
    for rule in ("tune", "tune_pool", "last"):
        _, low, high = shares[rule]
        assert low < 0.004 < high + 0.01 and abs(shares[rule][0]) < 0.012, rule
    # Both parts of the ratio are biased: passes are too many and tokens too few.
    assert bias_of(told, "test", "pass")["bias"][0] > 0 > bias_of(told, "test", "length")["bias"][0]


def test_the_bias_is_the_expected_maximum_of_equal_candidates():
    """All answers are right, so the ratio is one over the mean length, whose error is known.

    The best of five standard normal numbers is 1.163 on average.
    """
    told = []
    for seed in range(30):
        pools = []
        for part, stories in enumerate((120, 60)):
            right, _ = equals(5, stories, 0)
            rng = np.random.default_rng(100 + 2 * seed + part)
            tokens = rng.normal(100.0, 16.0, right.shape)
            pools.append(measures(np.ones_like(right), tokens, 8))
        told.append(repeat(*pools, 15, 5, 2))
    mean, low, high = bias_of(told, "test", "ratio")["share"]
    expected = 1.163 * 16 / np.sqrt(15 * 8) / 100
    assert low < expected < high and mean == pytest.approx(expected, rel=0.15)


def test_more_candidates_and_fewer_stories_make_the_bias_larger():
    def share(stories, last):
        told = []
        for seed in range(6):
            test, tune = world(seed)
            cut = [{name: x[-last:] for name, x in pool.items()} for pool in (test, tune)]
            told.append(repeat(*cut, stories, last, TURNS))
        return bias_of(told, "test", "ratio")["share"][0]

    assert share(15, 8) > share(15, 2) > share(15, 1) + 0.005
    assert share(15, 8) > share(50, 8) > 0


def test_an_untuned_side_loses_to_an_equal_tuned_side():
    """Both sides are the same policy, so the gain of the chosen side is bias, which grows with the
    number of runs to choose from. A choice on tune stories gains nothing."""
    test_tune = []
    rng = np.random.default_rng(0)
    for stories in (120, 60):
        lengths = rng.uniform(30, 50, stories)
        right = (rng.random((6, 8, stories, 8)) < 0.75).astype(int)
        tokens = rng.normal(lengths[:, None], 8.0, (6, 8, stories, 8)).clip(5)
        test_tune.append([measures(a, b, 1) for a, b in zip(right, tokens)])
    told = [repeat(test, tune, 15, 5, TURNS) for test, tune in zip(*test_tune)]
    one, four = (untuned(told, "test", trials) for trials in (1, 4))
    assert 0.02 < one["apparent"][0] < four["apparent"][0]
    for found in (one, four):
        assert found["apparent"][0] == pytest.approx(found["true"][0] + found["bias"][0])
        assert abs(found["true"][0]) < 0.01 and found["bias"][1] > 0
    assert abs(untuned(told, "tune_pool", 4)["bias"][0]) < 0.02
    assert abs(untuned(told, "last", 1)["apparent"][0]) < 1e-12  # every pair is there both ways


def test_the_best_of_two_runs_by_hand():
    def run(chosen, last):
        def part(x):
            return {"ratio": np.array([x])}

        return {
            "test": {"score": part(chosen), "reported": part(chosen), "value": part(chosen - 1)},
            "last": {"score": part(last), "reported": part(last), "value": part(last)},
        }

    told = [run(6.0, 3.0), run(5.0, 4.0), run(9.0, 5.0)]
    found = untuned(told, "test", 2)
    # Runs 0 and 1 against 2: 6 - 5; 0 and 2 against 1: 9 - 4; 1 and 2 against 0: 9 - 3.
    assert found["apparent"][0] == pytest.approx((1 + 5 + 6) / 3 / 4)
    assert found["true"][0] == pytest.approx((0 + 4 + 5) / 3 / 4)
    assert np.isnan(found["bias"][1])  # without one run there is no third to compare with


def test_the_jackknife_of_a_mean_is_its_interval():
    values = [1.0, 4.0, 2.0, 5.0]
    found = jackknife({(i,): x for i, x in enumerate(values)}, 4)
    assert found == pytest.approx(mean_interval(values))


def test_sizes_fit_together():
    for plan in selection.SIZES.values():
        pools = dict(plan.size.pools)
        assert max(plan.problems) <= min(pools["tune"], pools["test"] // 2)
        assert max(plan.candidates) <= len(plan.size.on_the_way)
        assert max(plan.trials) <= len(plan.size.seeds) - 2
        assert max(plan.size.on_the_way) == plan.size.max_steps
        assert max(plan.size.ks) <= plan.size.num_generations


TINY = Size(
    seeds=(0, 1), max_steps=2, problems=2, prompts_per_step=1, num_generations=2, ks=(1, 2),
    on_the_way=(1, 2), pools=(("tune", 2), ("test", 4)),
)  # fmt: skip
PLAN = selection.Study(TINY, problems=(1, 2), candidates=(1, 2), trials=(1,), turns=3)


def run_and_keep(jobs, parallel=None, kept=None):
    """As run_all, in this process."""
    for job in jobs:
        if Path(job["run"]).name not in ledger.read(kept):
            run_here([job])
            ledger.append(kept, job, runs._found(job))


def test_the_study_at_its_smallest_and_again_from_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "run_all", run_and_keep)
    monkeypatch.setattr(selection, "SIZES", {"quick": PLAN})
    monkeypatch.setattr(selection, "tuned", lambda *_: {"iapo": {"method": "iapo"}})
    figures = tmp_path / "figures"
    found = selection.selection("quick", out=tmp_path / "runs", figures=figures)
    saved = json.loads((figures / "results/selection_quick.json").read_text(encoding="utf-8"))
    assert json.dumps(saved) == json.dumps(found)  # as text: without a third run ends are NaN
    assert found["rules"].keys() == {"1", "2"} and found["rules"]["2"].keys() == set(RULES)
    assert found["problems"].keys() == {"1", "2"} == found["candidates"].keys()
    assert len(found["runs"]) == 2 and len(found["runs"][0]["length"]) == 2
    # With one candidate every rule takes the last checkpoint.
    only = found["candidates"]["1"]
    assert all(only[rule] == only["last"] for rule in RULES)
    lines = selection.selection_table(found).splitlines()
    assert len(lines) == (2 + 2 * 4 * 3) + 1 + (2 + 4)
    assert (figures / "selection_quick.png").stat().st_size > 10_000
    # The pools are whole, and length is that of the test pool.
    way = json.loads(
        (tmp_path / "runs/quick/selection/iapo-1/step-2.json").read_text(encoding="utf-8")
    )
    tokens = np.array(way["pools"]["test"]["tokens"])
    assert tokens.shape == (4, 2) and np.array(way["pools"]["tune"]["right"]).shape == (2, 2)
    assert way["length"] == pytest.approx(tokens.mean())
    # A machine that has only the ledger needs no run.
    again = selection.selection("quick", out=tmp_path / "elsewhere", figures=figures)
    assert (
        json.dumps(again) == json.dumps(found)
        and not (tmp_path / "elsewhere/quick/selection/iapo-0").exists()
    )
