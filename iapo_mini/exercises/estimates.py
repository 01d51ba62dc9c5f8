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


def share_computing(seed: int = 0) -> list[Case]:
    """Scores that separate well, not at all and the wrong way round, of both signs."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    for size, k, gap in ((12, 5, 2.0), (40, 9, 0.0), (30, 1, -1.5)):
        computes = rng.random(size) < 0.4
        scores = rng.normal(size=size) - 0.5 + gap * computes
        ranked = sorted(zip(scores.tolist(), computes.tolist()), reverse=True)
        cases.append(((scores, computes, k), sum(found for _, found in ranked[:k]) / k))
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
