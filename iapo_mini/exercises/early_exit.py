"""Cases for notebook 03."""

from __future__ import annotations

import itertools
import random

import torch

from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.information import encode_postfix
from iapo_mini.policy import Policy
from iapo_mini.problems.stories import stories
from iapo_mini.sampling import sample
from iapo_mini.tools.course import Case

POSTFIXES = ("</think><answer>", "</answer><answer>", "<answer>")
"""The three texts of the last exercise."""


def saving(seed: int = 0) -> list[Case]:
    """The tokens of both ways, counted one prefix at a time."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for p, n, k in ((7, 0, 2), *((rng.randint(1, 90), rng.randint(1, 60), k) for k in (1, 4))):
        again = sum(p + t + k for t in range(n + 1))
        once = p + n + sum(k for _ in range(n + 1))
        cases.append(((p, n, k), again / once))
    return cases


def postfix_positions(seed: int = 0) -> list[Case]:
    """Prompts with little, much and no padding."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for padding, real in ((0, 4), (5, 2), (1, 9)):
        t, k = rng.randint(1, 20), rng.randint(1, 6)
        mask = torch.tensor([False] * padding + [True] * real)
        cases.append(((mask, t, k), list(range(real + t, real + t + k))))
    return cases


def packed_mask(seed: int = 0) -> list[Case]:
    """Branches of one and more tokens, at the ends of the trunk and out of order."""
    del seed  # nothing is drawn
    cases: list[Case] = []
    for n, ends, k in ((4, (0, 3), 1), (6, (5, 2, 2), 3), (3, (1,), 4)):
        rows = [
            [j <= end for j in range(n)]
            + [c == branch and j <= place for c in range(len(ends)) for j in range(k)]
            for branch, end in enumerate(ends)
            for place in range(k)
        ]
        cases.append(((n, torch.tensor(ends), k), rows))
    return cases


def entropies_by_postfix(policy: Policy, seed: int = 7) -> list[Case]:
    """The definition on another story, at its start, within it and at its end."""
    problem = next(itertools.islice(stories("test", seed=seed), 1, None))
    rollouts = sample(policy, [problem], num_generations=2, seed=seed)
    prompt = rollouts.prompt_ids[0][rollouts.prompt_mask[0]]
    cases: list[Case] = []
    for t in (0, 9, int(rollouts.lengths[0])):
        read = torch.cat([prompt, rollouts.completion_ids[0, :t]])
        found = []
        for text in POSTFIXES:
            ids = torch.cat([read, encode_postfix(policy, text)])
            with torch.no_grad():
                found.append(float(logits_entropy(policy.model(ids[None]).logits[0, -1])))
        cases.append(((policy, rollouts, t), found))
    return cases
