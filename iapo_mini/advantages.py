"""Token advantages: one pure function for each method, ``(Rollouts, ...) -> (B, L)``.

A_{i,t} of the paper is ``advantages[i, t]``. Padding is 0 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from iapo_mini.rollouts import Rollouts

EPS = 1e-4
"""Added to a standard deviation before dividing, as GRPO code does (paper, released code; TRL)."""


def normalize(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """norm(x, v) = (x - mean v) / std v along the last dimension (paper, Section 4).

    Args:
        values: (..., N) float.
        mask: (..., N) bool, the population; None means all. Masked-out entries give 0.

    Returns:
        (..., N) fp32. The standard deviation is the sample's (n - 1), plus ``EPS``, as in TRL. A
        population of fewer than two, or without variance, gives zeros and not NaN.
    """
    values = values.float()
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    count = mask.sum(-1, keepdim=True)
    mean = (values * mask).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = (values - mean) * mask
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # Rounding leaves a constant population a deviation of about 1e-7 of its size.
    flat = (std <= 1e-6 * (1 + mean.abs())) | (count < 2)
    return (centred / (std + EPS)).masked_fill(flat, 0.0)


def group_advantage(rollouts: Rollouts) -> torch.Tensor:
    """A_i = norm(r_i, r) over the group of each prompt; (B,) fp32 (paper, "GRPO")."""
    groups = rollouts.rewards.view(-1, rollouts.num_generations)
    return normalize(groups).flatten()


def exploration(rollouts: Rollouts) -> torch.Tensor:
    """c_{i,t} = +pi_old(o_t) if o_i is correct, else -pi_old(o_t), (B, L) fp32 (Section 4)."""
    sign = torch.where(rollouts.correct, 1.0, -1.0)[:, None]
    return sign * rollouts.old_logprobs.exp() * rollouts.completion_mask


def grpo(rollouts: Rollouts, alpha: float = 0.0, beta: float = 0.0) -> torch.Tensor:
    """GRPO: the group advantage A_i at every token; alpha and beta are not used."""
    return group_advantage(rollouts)[:, None] * rollouts.completion_mask


def dapo(rollouts: Rollouts, alpha: float = 0.0, beta: float = 0.0) -> torch.Tensor:
    """DAPO: A_i at every token, nothing for completions cut at the length limit.

    The other half of DAPO are settings of the loss: a mean over all tokens of the batch and a clip
    range of 0.2 below and 0.28 above (``config.RECIPES``). alpha and beta are not used.
    """
    return grpo(rollouts) * rollouts.finished[:, None]


def gfpo(rollouts: Rollouts, alpha: float = 0.0, beta: float = 0.0) -> torch.Tensor:
    """GFPO: the three shortest quarters of each group teach, normalised among themselves.

    Of G = 8 the 6 shortest are kept (ties by order); the others get 0. alpha and beta are not used.
    """
    group = rollouts.num_generations
    rank = rollouts.lengths.view(-1, group).argsort(dim=1, stable=True).argsort(dim=1)
    kept = rank < math.ceil(0.75 * group)
    base = normalize(rollouts.rewards.view(-1, group), kept).flatten()
    return base[:, None] * rollouts.completion_mask


def gtpo(rollouts: Rollouts, alpha: float = 0.1, beta: float = 0.0) -> torch.Tensor:
    """GTPO: A_i, and a bonus where a right completion is unsure, a malus where a wrong one is sure.

    Right: A_i + alpha * d_t * H_{i,t} / sum_k H_{k,t}; wrong: A_i - alpha * d_t * (1 / H_{i,t}) /
    sum_k (1 / H_{k,t}). The sums run over the right (or wrong) completions k of the group that are
    still running at t; d_t is how many these are.

    Args:
        rollouts: with ``rewards``, ``correct`` and ``token_entropies`` H_{i,t} (nats, kept above
            ``EPS``, so that a token without any doubt doesn't take the whole sum).
        alpha: weight of the entropy term; GTPO takes 0.1.
        beta: not used.
    """
    group, mask = rollouts.num_generations, rollouts.completion_mask
    h = rollouts.token_entropies.float().clamp(min=EPS)
    terms = torch.zeros(mask.shape, device=mask.device)
    for sign, chosen, values in ((1, rollouts.correct, h), (-1, ~rollouts.correct, 1 / h)):
        running = (mask & chosen[:, None]).view(-1, group, mask.shape[1])
        values = values.view(running.shape) * running
        share = values / values.sum(1, keepdim=True).clamp(min=1e-30)
        terms += sign * (running.sum(1, keepdim=True) * share).view(mask.shape)
    return grpo(rollouts) + alpha * terms


SGRPO_ALWAYS, SGRPO_UNTIL = 150, 341
"""Tokens that always count, and tokens after which none does, as S-GRPO's authors set them."""


def sgrpo(rollouts: Rollouts, alpha: float = 1.0, beta: float = 0.0) -> torch.Tensor:
    """S-GRPO (Lee and Tong): A_i at the first tokens, at some of those that follow, then nothing.

    Tokens before ``SGRPO_ALWAYS`` always count, those up to ``SGRPO_UNTIL`` with probability 1/2
    if the completion is shorter than that, none after.

    Args:
        rollouts: with ``rewards``.
        alpha: factor of both thresholds, which belong to completions of some hundred tokens.
        beta: not used.

    The coins are seeded with the tokens of the batch: a resumed run flips the same ones.
    """
    mask = rollouts.completion_mask
    always, until = round(alpha * SGRPO_ALWAYS), round(alpha * SGRPO_UNTIL)
    generator = torch.Generator().manual_seed(int(rollouts.completion_ids[mask].sum()))
    heads = (torch.rand(mask.shape, generator=generator) < 0.5).to(mask.device)
    t = torch.arange(mask.shape[1], device=mask.device)
    some = heads & (t < until) & (rollouts.lengths < until)[:, None]
    return grpo(rollouts) * ((t < always) | some)


def iapo(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    """IAPO: A_{i,t} = norm(r_i, r) + alpha * norm(s_{i,t}, s_i) + beta * norm(c_{i,t}, c_i).

    The first norm is over the group, the other two over the tokens of the one completion, padding
    left out (paper, Section 4). The method is called ``iapo`` where s is the drop of the answer
    entropy, ``iapo_ne`` (paper, Fig. 5) where it is that of the next token's, and ``iapo_pmi``
    (ours) where it is the pointwise information on the completion's own answer; which one the
    rollouts bring is decided by the recipe (``config.RECIPES``).

    Args:
        rollouts: with ``rewards``, ``correct`` and ``informativeness``.
        alpha: weight of the informativeness term, 0 or more.
        beta: weight of the exploration term, 0 or more.

    Returns:
        (B, L) fp32.
    """
    mask = rollouts.completion_mask
    token_terms = alpha * normalize(rollouts.informativeness, mask)
    token_terms = token_terms + beta * normalize(exploration(rollouts), mask)
    return grpo(rollouts) + token_terms


def iapo_ni(rollouts: Rollouts, alpha: float = 0.0, beta: float = 0.05) -> torch.Tensor:
    """IAPO without the informativeness term (paper, Fig. 5): alpha is taken as 0."""
    return grpo(rollouts) + beta * normalize(exploration(rollouts), rollouts.completion_mask)


Rule = Callable[[Rollouts, float, float], torch.Tensor]
"""(rollouts, alpha, beta) -> (B, L) fp32."""

ADVANTAGES: dict[str, Rule] = {
    "grpo": grpo,
    "dapo": dapo,
    "gfpo": gfpo,
    "gtpo": gtpo,
    "sgrpo": sgrpo,
    "iapo": iapo,
    "iapo_ni": iapo_ni,
}
"""Rules by name. Which method has which, and what else makes it that method, stands in
``config.RECIPES``; one of your own: docs/methods.md."""
