"""What is logged of a step; what each number means: README.md, "What the metrics mean"."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from iapo_mini.problems.stories import ROLES, token_roles
from iapo_mini.rollouts import Rollouts
from iapo_mini.tasks import Problem


class Stopwatch:
    """Seconds of the parts of a step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to ``name``."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def step_metrics(
    rollouts: Rollouts, advantages: torch.Tensor, stats: Mapping[str, float], watch: Stopwatch
) -> dict[str, Any]:
    """One number for everything worth watching.

    Args:
        rollouts: scored.
        advantages: (B, L).
        stats: of the update: loss, entropy (nats), kl (nats), clip_ratio, grad_norm.
        watch: with a lap for sampling, information and update.
    """
    mask, s = rollouts.completion_mask, rollouts.known.get("informativeness")
    groups = rollouts.rewards.view(-1, rollouts.num_generations)
    return {
        "loss": stats["loss"],
        "reward": float(rollouts.rewards.mean()),
        "accuracy": float(rollouts.correct.float().mean()),
        "format": float((rollouts.rewards > -1).float().mean()),
        "length": float(rollouts.lengths.float().mean()),
        "truncated": float((~rollouts.finished).float().mean()),
        "entropy": stats["entropy"],
        "kl": stats["kl"],
        "clip_ratio": stats["clip_ratio"],
        "grad_norm": stats["grad_norm"],
        "zero_variance_groups": float((groups.std(1) < 1e-6).float().mean()),
        "informativeness": None if s is None else float(s[mask].mean()),
        "tokens_per_second": int(mask.sum()) / sum(watch.seconds.values()),
        **{f"seconds_{name}": seconds for name, seconds in watch.seconds.items()},
    }


def role_metrics(
    rollouts: Rollouts,
    advantages: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
) -> dict[str, float | None]:
    """Tokens per completion, mean advantage and mean s (nats) by role; nothing but for stories."""
    if not problems[0].steps:
        return {}
    mask, s = rollouts.completion_mask, rollouts.known.get("informativeness")
    metrics: dict[str, float | None] = {}
    sums = {role: [0, 0.0, 0.0] for role in ROLES}
    information = advantages * 0 if s is None else s
    rows = zip(rollouts.completion_ids, mask, advantages.tolist(), information.tolist())
    for ids, real, row_advantages, row_s in rows:
        roles = token_roles(tokenizer, ids[real].tolist())
        for role, a, s_t in zip(roles, row_advantages, row_s):
            if role in sums:
                sums[role] = [x + y for x, y in zip(sums[role], (1, a, s_t))]
    for role, (count, a, s_t) in sums.items():
        metrics[f"tokens/{role}"] = count / len(mask)
        metrics[f"advantage/{role}"] = a / count if count else None
        if s is not None:
            metrics[f"informativeness/{role}"] = s_t / count if count else None
    return metrics
