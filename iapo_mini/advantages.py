"""Token advantages: one pure function for each method, ``(Rollouts, ...) -> (B, L)``.

A_{i,t} of the paper is ``advantages[i, t]``. Padding is 0 everywhere.
"""

from __future__ import annotations

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


def iapo(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    """IAPO: A_{i,t} = norm(r_i, r) + alpha * norm(s_{i,t}, s_i) + beta * norm(c_{i,t}, c_i).

    The first norm is over the group, the other two over the tokens of the one completion, padding
    left out (paper, Section 4).

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


ADVANTAGES = {"grpo": grpo, "iapo": iapo}
"""Method name -> advantage function; all take ``(rollouts, alpha, beta)``."""

NEEDS_INFORMATION = frozenset({"iapo"})
"""Methods that read ``rollouts.informativeness``; for the others it is never estimated."""
