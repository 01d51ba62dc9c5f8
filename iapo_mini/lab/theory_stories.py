"""Corollary 4.2's premise and Theorem 4.1 on the embedded policy and the story world.

This is the part of :mod:`iapo_mini.lab.theory` that samples. The other parts enumerate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from iapo_mini.advantages import normalize
from iapo_mini.information import answer_entropies, informativeness
from iapo_mini.intervals import mean_interval
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem

Read = TypeVar("Read")


def within(values: torch.Tensor, group: int) -> torch.Tensor:
    """Values (B,) minus the mean over their group of completions; (B,) fp64."""
    values = values.double().view(-1, group)
    return (values - values.mean(1, keepdim=True)).flatten()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two centred (B,) vectors; 0 if one is constant."""
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))


def story_statistics(
    lengths: torch.Tensor, information: torch.Tensor, steps: torch.Tensor, group: int
) -> dict:
    """Informativeness per token by length within stories (Corollary 4.2's premise).

    Completions of harder stories are longer and more informative, so the mean of its story is
    subtracted from every number.

    Args:
        lengths: (B,) tokens; information: (B,) nats, sum_t s_t of each completion.
        steps: (B,) long, number of operations of the story.
        group: number of completions of a story, in adjacent rows.

    Returns:
        ``correlation``, ``covariance``, ``slope``, ``total``, ``spread``, ``by_steps`` and
        ``by_length`` as at the head of :mod:`iapo_mini.lab.theory`, as plain numbers.
    """
    lengths, information = lengths.double(), information.double()
    per_token = information / lengths
    x, y, z = (within(v, group) for v in (lengths, per_token, information))
    freedom = len(x) - len(x) // group
    mean = lengths.view(-1, group).mean(1).repeat_interleave(group)
    relative = (lengths / mean / 0.25).round() * 0.25
    return {
        "correlation": correlation(x, y),
        "covariance": float((x * y).sum()) / freedom,
        "slope": float((x * y).sum() / (x * x).sum().clamp(min=1e-300)),
        "total": correlation(x, z),
        "spread": math.sqrt(float(z.square().sum()) / freedom),
        "by_steps": {
            str(k): correlation(x[steps == k], y[steps == k]) for k in steps.unique().tolist()
        },
        "by_length": {
            f"{r:g}": float(per_token[relative == r].mean())
            for r in relative.unique().tolist()
            if (relative == r).sum() >= 5
        },
    }


def sampled(policy: Policy, problems: list[Problem], seed: int) -> Rollouts:
    """Sample eight completions per problem and estimate their informativeness."""
    rollouts = sample(policy, problems, seed=seed)
    entropies = answer_entropies(policy, rollouts)
    s = informativeness(entropies, rollouts.completion_mask)
    return rollouts.filled(informativeness=s)


def over_seeds(found: Sequence[dict]) -> dict:
    """Intervals over seeds of every number; keys that some seeds lack are left out."""
    out: dict = {}
    for name, value in found[0].items():
        if isinstance(value, dict):
            out[name] = over_seeds(
                [{k: f[name][k] for k in value if all(k in g[name] for g in found)} for f in found]
            )
        else:
            out[name] = mean_interval([f[name] for f in found])
    return out


def information_gradient(policy: Policy, rollouts: Rollouts) -> dict[str, torch.Tensor]:
    """Gradient of 1/B sum_i 1/|o_i| sum_t norm(s_it, s_i) log pi(o_it) by parameter name."""
    values = normalize(rollouts.informativeness, rollouts.completion_mask)
    values = values / rollouts.lengths[:, None] / len(values)
    parameters, group = policy.trainable(), rollouts.num_generations
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for start in range(0, len(values), 4 * group):  # in parts, to save memory
        part = rollouts.rows(start, start + 4 * group)
        logprobs, _ = token_logprobs(policy.model, part)
        weights = values[start : start + 4 * group, : logprobs.shape[1]]
        gradients = torch.autograd.grad((logprobs * weights).sum(), list(parameters.values()))
        for name, gradient in zip(parameters, gradients):
            total[name] += gradient
    return total


@torch.no_grad()
def at(
    policy: Policy, change: dict[str, torch.Tensor], size: float, read: Callable[[], Read]
) -> Read:
    """``read()`` while ``size * change`` is added to the policy's parameters."""
    before = {name: p.clone() for name, p in policy.trainable().items()}
    try:
        for name, p in policy.trainable().items():
            p.add_(change[name], alpha=size)
        return read()
    finally:
        for name, p in policy.trainable().items():
            p.copy_(before[name])


def policy_length_change(
    policy: Policy,
    direction: dict[str, torch.Tensor],
    problems: list[Problem],
    rollouts: Rollouts,
    seed: int,
    nats: float = 0.5,
) -> tuple[float, float]:
    """Theorem 4.1 on a language model: ``(measured, predicted)`` change of mean length, tokens.

    The predicted change is Cov(|o|, S(o)) within prompts, with S from a central difference of
    log p(o). The direction must come from *other* completions, because a completion's own part in
    the gradient would raise its S. The measured change is half the difference between a step
    forward and a step backward, in which terms quadratic in the step cancel.

    Args:
        policy: the policy, with every weight trainable; it is unchanged afterwards.
        direction: parameter name -> direction of the step.
        problems, rollouts: completions of the policy, whole groups in the order of the problems.
        seed: seed of the samples after the steps. Both steps use the same random numbers, so
            choices that the step does not change cancel.
        nats: size of the step: root mean square over completions of S(o) minus its prompt's mean.
    """
    group = rollouts.num_generations
    norm = math.sqrt(sum(float(g.square().sum()) for g in direction.values()))

    def logprobs() -> torch.Tensor:
        return token_logprobs(policy.for_inference(), rollouts)[0].double().sum(1)

    h = 0.003 / norm
    up, down = (at(policy, direction, x, logprobs) for x in (h, -h))
    score = within((up - down) / (2 * h), group)
    eta = nats / float(score.square().mean().sqrt())
    lengths = within(rollouts.lengths, group)
    predicted = eta * float((score * lengths).sum()) / (len(lengths) - len(lengths) // group)

    def mean_length() -> float:
        moved = sample(policy, problems, num_generations=group, seed=seed)
        return float(moved.lengths.double().mean())

    forth, back = (at(policy, direction, x, mean_length) for x in (eta, -eta))
    return (forth - back) / 2, predicted


def story_experiments(seeds: int, count: int, progress: bool = True) -> tuple[dict, dict]:
    """``corollary.stories`` and ``policy`` of ``theory.json``, on the embedded policy.

    Args:
        seeds: number of draws of stories and completions.
        count: test stories per seed, an even number, with eight completions each. One half of them
            gives the direction, and the other half is judged.
        progress: show a progress bar.
    """
    policy = load_policy(lora_rank=0)
    found, pairs, half, nats = [], [], count // 2, 0.5
    for seed in tqdm(range(seeds), desc="stories", unit="seed", disable=not progress):
        problems = list(itertools.islice(stories("test", seed=seed), count))
        first = sampled(policy, problems[:half], 2 * seed)
        second = sampled(policy, problems[half:], 2 * seed + 1)
        group = first.num_generations
        found.append(
            story_statistics(
                torch.cat([first.lengths, second.lengths]),
                torch.cat([r.informativeness.sum(1) for r in (first, second)]),
                torch.tensor([len(p.steps) for p in problems]).repeat_interleave(group),
                group,
            )
        )
        direction = information_gradient(policy, first)
        pairs.append(
            policy_length_change(policy, direction, problems[half:], second, 2 * seed + 1, nats)
        )
    measured, predicted = zip(*pairs)
    return over_seeds(found), {
        "nats": nats, "measured": mean_interval(measured), "predicted": mean_interval(predicted),
        "difference": mean_interval([m - p for m, p in pairs]),
    }  # fmt: skip
