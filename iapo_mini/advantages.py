"""Token advantages: one pure function for each method, ``(Rollouts, ...) -> (B, L)``.

The paper's A_{i,t} is ``advantages[i, t]``. Padding is always 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from iapo_mini.rollouts import Rollouts

EPS = 1e-4
"""Added to a standard deviation before dividing by it, as in the paper's released code and TRL."""


def normalize(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """norm(x, v) = (x - mean v) / std v along the last dimension (paper, Section 4).

    Args:
        values: (..., N) float.
        mask: (..., N) bool, the entries that count; None means all. The others get 0.

    Returns:
        (..., N) fp32. The standard deviation is that of a sample (n - 1), plus ``EPS``, as in TRL.
        Fewer than two entries, or entries without variance, give zeros and not NaN.
    """
    values = values.float()
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    count = mask.sum(-1, keepdim=True)
    mean = (values * mask).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = (values - mean) * mask
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # Rounding gives equal values a deviation of about 1e-7 of their size.
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
    """DAPO: A_i of the reward minus the soft over-long punishment (arXiv 2503.14476, Eq. 13).

    The rest of DAPO is settings (``recipes.RECIPES``): the mean of the loss over all tokens of the
    batch, a clip range of 0.2 below and 0.28 above, no KL, and dynamic sampling. alpha and beta are
    not used.
    """
    return grpo(_repaid(rollouts, overlong_punishment(rollouts)))


OVERLONG_SHARE = 0.2
"""Share of the length limit over which DAPO's punishment grows: 4,096 of 20,480 tokens in DAPO."""


def overlong_punishment(rollouts: Rollouts) -> torch.Tensor:
    """DAPO's punishment of long completions: from 0 down to -1 at the length limit; (B,) fp32.

    It falls linearly from ``1 - OVERLONG_SHARE`` of ``rollouts.limit`` on, so a completion that was
    cut gets -1. If no limit is known, it is 0.
    """
    if not rollouts.limit:
        return torch.zeros(len(rollouts.lengths), device=rollouts.lengths.device)
    buffer = OVERLONG_SHARE * rollouts.limit
    over = (rollouts.lengths - (rollouts.limit - buffer)) / buffer
    return -over.clamp(0, 1)


def _repaid(rollouts: Rollouts, change: torch.Tensor) -> Rollouts:
    """Rollouts with ``change`` (B,) added to their rewards."""
    return rollouts.filled(rewards=rollouts.rewards + change)


def kimi_length(rollouts: Rollouts) -> torch.Tensor:
    """Length reward of Kimi k1.5, -0.5 to 0.5; (B,) fp32 (arXiv 2501.12599, Section 2.3.3).

    lambda_i = 0.5 - (|o_i| - min) / (max - min) over the group's lengths. A right completion gets
    lambda_i, and a wrong one min(0, lambda_i). If all lengths of a group are equal, its completions
    get 0.
    """
    lengths = rollouts.lengths.view(-1, rollouts.num_generations).float()
    shortest, longest = lengths.amin(1, keepdim=True), lengths.amax(1, keepdim=True)
    value = 0.5 - (lengths - shortest) / (longest - shortest).clamp(min=1)
    value = torch.where(longest > shortest, value, 0.0).flatten()
    return torch.where(rollouts.correct, value, value.clamp(max=0))


def efficient_length(rollouts: Rollouts) -> torch.Tensor:
    """Length penalty of Arora and Zanette, -1 to 0; (B,) fp32 (arXiv 2502.04463, Eq. 2 and 3).

    A right completion gets -sigmoid((|o_i| - mean) / std). Mean and standard deviation are those of
    the lengths of the right completions in its group. Wrong completions get 0.
    """
    group = rollouts.num_generations
    lengths = rollouts.lengths.view(-1, group)
    z = normalize(lengths, rollouts.correct.view(-1, group)).flatten()
    return torch.where(rollouts.correct, -torch.sigmoid(z), 0.0)


LENGTH_PENALTIES = {"kimi": kimi_length, "efficient": efficient_length}
"""Terms of the reward that make long completions earn less, by name."""


def length_penalised(rollouts: Rollouts, form: str, weight: float) -> Rollouts:
    """Rollouts whose rewards have a term for the length, for any rule that uses rewards.

    Args:
        rollouts: with ``rewards`` and ``correct``.
        form: a key of ``LENGTH_PENALTIES``.
        weight: factor of the term; a right completion's reward without it is 1.5.
    """
    return _repaid(rollouts, weight * LENGTH_PENALTIES[form](rollouts))


def grpo_kimi(rollouts: Rollouts, alpha: float, beta: float = 0.0) -> torch.Tensor:
    """GRPO with alpha times :func:`kimi_length` in the reward; beta is not used."""
    return grpo(length_penalised(rollouts, "kimi", alpha))


def grpo_efficient(rollouts: Rollouts, alpha: float, beta: float = 0.0) -> torch.Tensor:
    """GRPO with alpha times :func:`efficient_length` in the reward; beta is not used."""
    return grpo(length_penalised(rollouts, "efficient", alpha))


def gfpo(rollouts: Rollouts, alpha: float = 0.75, beta: float = 0.0) -> torch.Tensor:
    """GFPO: only the shortest completions of each group count, with rewards normalised among them.

    Args:
        rollouts: with ``rewards``.
        alpha: share of the group that is kept: 0.75 keeps 6 of 8, and 1/3 keeps 8 of 24 (arXiv
            2508.09726). If lengths are equal, the earlier completion is kept.
        beta: not used.
    """
    kept = gfpo_tokens(rollouts, alpha)
    chosen = kept[:, 0].view(-1, rollouts.num_generations)
    base = normalize(rollouts.rewards.view(chosen.shape), chosen).flatten()
    return base[:, None] * kept


def gfpo_tokens(rollouts: Rollouts, alpha: float) -> torch.Tensor:
    """(B, L) bool: tokens of the completions that GFPO keeps. Others are not in its loss."""
    group = rollouts.num_generations
    rank = rollouts.lengths.view(-1, group).argsort(dim=1, stable=True).argsort(dim=1)
    kept = rank < max(1, math.ceil(alpha * group - 1e-6))
    return kept.flatten()[:, None] & rollouts.completion_mask


def entropy_shares(rollouts: Rollouts) -> torch.Tensor:
    """GTPO's weights of tokens: d_t times a token's share of the entropy at its position; (B, L).

    In a right completion the share is H_{i,t} / sum_k H_{k,t}. In a wrong completion it uses the
    inverse of the entropy, (1 / H_{i,t}) / sum_k (1 / H_{k,t}). The sums run over the right (or
    wrong) completions k of the group that have a token at position t, and d_t is the number of
    these completions. So the mean of the weights at a position is 1. Padding is 0.

    Args:
        rollouts: with ``correct`` and ``token_entropies`` (nats; raised to at least ``EPS``, so a
            certain token does not dominate the sum of inverses).
    """
    group, mask = rollouts.num_generations, rollouts.completion_mask
    h = rollouts.token_entropies.float().clamp(min=EPS)
    out = torch.zeros(mask.shape, device=mask.device)
    for chosen, values in ((rollouts.correct, h), (~rollouts.correct, 1 / h)):
        running = (mask & chosen[:, None]).view(-1, group, mask.shape[1])
        values = values.view(running.shape) * running
        share = values / values.sum(1, keepdim=True).clamp(min=1e-30)
        out += (running.sum(1, keepdim=True) * share).view(mask.shape)
    return out


def gtpo(rollouts: Rollouts, alpha: float = 0.1, beta: float = 0.0) -> torch.Tensor:
    """GTPO as published: the reward of a token is shaped by its entropy (arXiv 2508.04349).

    A token of a right completion has the reward (1 - alpha) + alpha * w, and a token of a wrong
    completion has minus that, where w is :func:`entropy_shares`. The tokens of the right
    completions of a group are normalised separately from those of the wrong ones. So the
    right completions as a whole get 0 on average, and the policy only learns which of their tokens
    to prefer.

    Args:
        rollouts: with ``correct`` and ``token_entropies``.
        alpha: weight of the entropy; GTPO uses 0.1.
        beta: not used.
    """
    group, mask = rollouts.num_generations, rollouts.completion_mask
    shaped = (1 - alpha) + alpha * entropy_shares(rollouts)
    out = torch.zeros(mask.shape, device=mask.device)
    for sign, chosen in ((1, rollouts.correct), (-1, ~rollouts.correct)):
        tokens = (mask & chosen[:, None]).view(len(mask) // group, -1)
        out += normalize(sign * shaped.view(tokens.shape), tokens).view(mask.shape)
    return out


def gtpo_iapo(rollouts: Rollouts, alpha: float = 0.1, beta: float = 0.0) -> torch.Tensor:
    """GTPO as the baseline of the IAPO paper: A_i + alpha * w if right, A_i - alpha * w if wrong.

    w is :func:`entropy_shares` (paper, "Baselines"; released code, ``gtpo_trainer.py``).
    """
    sign = torch.where(rollouts.correct, 1.0, -1.0)[:, None]
    return grpo(rollouts) + alpha * sign * entropy_shares(rollouts)


SGRPO_ALWAYS, SGRPO_UNTIL = 150, 341
"""Position before which all tokens count, and position from which none counts, as in S-GRPO."""


def sgrpo(rollouts: Rollouts, alpha: float = 1.0, beta: float = 0.0) -> torch.Tensor:
    """S-GRPO (Lee and Tong): A_i at the tokens of :func:`sgrpo_tokens`; beta is not used."""
    return grpo(rollouts) * sgrpo_tokens(rollouts, alpha)


def sgrpo_tokens(rollouts: Rollouts, alpha: float) -> torch.Tensor:
    """(B, L) bool: the tokens that S-GRPO counts. Others are in no sum of its loss.

    Tokens before ``SGRPO_ALWAYS`` always count. Tokens from there to ``SGRPO_UNTIL`` count with
    probability 1/2 if the completion is shorter than ``SGRPO_UNTIL``. Later tokens do not count
    (arXiv 2504.20834; the released code of IAPO, ``s_grpo_lee_trainer.py``).

    Args:
        rollouts: any rollouts.
        alpha: factor of both thresholds, which were set for completions of a few hundred tokens.

    The random choice is seeded with :meth:`Rollouts.seed`, so a resumed run makes the same one.
    """
    mask = rollouts.completion_mask
    always, until = round(alpha * SGRPO_ALWAYS), round(alpha * SGRPO_UNTIL)
    generator = torch.Generator().manual_seed(rollouts.seed())
    heads = (torch.rand(mask.shape, generator=generator) < 0.5).to(mask.device)
    t = torch.arange(mask.shape[1], device=mask.device)
    some = heads & (t < until) & (rollouts.lengths < until)[:, None]
    return mask & ((t < always) | some)


def iapo(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    """IAPO: A_{i,t} = norm(r_i, r) + alpha * norm(s_{i,t}, s_i) + beta * norm(c_{i,t}, c_i).

    The first norm is over the group, the other two over the tokens of the completion without
    padding (paper, Section 4). The recipe (``recipes.RECIPES``) decides which s the rollouts have:

    * ``iapo``: the drop of the answer entropy;
    * ``iapo_ne`` (paper, Fig. 5): the drop of the next-token entropy;
    * ``iapo_pmi`` (ours): the pointwise information on the completion's own answer.

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
    """IAPO without the informativeness term (paper, Fig. 5); alpha is not used."""
    return grpo(rollouts) + beta * normalize(exploration(rollouts), rollouts.completion_mask)


Rule = Callable[[Rollouts, float, float], torch.Tensor]
"""(rollouts, alpha, beta) -> (B, L) fp32."""

ADVANTAGES: dict[str, Rule] = {
    "grpo": grpo,
    "dapo": dapo,
    "gfpo": gfpo,
    "gtpo": gtpo,
    "gtpo_iapo": gtpo_iapo,
    "sgrpo": sgrpo,
    "iapo": iapo,
    "iapo_ni": iapo_ni,
    "grpo_kimi": grpo_kimi,
    "grpo_efficient": grpo_efficient,
}
"""Rules by name. ``recipes.RECIPES`` says which rule and which settings make up each method, and
docs/methods.md says how to add a method."""

COUNTED: dict[str, Callable[[Rollouts, float], torch.Tensor]] = {
    "gfpo": gfpo_tokens,
    "sgrpo": sgrpo_tokens,
}
"""Functions that choose the tokens in the loss, ``(rollouts, alpha) -> (B, L) bool``. A token that
is left out is in no denominator, but a token with advantage 0 is."""
