"""Scored rollouts with given numbers, and plain references of the advantages."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from helpers import make_rollouts
from hypothesis import strategies as st


def norm(population):
    """norm(x, v) of the paper for every x of v, with a sample deviation plus 1e-4."""
    if len(population) < 2 or min(population) == max(population):
        return [0.0] * len(population)
    mean, std = statistics.fmean(population), statistics.stdev(population)
    return [(x - mean) / (std + 1e-4) for x in population]


def plain_grpo(r):
    rows, group = [], r.num_generations
    rewards = r.rewards.tolist()
    for i in range(len(rewards)):
        first = i - i % group
        a = norm(rewards[first : first + group])[i - first]
        rows.append([a] * int(r.lengths[i]))
    return rows


def plain_iapo(r, alpha, beta):
    rows = []
    for i, base in enumerate(plain_grpo(r)):
        n = len(base)
        s = r.informativeness[i, :n].tolist()
        sign = 1 if r.correct[i] else -1
        c = [sign * math.exp(x) for x in r.old_logprobs[i, :n].tolist()]
        rows.append([a + alpha * u + beta * v for a, u, v in zip(base, norm(s), norm(c))])
    return rows


def check(found, rows):
    assert found.dtype == torch.float32
    for i, row in enumerate(rows):
        assert found[i, : len(row)].tolist() == pytest.approx(row, rel=1e-3, abs=1e-4)
        assert not found[i, len(row) :].any()


def scored(lengths, group, rewards, informativeness, old_probabilities, right=0, junk=0.0):
    """Rollouts with given numbers; padding of the per-token fields is filled with ``junk``."""
    r = make_rollouts([3] * (len(lengths) // group), lengths, group, right=right)
    old, s, h = torch.full((3, *r.completion_ids.shape), junk)
    for i, n in enumerate(lengths):
        old[i, :n] = torch.tensor(old_probabilities[i]).log()
        s[i, :n] = torch.tensor(informativeness[i])
        # The entropies are only compared with a reference that reads the same ones.
        h[i, :n] = torch.tensor(old_probabilities[i]).neg() + 1.0
    rewards = torch.tensor(rewards)
    r = r.filled(rewards=rewards, correct=rewards > 1, informativeness=s, token_entropies=h)
    return replace(r, old_logprobs=old)


@st.composite
def rollouts(draw):
    """Random groups of ragged lengths. Values lie on a grid, so spreads are 0 or clearly not 0."""
    group = draw(st.integers(2, 4))
    lengths = draw(st.lists(st.integers(1, 7), min_size=group, max_size=3 * group))
    lengths = lengths[: len(lengths) // group * group]
    rewards = [draw(st.sampled_from([-1.5, -0.5, 1.5])) for _ in lengths]
    information = [[draw(st.integers(-40, 40)) / 10 for _ in range(n)] for n in lengths]
    probabilities = [[draw(st.integers(1, 50)) / 50 for _ in range(n)] for n in lengths]
    right, junk = draw(st.integers(0, 3)), draw(st.sampled_from([0.0, 5.0]))
    return scored(lengths, group, rewards, information, probabilities, right, junk)


def example(**changes):
    fields = dict(
        lengths=[3, 2, 4, 1],
        group=2,
        rewards=[1.5, -0.5, -1.5, 1.5],
        informativeness=[[1.0, 0.0, -0.5], [0.2, 0.4], [0.0, 0.0, 0.0, 2.0], [0.7]],
        old_probabilities=[[0.9, 0.1, 0.5], [0.2, 0.8], [0.5, 0.25, 0.5, 1.0], [0.3]],
    )
    return scored(**{**fields, **changes})
