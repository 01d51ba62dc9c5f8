"""Cases for notebook 01."""

from __future__ import annotations

import itertools
import random

import torch

from iapo_mini.objective import aggregate, clipped_surrogate
from iapo_mini.problems.stories import ROLES
from iapo_mini.tools.course import Case


def dr_grpo(seed: int = 0) -> list[Case]:
    """Several groups of different sizes and levels, one of them silent."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for count, group in ((1, 5), (3, 4), (4, 2)):
        rewards = torch.rand(count, group, generator=generator) + torch.arange(count)[:, None]
        rewards[-1] = rewards[-1, 0] if count > 1 else rewards[-1]
        centred = [r - sum(row) / group for row in rewards.tolist() for r in row]
        cases.append(((rewards.flatten(), group), centred))
    return cases


def token_mean(seed: int = 0) -> list[Case]:
    """Rows of different lengths whose padding is not zero, on the right, the left and within."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for lengths in ((3, 7), (6, 1, 4), (2, 5, 5, 9)):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        values = torch.randn(mask.shape, generator=generator) + 2 * mask + 1
        cases.append(((values, mask), aggregate(values, mask, "token")))
    values, mask = values.flip(1), mask.flip(1)
    mask[-1, 4] = False
    return [*cases, ((values, mask), aggregate(values, mask, "token"))]


def clip_higher(seed: int = 0) -> list[Case]:
    """Ratios around 1 under both signs of the advantage, with other bounds than the defaults."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for low, high in ((0.2, 0.28), (0.1, 0.4), (0.5, 0.05)):
        rho = 2 * torch.rand(3, 8, generator=generator)
        A = torch.randn(3, 8, generator=generator)
        expected = clipped_surrogate(rho.log(), 0 * rho, A, low, high)[0]
        cases.append(((rho, A, low, high), expected))
    return cases


def silent_probability(seed: int = 0) -> list[Case]:
    """The sum over every outcome of a small group."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for group in (1, 3, 6):
        p = rng.uniform(0.05, 0.95)
        outcomes = itertools.product((p, 1 - p), repeat=group)
        silent = sum(torch.tensor(o).double().prod().item() for o in outcomes if len(set(o)) == 1)
        cases.append(((p, group), silent))
    return [*cases, ((0.0, 5), 1.0)]


def share_of_talk(seed: int = 0) -> list[Case]:
    """Completions of every role, without talk, and of talk alone."""
    rng = random.Random(seed)
    talk = [role for role in ROLES if role != "compute"] + ["other"]
    cases: list[Case] = [((["format", "compute", "format"],), 0.0), ((talk,), 1.0)]
    for size in (7, 20):
        kinds = [rng.randrange(3) for _ in range(size)]
        drawn = [(rng.choice(talk), "compute", "format")[kind] for kind in kinds]
        cases.append(((drawn,), kinds.count(0) / size))
    return cases
