"""Pass@k, Length@k and Ratio@k = Pass@k / Length@k (paper, Section 5), with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from iapo_mini.policy import Policy
from iapo_mini.rewards import score
from iapo_mini.rollouts import sample
from iapo_mini.tasks import Problem

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased Pass@k of one problem: 1 - C(n - c, k) / C(n, k).

    Args:
        n: completions sampled; c: how many of them are correct; k: at most n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; allowed are 1 to n = {n}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% t-interval over seeds: ``(mean, low, high)``.

    With a single value the interval is not known and both ends are NaN.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    df = len(values) - 1
    t = _T95[df - 1] if df <= len(_T95) else 1.960 + 2.5 / df
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    num_generations: int = 8,
    max_completion_length: int = 224,
    temperature: float = 1.0,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Sample completions for every problem and report the paper's three metrics.

    Args:
        policy: the policy to judge.
        problems: at least one problem.
        ks: values of k, each at most ``num_generations``.
        num_generations: completions per problem.
        max_completion_length: tokens at which a completion is cut.
        temperature: sampling temperature.
        batch_size: completions sampled at once.
        seed: sampling seed.
        progress: show a progress bar.

    Returns:
        ``{"pass@k", "length@k", "ratio@k" for each k, "length" (mean tokens of all completions),
        "problems", "intervals": {metric: [low, high]}, "completions": [{"problem", "text",
        "correct", "tokens"}, ...]}``. Pass@k is the unbiased estimator; Length@k is the mean length
        of the first k; Ratio@k is per token. Intervals are 95%, by bootstrap over the problems.

    Raises:
        ValueError: for an empty problem list or a k outside 1..num_generations.
    """
    if not problems:
        raise ValueError("problems is empty; at least one problem is needed to evaluate.")
    for k in ks:
        if not 1 <= k <= num_generations:
            raise ValueError(f"k is {k}; allowed are 1 to num_generations = {num_generations}.")
    completions = []
    size = max(1, batch_size // num_generations)
    for start in tqdm(range(0, len(problems), size), desc="evaluate", disable=not progress):
        part = list(problems[start : start + size])
        rollouts = sample(
            policy, part,
            num_generations=num_generations,
            max_completion_length=max_completion_length,
            temperature=temperature,
            seed=seed * 1_000_003 + start,
        )  # fmt: skip
        rollouts = score(rollouts, policy.tokenizer, part)
        texts, lengths = rollouts.texts(policy.tokenizer), rollouts.lengths.tolist()
        for i, text in enumerate(texts):
            completions.append(
                {
                    "problem": start + i // num_generations,
                    "text": text,
                    "correct": bool(rollouts.correct[i]),
                    "tokens": lengths[i],
                }
            )
    right = torch.tensor([c["correct"] for c in completions]).view(len(problems), -1)
    tokens = torch.tensor([c["tokens"] for c in completions], dtype=torch.float64)
    tokens = tokens.view(len(problems), -1)
    # One bootstrap of the problems serves all metrics, so their intervals belong together.
    generator = torch.Generator().manual_seed(0)
    resample = torch.randint(len(problems), (1000, len(problems)), generator=generator)
    result: dict = {"problems": len(problems), "intervals": {}}

    def report(name: str, top: torch.Tensor, bottom: torch.Tensor | None = None) -> None:
        bottom = torch.ones_like(top) if bottom is None else bottom
        result[name] = float(top.mean() / bottom.mean())
        draws = top[resample].mean(1) / bottom[resample].mean(1)
        quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
        result["intervals"][name] = torch.quantile(draws, quantiles).tolist()

    report("length", tokens.mean(1))
    for k in ks:
        passed = torch.tensor(
            [pass_at_k(num_generations, int(c), k) for c in right.sum(1)], dtype=torch.float64
        )
        length = tokens[:, :k].mean(1)
        report(f"pass@{k}", passed)
        report(f"length@{k}", length)
        report(f"ratio@{k}", passed, length)
    result["completions"] = completions
    return result
