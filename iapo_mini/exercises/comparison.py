"""Cases for notebook 08."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np

from iapo_mini.tools.course import Case


def pairing_gain(seed: int = 0) -> list[Case]:
    """Methods that share much, little and less than nothing, and have unequal spreads."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for size, shared in ((3, 1.0), (5, 0.2), (8, -0.8)):
        a = [rng.gauss(0, 1) for _ in range(size)]
        b = [shared * x + rng.gauss(0, 0.5) + 0.2 for x in a]
        gain = np.std(np.subtract(a, b)) / np.sqrt(np.var(a) + np.var(b))
        cases.append(((a, b), float(gain)))
    return cases


def on_the_front(seed: int = 0) -> list[Case]:
    """Many methods, in any order, with ties."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for size in (1, 6, 9):
        drawn = [(rng.randint(3, 7) * 10.0, rng.randint(5, 9) / 10) for _ in range(size)]
        beaten = {
            i for i, j in itertools.permutations(range(size), 2)
            if drawn[j][0] < drawn[i][0] and drawn[j][1] > drawn[i][1]
        }  # fmt: skip
        cases.append(((drawn,), [i not in beaten for i in range(size)]))
    return cases


def ratio_of_guessing(seed: int = 0) -> list[Case]:
    """Other chances, lengths and numbers of tries."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for k in (1, 3, 16):
        p, tokens = rng.uniform(0.05, 0.6), rng.randint(4, 40)
        missed = float(np.prod([1 - p] * k))
        cases.append(((p, tokens, k), (1 - missed) / tokens))
    return [*cases, ((0.0, 5, 8), 0.0), ((1.0, 4, 8), 0.25)]


def false_discovery(seed: int = 0) -> list[Case]:
    """The sum over the number of false discoveries."""
    del seed  # nothing is drawn
    cases: list[Case] = []
    for m in (2, 5, 30):
        each = [math.comb(m, n) * 0.05**n * 0.95 ** (m - n) for n in range(1, m + 1)]
        cases.append(((m,), sum(each)))
    return cases
