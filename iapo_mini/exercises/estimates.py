"""Cases for notebook 04."""

from __future__ import annotations

import numpy as np
import torch

from iapo_mini.intervals import auc
from iapo_mini.tools.course import Case


def overconfidence(seed: int = 0) -> list[Case]:
    """An overconfident policy, an underconfident one, and one that is never right."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for size, right in ((7, 0.2), (12, 0.95), (5, 0.0)):
        sure = torch.rand(size, generator=generator)
        correct = torch.rand(size, generator=generator) < right
        gap = sum(sure.tolist()) / size - correct.tolist().count(True) / size
        cases.append(((sure, correct), gap))
    return cases


def auc_from_ranks(seed: int = 2) -> list[Case]:
    """Scores that separate well, badly and not at all, with few and with many positives."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    for size, share, gap in ((40, 0.1, 1.0), (60, 0.8, -0.7), (9, 0.5, 0.0)):
        positive = np.arange(size) < max(1, round(share * size))
        rng.shuffle(positive)
        scores = rng.normal(size=size) + gap * positive
        cases.append(((scores, positive), float(auc(scores, positive))))
    return cases


def shifts(seed: int = 0) -> list[Case]:
    """Beliefs over 2 to 5 answers, after 1 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for tokens, answers in ((1, 4), (6, 2), (3, 5)):
        log_p = (2 * torch.randn(tokens + 1, answers, generator=generator).double()).log_softmax(-1)
        after, before = torch.distributions.Categorical(logits=log_p[1:]), log_p[:-1]
        moved = torch.distributions.kl_divergence(
            after, torch.distributions.Categorical(logits=before)
        )
        cases.append(((log_p,), moved))
    return cases


def hidden_by_first_digit(seed: int = 0) -> list[Case]:
    """Distributions over numbers of one, two and three digits."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for size in (10, 37, 140):
        p = torch.rand(size, generator=generator).double() ** 3
        p = p / p.sum()
        # The chain rule: the mean entropy within the numbers that share a first digit.
        within = 0.0
        for digit in "0123456789":
            inside = p[[str(number)[0] == digit for number in range(size)]]
            if inside.numel():
                own = torch.distributions.Categorical(inside / inside.sum()).entropy()
                within += float(inside.sum() * own)
        cases.append(((p,), within))
    return cases


def best_temperature(seed: int = 1) -> list[Case]:
    """Policies that are too sure, not sure enough and right, with the temperatures in any order."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for scale, temperatures in (
        (2.0, [4.0, 2.0, 1.0]),
        (0.5, [0.25, 1.0, 0.5, 3.0]),
        (1.0, [1.0, 0.3, 2.0, 5.0]),
    ):
        honest = 1.5 * torch.randn(4000, 4, generator=generator)
        labels = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
        cases.append(((scale * honest, labels, temperatures), scale))
    return cases
