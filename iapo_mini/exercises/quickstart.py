"""Cases for notebook 00."""

from __future__ import annotations

import random

import torch

from iapo_mini.advantages import normalize
from iapo_mini.information import informativeness
from iapo_mini.tools.course import Case


def drops(seed: int = 0) -> list[Case]:
    """Entropies of 1 to 9 tokens, rising and falling."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for tokens in (1, 4, 9):
        entropies = 3 * torch.rand(tokens + 1, generator=generator)
        real = torch.ones(1, tokens, dtype=torch.bool)
        cases.append(((entropies,), informativeness(entropies[None], real)[0]))
    return cases


def advantage_in_group(seed: int = 0) -> list[Case]:
    """Groups of 2 to 8, among them one in which all are wrong."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [2 * torch.rand(size, generator=generator) - 0.5 for size in (2, 5, 8)]
    drawn.append(torch.full((4,), -1.5))
    return [((rewards,), normalize(rewards)) for rewards in drawn]


def ratio_of(seed: int = 0) -> list[Case]:
    """Completions of very different lengths, among them a group without a right one."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for size, most in ((3, 3), (8, 5), (6, 0)):
        right = rng.sample([True] * most + [False] * (size - most), size)
        if most and all(right):
            right[0] = False
        tokens = [rng.randint(5, 200) for _ in range(size)]
        pass_at_1, length = right.count(True) / size, sum(tokens) / size
        cases.append(((right, tokens), 1000 * pass_at_1 / length))
    return cases
