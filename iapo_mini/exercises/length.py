"""Cases for notebook 06."""

from __future__ import annotations

import random

import numpy as np
import torch

from iapo_mini.lab import exact, worlds
from iapo_mini.tools.course import Case


def _probabilities(size: int, generator: torch.Generator) -> torch.Tensor:
    """(size,) fp64, far from uniform."""
    return (2 * torch.randn(size, generator=generator, dtype=torch.float64)).softmax(0)


def covariance_of(seed: int = 0) -> list[Case]:
    """Quantities whose means are not zero, under unequal probabilities."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for size in (2, 5, 12):
        p = _probabilities(size, generator)
        a, b = 2 + torch.randn(2, size, generator=generator, dtype=torch.float64)
        cases.append(((p, a, b), exact.covariance(p, a, b)))
    return cases


def spread_thinner(seed: int = 0) -> list[Case]:
    """Unequal probabilities, and other totals than 1."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for size, total in ((3, 0.7), (6, 2.5), (10, 1.1)):
        p = _probabilities(size, generator)
        lengths = torch.randint(1, 30, (size,), generator=generator).double()
        cases.append(((total, p, lengths), exact.covariance(p, lengths, total / lengths)))
    return cases


def premise_holds(seed: int = 0) -> list[Case]:
    """Two kinds of worlds, in each of them policies for which the premise holds and does not.

    The answers are drawn at random. Of the policies those are taken in which completions that
    hardly ever occur would decide the other way if all counted alike. Where the premise holds,
    longer completions tell more in all.
    """
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for draw in (worlds.random_worlds, worlds.filler_worlds):
        strings, thetas, answers = draw(200, seed)
        told = torch.rand(answers.shape, generator=generator).double() ** 4
        wanted = [True, False]
        for theta, answer in zip(2 * thetas, told / told.sum(-1, keepdim=True)):
            p = exact.string_logprobs(strings, theta).exp()
            total, alike = exact.string_drops(strings, theta, answer).sum(-1), torch.ones_like(p)
            in_all, holds, decided = (
                bool(exact.covariance(weights / weights.sum(), strings.lengths, values) < 0)
                for weights, values in (
                    (p, total), (p, total / strings.lengths), (alike, total / strings.lengths)
                )
            )  # fmt: skip
            if holds in wanted and decided != holds and not (holds and in_all):
                wanted.remove(holds)
                cases.append(((strings, theta, answer), holds))
    return cases


def order_of(seed: int = 0) -> list[Case]:
    """Errors that scatter around a power of the step, at unevenly spaced steps."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for steps, order in (([0.5, 0.1, 0.02, 0.001], 1.0), ([0.01, 0.03, 0.2, 0.3, 0.9], 2.5)):
        errors = [0.3 * step**order * rng.uniform(0.3, 3) for step in steps]
        cases.append(((steps, errors), float(np.polyfit(np.log(steps), np.log(errors), 1)[0])))
    return cases


def steepest(seed: int = 2) -> list[Case]:
    """Worlds of another kind, by the policy gradient whose advantage is the length."""
    cases: list[Case] = []
    for draw in (worlds.random_worlds, worlds.filler_worlds):
        strings, thetas, _ = draw(2, seed)
        weights = strings.lengths[:, None].expand(strings.mask.shape)
        cases.append(((strings, thetas[1]), exact.policy_gradient(strings, thetas[1], weights)))
    return cases
