"""Cases for notebook 09."""

from __future__ import annotations

import itertools
import random

from iapo_mini.tools import planner
from iapo_mini.tools.course import Case


def cache_size(seed: int = 0) -> list[Case]:
    """The planner's count for larger models and completions that just fill its buffer."""
    del seed  # nothing is drawn
    cases: list[Case] = []
    for name, rows, prompt, width in (("qwen2.5-1.5b", 7, 128, 4), ("qwen2.5-7b", 33, 512, 2)):
        shape = planner.shape(name)
        size = planner.cache_bytes(shape, rows, prompt, 128, width)
        cases.append(((shape, rows, prompt + 128, width), size))
    return cases


def reference_of(seed: int = 0) -> list[Case]:
    """Numbers of every size and sign, after texts with other numbers."""
    rng = random.Random(seed)
    numbers = [rng.randint(0, 9), rng.randint(1_000_000, 9_999_999), -rng.randint(1000, 9999)]
    return [((f"2 + 2 = {i}, or 1,0{i}0.\n#### {n:,}",), n) for i, n in enumerate(numbers, 1)]


def asked_tokens(seed: int = 0) -> list[Case]:
    """The places that are asked, listed."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for length, postfix, stride in ((24, 4, 6), (rng.randint(30, 99), 3, 7), (3, 9, 50)):
        asked = {0, length, *range(0, length + 1, stride)}
        cases.append(((length, postfix, stride), postfix * len(asked)))
    return cases


def pass_of(seed: int = 0) -> list[Case]:
    """All ways to draw, counted."""
    del seed  # nothing is drawn
    cases: list[Case] = []
    for n, c, k in ((5, 2, 2), (6, 1, 4), (7, 7, 3), (6, 4, 5)):
        ways = list(itertools.combinations(range(n), k))
        cases.append(((n, c, k), sum(min(way) < c for way in ways) / len(ways)))
    return cases
