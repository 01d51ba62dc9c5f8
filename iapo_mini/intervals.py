"""Statistics with intervals: means over seeds, tests, bootstrap, ROC AUC, ranks, calibration."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% t-interval over seeds: ``(mean, low, high)``.

    With a single value there is no interval, and both ends are NaN.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    df = len(values) - 1
    t = _T95[df - 1] if df <= len(_T95) else 1.960 + 2.5 / df
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def share_interval(interval: Sequence[float]) -> tuple[float, float, float]:
    """The same ``(mean, low, high)`` with ends from 0 to 1, which a t-interval may leave."""
    mean, low, high = interval
    return mean, max(low, 0.0), min(high, 1.0)


def p_above(values: Sequence[float], border: float) -> float:
    """One-sided p-value of Student's t-test that the mean over seeds is above ``border``.

    Values without any spread give 0 above the border, and 1 on it or below. To test for a mean
    below the border, change both signs: ``p_above([-x for x in values], -border)``.

    Args:
        values: one for each seed; border: in their unit, or infinite.

    Returns:
        The probability of a sample mean at least this high if the true mean were at the border;
        NaN for fewer than two values.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    above = statistics.fmean(values) - border
    error = statistics.stdev(values) / math.sqrt(len(values))
    if error == 0 or math.isinf(above):
        return 0.0 if above > 0 else 1.0
    return _t_tail(above / error, len(values) - 1)


def _t_tail(t: float, df: int) -> float:
    """Probability that Student's t with ``df`` degrees of freedom exceeds ``t``.

    Abramowitz and Stegun, 26.7.3 and 26.7.4, give the probability between -t and t by finite sums.
    """
    angle = math.atan(t / math.sqrt(df))
    cosine = math.cos(angle)
    term = cosine if df % 2 else 1.0
    total = 0.0
    for i in range(df % 2, df - 1, 2):
        total += term
        term *= cosine**2 * (i + 1) / (i + 2)
    within = math.sin(angle) * total
    if df % 2:
        within = (angle + within) * 2 / math.pi
    return min(max((1 - within) / 2, 0.0), 1.0)


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which of several tests are significant if the chance of any false one must be ``level``.

    This is Holm's correction. The smallest of m p-values is compared with level / m, the next one
    with level / (m - 1), and so on until one fails. That one and all larger ones fail. NaN means
    that a test was not made: it is not counted and not significant.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    stands = [False] * len(p_values)
    for rank, (p, i) in enumerate(order):
        if p > level / (len(order) - rank):
            break
        stands[i] = True
    return stands


def format_interval(interval: Sequence[float], digits: int = 3) -> str:
    """``(mean, low, high)`` as text: ``0.500 [0.400, 0.600]``; NaN ends mean a single seed."""
    mean, low, high = interval
    if math.isnan(low):
        return f"{mean:.{digits}f} (one seed)"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """ROC AUC: chance that a random positive scores above a random negative; ties count half."""
    order = np.unique(scores, return_inverse=True)[1]
    up = np.bincount(order, weights=positive)
    down = np.bincount(order, weights=~positive)
    below = np.cumsum(down) - down
    return float((up * (below + down / 2)).sum() / (up.sum() * down.sum()))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; equal values get the mean of their ranks."""

    def ranks(x: np.ndarray) -> np.ndarray:
        _, index, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[index]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def bootstrap_interval(
    statistic: Callable[..., float], groups: Sequence[tuple[np.ndarray, ...]], draws: int = 300
) -> list[float]:
    """``[value, low, high]``: a statistic and its 95% bootstrap interval over groups (stories)."""
    rng = np.random.default_rng(0)

    def of(chosen: Iterable[int]) -> float:
        return statistic(*(np.concatenate(x) for x in zip(*(groups[i] for i in chosen))))

    values = [of(rng.integers(len(groups), size=len(groups))) for _ in range(draws)]
    return [of(range(len(groups))), *np.quantile(values, [0.025, 0.975]).tolist()]


def expected_calibration_error(
    confidence: torch.Tensor, correct: torch.Tensor, bins: int = 15
) -> float:
    """Expected calibration error: mean |accuracy - confidence| over equal-width confidence bins.

    Args:
        confidence: (N,) in 0..1; correct: (N,) bool or 0/1; bins: number of bins.
    """
    confidence, correct = confidence.double(), correct.double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add(0, index, correct - confidence)
    return float(gap.abs().sum() / len(confidence))
