"""The metrics of a training step, and reading and writing a run's log.

docs/metrics.md says what each number means.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iapo_mini.files import replace_text
from iapo_mini.problems.stories import ROLES, token_roles
from iapo_mini.rollouts import Rollouts
from iapo_mini.tasks import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = "metrics.jsonl"
"""Name of a run's log, which has a line of JSON for each step, from step 1 on."""


class Stopwatch:
    """Measures the seconds of the parts of a step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Record the time since the last lap under ``name``."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def step_metrics(
    rollouts: Rollouts, advantages: torch.Tensor, stats: Mapping[str, float], watch: Stopwatch
) -> dict[str, Any]:
    """The metrics of one step, for problems of every kind.

    Args:
        rollouts: scored rollouts.
        advantages: (B, L).
        stats: numbers of the update: loss, entropy (nats), kl (nats), clip_ratio, grad_norm.
        watch: with a lap for sampling, information and update.
    """
    mask, s = rollouts.completion_mask, rollouts.known.get("informativeness")
    groups = rollouts.rewards.view(-1, rollouts.num_generations)
    drawn = rollouts.known.get("sampled_logprobs")
    # A reward is correctness (+1 or -1) and format (+0.5 or -0.5).
    correctness = torch.where(rollouts.correct, 1.0, -1.0)
    return {
        "loss": stats["loss"],
        "reward": float(rollouts.rewards.mean()),
        "accuracy": float(rollouts.correct.float().mean()),
        "format": float((rollouts.rewards > correctness).float().mean()),
        "length": float(rollouts.lengths.float().mean()),
        "truncated": float((~rollouts.finished).float().mean()),
        "entropy": stats["entropy"],
        "kl": stats["kl"],
        "clip_ratio": stats["clip_ratio"],
        "grad_norm": stats["grad_norm"],
        "zero_variance_groups": float((groups.std(1) < 1e-6).float().mean()),
        "informativeness": None if s is None else float(s[mask].mean()),
        **({} if drawn is None else _mismatch((rollouts.old_logprobs - drawn)[mask].exp())),
        "tokens_per_second": int(mask.sum()) / sum(watch.seconds.values()),
        **{f"seconds_{name}": seconds for name, seconds in watch.seconds.items()},
    }


def _mismatch(ratio: torch.Tensor) -> dict[str, float]:
    """How far the policy of another engine is from ours; pi_old / pi_sampled of all tokens, (N,).

    The mean is near 1, since the expectation of the ratio under the engine's policy is 1.
    """
    return {
        "sampler_ratio": float(ratio.mean()),
        "sampler_ratio_max": float(ratio.max()),
        "sampler_ratio_above_2": float((ratio > 2).float().mean()),
    }


def role_metrics(
    rollouts: Rollouts,
    advantages: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
) -> dict[str, float | None]:
    """Tokens per completion, mean advantage and mean s (nats) by role; empty if not stories."""
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


def row_of(line: str | bytes) -> dict | None:
    """The metrics in a line of a log, or None if the line is not whole, as after a kill."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def logged(log: Path) -> list[tuple[str, dict]]:
    """Lines of a run's log with their metrics; a line that a kill cut short is skipped."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return [(line, row) for line in text.splitlines() if (row := row_of(line)) is not None]


def trim_log(log: Path, done: int) -> None:
    """Drop the metrics of steps that will be repeated, and a line that a kill cut short."""
    kept, before = [], 0
    for line, row in logged(log):
        if before < row["step"] <= done:
            kept.append(line + "\n")
            before = row["step"]
    replace_text(log, "".join(kept))


def _lines(log: Path) -> list[bytes]:
    return log.read_bytes().splitlines() if log.is_file() else []


def _sum(lines: list[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def sum_of_log(log: Path, steps: int) -> str:
    """SHA-256 of the first ``steps`` lines of a run's log."""
    return _sum(_lines(log)[:steps])


def whole_log(log: Path, steps: int, checksum: str | None = None) -> list[dict]:
    """Metrics of steps 1 to ``steps``, in order.

    Args:
        checksum: checksum of these lines when they were written, if known.

    Raises:
        ValueError: naming the first damaged line.
    """
    lines, rows = _lines(log), []
    for number in range(1, steps + 1):
        row = row_of(lines[number - 1]) if number <= len(lines) else None
        if row is None or row["step"] != number:
            raise ValueError(f"'{log}' is damaged: line {number} does not hold step {number}")
        rows.append(row)
    if checksum is not None and _sum(lines[:steps]) != checksum:
        raise ValueError(f"'{log}' is damaged: a number in lines 1 to {steps} has changed")
    return rows
