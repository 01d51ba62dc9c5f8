"""Cases for notebook 11."""

from __future__ import annotations

import random

from iapo_mini.tools.course import Case


def first_sure(seed: int = 0) -> list[Case]:
    """Entropies with several sure questions, one at the threshold, and none."""
    rng = random.Random(seed)
    high = [round(rng.uniform(1.0, 2.0), 2) for _ in range(4)]
    rows = (
        ([*high, 0.3, 0.1], 0.31), ([high[0], 0.7, 0.9, 0.2], 0.7), ([high[1], 0.5, 0.2], 0.8),
        (high, 0.9), ([0.0], 0.1),
    )  # fmt: skip
    cases: list[Case] = []
    for entropies, h in rows:
        sure = [number for number, entropy in enumerate(entropies) if h - entropy > 0]
        cases.append(((entropies, h), min(sure, default=-1)))
    return cases


def net_saving(seed: int = 0) -> list[Case]:
    """Numbers that differ in every argument, with and without a gain."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for whole, n in ((90, 1), (47, 3), (60, 11)):
        t, k, a = rng.randint(5, 40), rng.randint(2, 6), rng.randint(2, 6)
        written, asked = t + k + a, sum(k for _ in range(n))
        cases.append(((whole, t, k, a, n), whole - written - asked))
    return cases


def doubly_sure(seed: int = 0) -> list[Case]:
    """Answers that come back after another one, and entropies at the threshold.

    What is expected names the question at which each chain is cut, found by hand; -1 is none.
    """
    rng = random.Random(seed)
    chains = (
        # The answer 8 comes back at the third question, but the one before it was 7.
        ([0.1, 0.9, 0.2, 0.5], [8, 7, 8, 8], 0.6, 3),
        # The last question is as unsure as the threshold, which is not below it.
        ([0.1, 0.9, 0.2, 0.5], [8, 7, 8, 8], 0.5, -1),
        # The second question repeats the first one's answer, whose own entropy was high.
        ([2.0, 0.3, 0.1], [5, 5, 5], 0.4, 1),
        # Every answer is sure, and every answer is new.
        ([0.1, 0.1, 0.1, 0.1], [1, 2, 3, 1], 0.5, -1),
    )
    cases: list[Case] = []
    for entropy, answer, h, cut in chains:
        n = len(entropy)
        asked = sorted(rng.sample(range(1, 60), n))
        right = [round(rng.random(), 2) for _ in entropy]
        suffix, length = rng.randint(3, 9), rng.randint(61, 90)
        correct = round(rng.random(), 2)
        chain = {
            "asked": asked, "entropy": entropy, "answer": answer, "right": right,
            "suffix": suffix, "correct": correct, "length": length,
        }  # fmt: skip
        stopped = [right[cut], asked[cut] + suffix]
        cases.append(((chain, h), [correct, length] if cut < 0 else stopped))
    return cases
