"""Verdicts on claims, by t-tests over seeds with Holm's correction.

A claim is true if a mean lies in a certain region. The verdict is *holds* if a t-test finds the
mean inside the region, *does not hold* if a t-test finds it outside, and *cannot tell* otherwise.
All claims of a section share a one-sided level of 0.025. The verdict is *cannot be tested* if the
claim would have passed the test before any training. If only an interval is known, the verdict
depends on whether the whole interval lies inside or outside the region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from iapo_mini.intervals import holm, p_above

LEVEL = 0.025
"""One-sided level. A 95% interval leaves the same share on each side."""

Row = tuple[str, str, str, str]
"""A claim, the paper's number, our number, and the verdict."""


class Claim(NamedTuple):
    """A claim before it is judged.

    Attributes:
        text, paper, ours: cells of its row in the table.
        values: values to judge, one for each seed; empty if not measured.
        low, high: the claim is true if the mean lies between them.
        testable: whether the test could fail.
    """

    text: str
    paper: str
    ours: str
    values: Sequence[float]
    low: float = -math.inf
    high: float = math.inf
    testable: bool = True


def verdict(interval: Sequence[float], low: float = -math.inf, high: float = math.inf) -> str:
    """Verdict on whether an interval ``(mean, low, high)`` lies between ``low`` and ``high``."""
    _, left, right = interval
    if math.isnan(left):
        return "cannot tell"
    if left >= low and right <= high:
        return "holds"
    return "does not hold" if left > high or right < low else "cannot tell"


def p_values(claim: Claim) -> tuple[float, float]:
    """One-sided p-values of tests that the mean is inside and outside the claim's region.

    NaN if there is no test: for fewer than two seeds, or a claim that can't be tested.
    """
    if not claim.testable:
        return math.nan, math.nan
    up, down = claim.values, [-x for x in claim.values]
    inside = max(p_above(up, claim.low), p_above(down, -claim.high))
    return inside, min(p_above(up, claim.high), p_above(down, -claim.low))


def judge(section: Sequence[Claim]) -> list[Row]:
    """Rows of a section with their verdicts, with Holm's correction over the section."""
    pairs = [p_values(claim) for claim in section]
    stands = holm([min(pair) for pair in pairs], LEVEL)
    rows = []
    for claim, (inside, outside), stand in zip(section, pairs, stands):
        word = "cannot tell" if claim.testable else "cannot be tested"
        if stand:
            word = "holds" if inside < outside else "does not hold"
        rows.append((claim.text, claim.paper, claim.ours, word))
    return rows
