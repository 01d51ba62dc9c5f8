"""The reported and the true value of the best of several candidates.

These are pure functions of arrays: C candidates have answered the same N stories, with G
completions each. The numbers of stories are drawn and averaged many times, and nothing is sampled
from a policy. :mod:`iapo_mini.lab.selection` is the study that uses them and explains its rules.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from iapo_mini.evaluation import pass_at_k
from iapo_mini.intervals import mean_interval

RULES = ("test", "tune", "tune_pool", "last")
"""Rules by which a candidate is chosen."""
METRICS = ("pass", "length", "ratio")

Measures = dict[str, np.ndarray]
Reports = dict[str, dict[str, Measures]]


def measures(right: np.ndarray, tokens: np.ndarray, k: int) -> Measures:
    """Measures of each candidate on each story.

    Args:
        right: (C, N, G) 0 or 1, for C candidates, N stories and G completions.
        tokens: (C, N, G) lengths of the completions.
        k: 1 to G.

    Returns:
        (C, N) arrays: ``accuracy``, the share of right completions; ``pass``, the unbiased Pass@k;
        ``length``, the mean tokens of the first k completions.
    """
    group = right.shape[2]
    table = np.array([pass_at_k(group, c, k) for c in range(group + 1)])
    counts = right.sum(2)
    return {
        "accuracy": counts / group, "pass": table[counts], "length": tokens[:, :, :k].mean(2),
    }  # fmt: skip


def on(found: Measures, stories: np.ndarray) -> Measures:
    """Means over the stories of each draw.

    Args:
        found: from :func:`measures`.
        stories: (D, n) numbers of the stories in each of D draws.

    Returns:
        (C, D) arrays ``accuracy``, ``pass``, ``length`` and ``ratio``, which is pass / length.
    """
    means = {name: values[:, stories].mean(2) for name, values in found.items()}
    return means | {"ratio": means["pass"] / means["length"]}


def choose(accuracy: np.ndarray, ratio: np.ndarray, finalists: int) -> np.ndarray:
    """The chosen candidate of each draw: the best ratio among those with the best accuracy.

    Args:
        accuracy: (C, D); ratio: (C, D); either may have one column for all draws.
        finalists: number of candidates with the best accuracy; if equal, the earlier ones.

    Returns:
        (D,) indices of candidates.
    """
    accuracy, ratio = np.broadcast_arrays(accuracy, ratio)
    kept = np.argsort(-accuracy, axis=0, kind="stable")[:finalists]
    best = np.take_along_axis(ratio, kept, 0).argmax(0)
    return np.take_along_axis(kept, best[None], 0)[0]


def repeat(test: Measures, tune: Measures, n: int, finalists: int, turns: int) -> Reports:
    """Choose and report by every rule, once for each draw of stories.

    The N test stories are put into ``turns`` random orders, and each order is rotated to all its N
    positions, which gives D = N * turns draws. Every story is then equally often reported and
    equally often held out, so the mean of a candidate that is not chosen has no bias. The draws are
    the same in every call, so runs on the same stories can be compared draw by draw.

    Args:
        test: measures on the test pool, half of which is the evaluation set.
        tune: measures of the same candidates on the tune pool.
        n: number of reported stories, at most the size of the evaluation set and the tune pool.
        finalists: as in :func:`choose`.
        turns: number of random orders.

    Returns:
        Rule -> ``reported`` (on the n stories) and ``value`` (on the held-out half) -> metric ->
        (D,) numbers of the chosen candidate; ``score`` -> ``ratio``: the numbers of the choice.
    """
    rng = np.random.default_rng(0)

    def shuffled(found: Measures, orders: int) -> np.ndarray:
        stories = np.arange(found["length"].shape[1])
        return rng.permuted(np.tile(stories, (orders, 1)), axis=1)

    once = shuffled(test, turns)
    order = np.concatenate([np.roll(once, place, axis=1) for place in range(once.shape[1])])
    draws, half = len(order), order.shape[1] // 2
    other = shuffled(tune, draws)
    reported, held_out = on(test, order[:, :n]), on(test, order[:, half:])
    accuracy = on(test, order[:, :half])["accuracy"]
    pool, drawn_tune = on(tune, other[:1]), on(tune, other[:, :n])
    everywhere = np.broadcast_to(pool["ratio"], reported["ratio"].shape)
    scores = {
        "test": (accuracy, reported["ratio"]),
        "tune": (pool["accuracy"], drawn_tune["ratio"]),
        "tune_pool": (pool["accuracy"], everywhere),
    }
    chosen = {rule: choose(*score, finalists) for rule, score in scores.items()}
    chosen["last"] = np.full(draws, len(reported["ratio"]) - 1)
    scores["last"] = scores["test"]
    each = np.arange(draws)
    return {
        rule: {
            "reported": {metric: reported[metric][pick, each] for metric in METRICS},
            "value": {metric: held_out[metric][pick, each] for metric in METRICS},
            "score": {"ratio": scores[rule][1][pick, each]},
        }
        for rule, pick in chosen.items()
    }


def bias_of(runs: Sequence[Reports], rule: str, metric: str) -> dict[str, list[float]]:
    """Differences between the reported and the held-out numbers, over runs.

    Args:
        runs: the result of :func:`repeat` for each run.
        rule: one of ``RULES``; metric: one of ``METRICS``.

    Returns:
        ``reported``, ``value``, ``bias`` and ``share`` (bias / value): ``[mean, low, high]`` over
        runs; ``spread``: 2.5% and 97.5% quantiles over all draws of (reported - the run's mean
        value) / that value.
    """
    rows = [(run[rule]["reported"][metric], run[rule]["value"][metric]) for run in runs]
    reported, value = (np.array([row[i].mean() for row in rows]) for i in (0, 1))
    deviations = [(row[0] - mean) / mean for row, mean in zip(rows, value)]
    intervals = {
        "reported": reported, "value": value, "bias": reported - value,
        "share": (reported - value) / value,
    }  # fmt: skip
    found = {name: list(mean_interval(values.tolist())) for name, values in intervals.items()}
    return found | {"spread": np.quantile(np.concatenate(deviations), [0.025, 0.975]).tolist()}


def untuned(runs: Sequence[Reports], rule: str, trials: int) -> dict[str, list[float]]:
    """The gain that a method seems to have over itself when only one side is chosen.

    Every set of ``trials`` runs is compared with every other run. One side is the run of the set
    with the best score, at its chosen checkpoint. The other side is the other run, at its last
    checkpoint.

    Args:
        runs: results of :func:`repeat`, all with the same draws.
        rule: rule that chooses the first side; with ``last`` only the run is chosen, by the
            reported stories.
        trials: K, at most two less than the number of runs.

    Returns:
        ``apparent``, ``true`` (on held-out stories) and ``bias`` (their difference): mean gains in
        ratio as a share of the mean value of last checkpoints, ``[mean, low, high]`` by jackknife.
    """

    def stacked(rule: str, part: str) -> np.ndarray:
        return np.stack([run[rule][part]["ratio"] for run in runs])

    score, reported, value = (stacked(rule, part) for part in ("score", "reported", "value"))
    plain, plain_value = stacked("last", "reported"), stacked("last", "value")
    unit, each = plain_value.mean(), np.arange(score.shape[1])
    gains: dict[str, dict[tuple[int, ...], float]] = {"apparent": {}, "true": {}, "bias": {}}
    for members in itertools.combinations(range(len(runs)), trials):
        best = np.array(members)[score[list(members)].argmax(0)]
        for other in sorted(set(range(len(runs))) - set(members)):
            apparent = float((reported[best, each] - plain[other]).mean() / unit)
            true = float((value[best, each] - plain_value[other]).mean() / unit)
            pair = (*members, other)
            gains["apparent"][pair], gains["true"][pair] = apparent, true
            gains["bias"][pair] = apparent - true
    return {name: list(jackknife(values, len(runs))) for name, values in gains.items()}


def jackknife(values: Mapping[tuple[int, ...], float], runs: int) -> tuple[float, float, float]:
    """Mean of a statistic over sets of runs, with a 95% interval over runs.

    Args:
        values: numbers of the runs in a set, from 0 -> its statistic.
        runs: number of all runs.

    Returns:
        ``(mean, low, high)``; both ends are NaN if a run is in every set.
    """
    mean = statistics.fmean(values.values())
    without = [[x for key, x in values.items() if i not in key] for i in range(runs)]
    if not all(without):
        return mean, math.nan, math.nan
    return mean_interval([runs * mean - (runs - 1) * statistics.fmean(left) for left in without])
