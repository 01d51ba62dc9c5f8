"""The clipped surrogate with a KL term (paper, "GRPO"), on per-token advantages."""

from __future__ import annotations

import torch

AGGREGATIONS = ("sequence", "token")


def aggregate(values: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """Mean of per-token values, scalar.

    Args:
        values: (B, L); mask: (B, L) bool.
        how: ``"sequence"`` for 1/B sum_i 1/|o_i| sum_t (GRPO; TRL's ``loss_type="grpo"``), or
            ``"token"`` for the mean over all tokens of the batch (DAPO; TRL's ``"bnpo"``).
    """
    if how == "sequence":
        return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    if how == "token":
        return (values * mask).sum() / mask.sum().clamp(min=1)
    raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {how!r}")


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Per-token KL(pi || pi_ref) >= 0 in nats: exp(d) - d - 1 with d = log pi_ref - log pi."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def clipped_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), to be maximised.

    Args:
        logprobs, old_logprobs: (B, L) nats; rho = exp(logprobs - old_logprobs).
        advantages: (B, L), without gradient.
        epsilon, epsilon_high: clip range below and above 1; ``epsilon_high`` defaults to
            ``epsilon``.

    Returns:
        ``(surrogate, clipped)``: (B, L) values, and (B, L) bool, where clipping lowers the value.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = (logprobs - old_logprobs).exp()
    plain = ratio * advantages
    cut = ratio.clamp(1 - epsilon, 1 + high) * advantages
    return torch.minimum(plain, cut), cut < plain


def truncated_weights(
    old_logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, cap: float
) -> torch.Tensor:
    """Weights min(pi_old / pi_sampled, cap) of tokens that another engine has drawn, (B, L).

    An engine for sampling computes the same policy with other rounding, so its tokens come from a
    slightly different distribution. Importance weights correct for that, and the cap bounds their
    variance (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training", fengyao.notion.site/off-policy-rl; TRL's ``"token_truncate"``).

    Args:
        old_logprobs, sampled_logprobs: (B, L) nats, without gradient: by the trained model and by
            the engine.
        cap: largest weight.
    """
    return (old_logprobs - sampled_logprobs).exp().clamp(max=cap)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    ref_logprobs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    aggregation: str = "sequence",
) -> tuple[torch.Tensor, dict[str, float]]:
    """-J(theta) = -(clipped surrogate - kl_coef * KL(pi || pi_ref)), aggregated.

    Args:
        logprobs, old_logprobs, advantages: (B, L); mask: (B, L) bool.
        ref_logprobs: (B, L) of the reference policy, needed when ``kl_coef`` > 0.
        weights: (B, L) of :func:`truncated_weights`; they multiply the surrogate, not the KL term.

    Returns:
        ``(loss, {"clip_ratio": share of tokens, "kl": nats per token})``.
    """
    surrogate, clipped = clipped_surrogate(
        logprobs, old_logprobs, advantages, epsilon, epsilon_high
    )
    if weights is not None:
        surrogate = surrogate * weights
    loss = -aggregate(surrogate, mask, aggregation)
    stats = {"clip_ratio": float(aggregate(clipped.float(), mask, "token")), "kl": 0.0}
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, ref_logprobs)
        loss = loss + kl_coef * aggregate(kl, mask, aggregation)
        stats["kl"] = float(aggregate(kl.detach(), mask, "token"))
    return loss, stats
