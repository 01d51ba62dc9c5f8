"""Cases for notebook 05."""

from __future__ import annotations

import statistics

import torch

from iapo_mini.advantages import exploration, grpo, iapo
from iapo_mini.lab import theory
from iapo_mini.rollouts import Rollouts
from iapo_mini.tools.course import Case


def drawn_rollouts(seed: int, lengths: tuple[int, ...], group: int) -> Rollouts:
    """Rollouts without a model: rewards, log-probabilities and informativeness at random.

    Args:
        seed: seed of the draw; lengths: tokens of each completion, B; group: G.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    correct = torch.rand(len(lengths), generator=generator) < 0.5
    correct[:2] = torch.tensor([True, False])
    ids = torch.randint(9, mask.shape, generator=generator) * mask
    prompt = torch.ones(len(lengths), 1, dtype=torch.bool)
    return Rollouts(
        prompt.long(), prompt, ids, mask,
        torch.rand(mask.shape, generator=generator).clamp(min=0.02).log() * mask,
        group, torch.ones(len(lengths), dtype=torch.bool),
    ).filled(
        rewards=torch.where(correct, 1.5, -0.5), correct=correct,
        informativeness=torch.randn(mask.shape, generator=generator) * mask,
    )  # fmt: skip


def _batches(seed: int) -> list[Rollouts]:
    sizes = (((4, 7), 2), ((5, 2, 9, 6, 3, 8), 3))
    return [drawn_rollouts(seed + i, *size) for i, size in enumerate(sizes)]


def exploration_of(seed: int = 0) -> list[Case]:
    """Right and wrong completions of different lengths."""
    return [
        ((found.correct, found.old_logprobs, found.completion_mask), exploration(found))
        for found in _batches(seed)
    ]


def normalize_with_floor(seed: int = 0) -> list[Case]:
    """Values above, below and without any spread, and several floors."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for size, spread, floor in ((5, 1.0, 0.3), (8, 0.05, 0.3), (8, 0.05, 2.0), (4, 0.0, 0.1)):
        values = 0.5 + spread * torch.randn(size, generator=generator)
        listed = values.tolist()
        mean, over = statistics.fmean(listed), max(statistics.stdev(listed), floor)
        cases.append(((values, floor), [(x - mean) / over for x in listed]))
    return cases


def turning_alpha(seed: int = 0) -> list[Case]:
    """The largest value stands anywhere, and the lowest is larger in size."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for size, A_i in ((3, -0.3), (6, -1.7), (9, -1.0)):
        values = torch.randn(size, generator=generator).abs() + 0.1
        values[size // 2] = -6.0
        cases.append(((A_i, values), min(-A_i / x for x in values.tolist() if x > 0)))
    return cases


def only_when_right(seed: int = 4) -> list[Case]:
    """Other rollouts, and a beta that must not count."""
    cases: list[Case] = []
    for found, alpha, beta in zip(_batches(seed), (0.3, 1.0), (0.5, 0.05)):
        both = torch.where(found.correct[:, None], iapo(found, alpha, 0.0), grpo(found))
        cases.append(((found, alpha, beta), both))
    return cases


def predicted_change(seed: int = 0) -> list[Case]:
    """Policies over 2 to 7 tokens, any advantages and steps so large that the forecast fails."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for size, eta in ((2, 1.0), (7, 0.4), (4, 2.0)):
        logits, A = torch.randn(2, size, generator=generator, dtype=torch.float64)
        cases.append(((logits, A, eta), theory.entropy_change(logits, A, eta)[1]))
    return cases
