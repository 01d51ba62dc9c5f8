"""Cases for notebook 00b."""

from __future__ import annotations

import math
import random

import torch

from iapo_mini.advantages import normalize
from iapo_mini.evaluation import pass_at_k
from iapo_mini.objective import clipped_surrogate, policy_loss
from iapo_mini.tools.course import Case


def moved(seed: int = 0) -> list[Case]:
    """Vocabularies of 3 to 9 tokens, advantages of both signs, steps of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for size, token, advantage, rate in ((3, 1, 1.0, 0.5), (5, 4, -1.4, 0.9), (9, 0, 0.3, 2.0)):
        logits = 2 * torch.randn(size, generator=generator)
        z = logits.clone().requires_grad_()
        (uphill,) = torch.autograd.grad(advantage * z.log_softmax(-1)[token], z)
        expected = (logits + rate * uphill).softmax(-1)
        cases.append(((logits, token, advantage, rate), expected))
    return cases


def token_loss(seed: int = 0) -> list[Case]:
    """Ratios inside, above and below the clip range, under advantages of both signs."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for size, ratio, epsilon in ((4, 1.1, 0.2), (6, 1.7, 0.3), (5, 0.4, 0.1), (8, 0.85, 0.05)):
        paid = [1.5, -0.5, *(rng.choice((1.5, -0.5)) for _ in range(size - 2))]
        rewards = [reward + 0.1 * rng.random() for reward in rng.sample(paid, size)]
        A = normalize(torch.tensor(rewards))
        for i in (int(A.argmax()), int(A.argmin())):
            old = rng.uniform(0.1, 0.5)
            new_log, old_log = (torch.tensor([p]).log() for p in (ratio * old, old))
            expected = -clipped_surrogate(new_log, old_log, A[i : i + 1], epsilon)[0]
            cases.append(((rewards, i, old, ratio * old, epsilon), float(expected)))
    return cases


def first_loss(seed: int = 0) -> list[Case]:
    """Whole groups and parts of groups, with completions of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for lengths in ([3, 9, 40], [12, 5, 30, 2], [7, 20]):
        A = normalize(torch.rand(len(lengths) + 2, generator=generator))[: len(lengths)]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        same = torch.zeros(mask.shape)
        for mean in ("sequence", "token"):
            loss, _ = policy_loss(same, same, A[:, None] * mask, mask, aggregation=mean)
            cases.append(((A.tolist(), lengths, mean), float(loss)))
    return cases


def guess_too_low(seed: int = 0) -> list[Case]:
    """Policies of several strengths; the truth is taken as the mean of the unbiased estimate."""
    rng = random.Random(seed)
    cases: list[Case] = [((0.3, 4, 1), 0.0)]
    for n, k in ((3, 2), (8, 4), (12, 8), (5, 5)):
        p = rng.uniform(0.1, 0.6)
        drawn = torch.distributions.Binomial(n, torch.tensor(p, dtype=torch.float64))
        shares = drawn.log_prob(torch.arange(n + 1.0, dtype=torch.float64)).exp().tolist()
        fair = math.fsum(w * pass_at_k(n, c, k) for c, w in enumerate(shares))
        plug_in = math.fsum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(shares))
        cases.append(((p, n, k), plug_in - fair))
    return cases
