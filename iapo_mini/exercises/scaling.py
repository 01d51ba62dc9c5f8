"""Cases for notebook 10."""

from __future__ import annotations

import random

import torch

from iapo_mini.objective import aggregate
from iapo_mini.tools.course import Case


def token_weight(seed: int = 0) -> list[Case]:
    """The derivative of each mean by one token, for more completions and other limits."""
    del seed  # nothing is drawn
    cases: list[Case] = []
    for lengths, i, limit in (([4, 9, 2], 2, 20), ([7, 1, 5, 3], 0, 11)):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        one = torch.zeros(mask.shape)
        one[i, 0] = 1.0
        weights = {
            "grpo": float(aggregate(one, mask, "sequence")),
            "dapo": float(aggregate(one, mask, "token")),
            "dr_grpo": 1 / limit / len(lengths),
        }
        cases += [((lengths, i, name, limit), weight) for name, weight in weights.items()]
    return cases


def groups_across(seed: int = 0) -> list[Case]:
    """The ranks of every row of every group, listed."""
    del seed  # nothing is drawn
    cases: list[Case] = []
    for share, ranks, group in ((4, 3, 6), (5, 4, 2), (9, 2, 3), (3, 8, 4), (1, 6, 3)):
        groups = [range(g * group, (g + 1) * group) for g in range(share * ranks // group)]
        split = sum(len({row // share for row in rows}) > 1 for rows in groups)
        cases.append(((share, ranks, group), split))
    return cases


def prompts_per_update(seed: int = 0) -> list[Case]:
    """The different prompts of an update, counted."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for _ in range(4):
        ranks, accumulation, group = (rng.randint(1, 6) for _ in range(3))
        per_device = group * rng.randint(1, 4)
        rows = range(ranks * accumulation * per_device)
        cases.append(
            ((per_device, ranks, accumulation, group), float(len({row // group for row in rows})))
        )
    return cases


def rank_loss(seed: int = 0) -> list[Case]:
    """The rank's part of the mean over all tokens; its padding is not zero."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for lengths, others in (((3, 5), [2]), ((4, 1, 6), [9, 3]), ((2,), [7, 1, 1])):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()
        values = torch.randn(mask.shape, generator=generator) + 3
        counts = [sum(lengths), *others]
        own = sum(float(row[:n].sum()) for row, n in zip(values, lengths))
        cases.append(((values, mask, counts, len(counts)), len(counts) * own / sum(counts)))
    return cases
