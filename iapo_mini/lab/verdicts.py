"""Whether a claim holds: values over seeds, the region where it is true, Holm's correction.

The verdict is *holds* when a t-test finds the mean inside the region, *does not hold* when one
finds it outside, each at a one-sided level of 0.025 that is shared by all claims of a section, and
*cannot tell* otherwise. It is *cannot be tested* when the test would have been passed before any
training. Where only an interval is at hand, the whole interval decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from iapo_mini.intervals import holm, p_above

LEVEL = 0.025
"""One-sided: a 95% interval leaves as much on each side."""

Row = tuple[str, str, str, str]
"""Claim, the paper's number, ours, verdict."""


class Claim(NamedTuple):
    """One claim before it is judged.

    Attributes:
        text, paper, ours: cells of its row.
        values: what is judged, one for each seed; none where it was not measured.
        low, high: the claim is true where the mean lies between them.
        testable: whether the test could have failed.
    """

    text: str
    paper: str
    ours: str
    values: Sequence[float]
    low: float = -math.inf
    high: float = math.inf
    testable: bool = True


def verdict(interval: Sequence[float], low: float = -math.inf, high: float = math.inf) -> str:
    """Whether a quantity lies between ``low`` and ``high``, by its ``(mean, low, high)``."""
    _, left, right = interval
    if math.isnan(left):
        return "cannot tell"
    if left >= low and right <= high:
        return "holds"
    return "does not hold" if left > high or right < low else "cannot tell"


def p_values(claim: Claim) -> tuple[float, float]:
    """One-sided p-values that the mean lies inside the claim's region, and outside of it.

    NaN where there is no test: fewer than two seeds, or a claim that can't be tested.
    """
    if not claim.testable:
        return math.nan, math.nan
    up, down = claim.values, [-x for x in claim.values]
    inside = max(p_above(up, claim.low), p_above(down, -claim.high))
    return inside, min(p_above(up, claim.high), p_above(down, -claim.low))


def judge(section: Sequence[Claim]) -> list[Row]:
    """Rows of a section with their verdicts, Holm's correction over all of them."""
    pairs = [p_values(claim) for claim in section]
    stands = holm([min(pair) for pair in pairs], LEVEL)
    rows = []
    for claim, (inside, outside), stand in zip(section, pairs, stands):
        word = "cannot tell" if claim.testable else "cannot be tested"
        if stand:
            word = "holds" if inside < outside else "does not hold"
        rows.append((claim.text, claim.paper, claim.ours, word))
    return rows
