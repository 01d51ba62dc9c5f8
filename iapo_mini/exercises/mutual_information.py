"""Cases for notebook 02."""

from __future__ import annotations

import itertools
import math

import torch

from iapo_mini.lab import exact
from iapo_mini.tools.course import Case


def entropy_of(seed: int = 0) -> list[Case]:
    """Tables of two and three axes and one distribution, with zeros among the probabilities."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for shape in ((6,), (4, 3), (2, 3, 5)):
        p = torch.rand(shape, generator=generator)
        p[..., 0] = 0.0
        p = p / p.sum(-1, keepdim=True)
        cases.append(((p,), torch.distributions.Categorical(p).entropy()))
    return cases


def parity_information(seed: int = 0) -> list[Case]:
    """Biased coins, for which the parity is not open until the last."""
    del seed  # nothing is drawn

    def entropy(odd: float) -> float:
        return -sum(math.log(p) * p for p in (odd, 1 - odd) if p > 0)

    cases: list[Case] = []
    for n, heads in ((1, 0.3), (3, 0.2), (4, 0.9), (3, 1.0)):
        # The parity of m coins is odd with probability (1 - (1 - 2 heads)**m) / 2.
        left = [entropy((1 - (1 - 2 * heads) ** m) / 2) for m in range(n, -1, -1)]
        cases.append(((n, heads), [a - b for a, b in itertools.pairwise(left)]))
    return cases


def mean_belief_shift(seed: int = 3) -> list[Case]:
    """Worlds of other sizes, at their first and their last token."""
    found = [exact.random_world(*size, noise=0.2, seed=seed) for size in ((2, 3, 4), (4, 2, 2))]
    cases = [(world, t) for world in found for t in (1, world.length)]
    return [(case, exact.conditional_mi(*case)) for case in cases]


def information_after_noise(seed: int = 6) -> list[Case]:
    """Random answers instead of some, all and none, in worlds of unequal answers."""
    cases: list[Case] = []
    for answers, share in ((4, 0.5), (3, 0.1), (2, 0.0)):
        clean, noisy = (
            exact.random_world(2, 3, answers, noise=noise, seed=seed) for noise in (0.0, share)
        )
        cases.append(((clean, share), exact.mutual_information(noisy)))
    return [*cases, ((clean, 1.0), 0.0)]


def mean_drop(seed: int = 0) -> list[Case]:
    """The mutual information of the next value and the answer, elsewhere in the story world."""
    del seed  # nothing is drawn
    cases: list[Case] = []
    for value, left in ((3, 1), (12, 2), (45, 4), (60, 1)):
        joint = exact.answer_posterior(1)[value][:, None] * exact.answer_posterior(left - 1)
        cases.append(((value, left), exact.mutual_information(exact.World(joint))))
    return cases
