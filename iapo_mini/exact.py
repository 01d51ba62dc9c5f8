"""Worlds small enough to enumerate: conditional mutual information in closed form.

Two kinds, both without a neural net, that the estimators of :mod:`iapo_mini.information` are held
against:

* :class:`World`: a tabular policy over strings of T symbols with an answer for each string. Every
  quantity of the paper's Section 4 is a sum over a tensor.
* the story world, where the posterior of the answer given the operations that a chain has not
  worked out yet follows from the generator's rules (:func:`answer_posterior`, :func:`true_drops`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from iapo_mini.tasks import MAX_VALUE, Problem, Segment, apply, operands


@dataclass(frozen=True)
class World:
    """The joint distribution of a completion and its answer.

    Attributes:
        joint: (V, ..., V, Y) fp64, T axes of V symbols and one of Y answers: p(o_1, ..., o_T, y)
            for one question q. Non-negative, sums to 1.
    """

    joint: torch.Tensor

    def __post_init__(self) -> None:
        total = float(self.joint.sum())
        if self.joint.ndim < 2 or self.joint.min() < 0 or abs(total - 1) > 1e-9:
            raise ValueError(
                f"joint has {self.joint.ndim} axes, least entry {float(self.joint.min()):g} and "
                f"sum {total:g}; allowed are at least 2 axes, entries from 0, sum 1."
            )

    @property
    def length(self) -> int:
        """T, symbols of a string."""
        return self.joint.ndim - 1

    def prefix(self, t: int) -> torch.Tensor:
        """p(o_<=t), shape (V,) * t."""
        axes = tuple(range(t, self.joint.ndim))
        return self.joint.sum(axes)

    def belief(self, t: int) -> torch.Tensor:
        """p(y | o_<=t), shape (V,) * t + (Y,); prefixes that never occur get the uniform one."""
        axes = tuple(range(t, self.length))
        p = self.joint.sum(axes) if axes else self.joint
        total = p.sum(-1, keepdim=True)
        return torch.where(total > 0, p / total.clamp(min=1e-300), 1 / p.shape[-1])


def random_world(
    symbols: int = 3, length: int = 4, answers: int = 3, *, noise: float = 0.0, seed: int = 0
) -> World:
    """A random tabular policy and a random answer map.

    Args:
        symbols: V; length: T; answers: Y.
        noise: probability that the answer is drawn uniformly instead of read off the string.
        seed: equal seeds give equal worlds.
    """
    generator = torch.Generator().manual_seed(seed)
    p = torch.ones((), dtype=torch.float64)
    for t in range(1, length + 1):  # p(o_<=t) = p(o_<t) pi(o_t | o_<t)
        scores = 1.5 * torch.randn((symbols,) * t, generator=generator, dtype=torch.float64)
        p = p[..., None] * scores.softmax(-1)
    answer = torch.randint(answers, p.shape, generator=generator)
    read_off = torch.nn.functional.one_hot(answer, answers).double()
    return World(p[..., None] * ((1 - noise) * read_off + noise / answers))


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats over the last axis of probabilities; 0 log 0 = 0."""
    return -torch.special.xlogy(p, p).sum(-1)


def mutual_information(world: World) -> float:
    """I(y; o_1, ..., o_T), nats."""
    return float(
        entropy(world.belief(0))
        - (world.prefix(world.length) * entropy(world.belief(world.length))).sum()
    )


def conditional_mi(world: World, t: int) -> float:
    """I(y; o_t | o_<t), nats, t from 1 to T: the paper's informativeness, in expectation."""
    return float((world.prefix(t - 1) * conditional_mi_at(world, t)).sum())


def conditional_mi_at(world: World, t: int) -> torch.Tensor:
    """I(y; o_t | o_<t = prefix) for every prefix, shape (V,) * (t - 1), nats.

    Written as the sum over o_t and y of p log(p(y, o_t | prefix) / p(y | prefix) p(o_t | prefix)),
    not as a difference of entropies, so that the estimators have something to be compared with.
    """
    axes = tuple(range(t, world.length))
    p = world.joint.sum(axes) if axes else world.joint  # p(o_<=t, y)
    total = p.sum((-2, -1), keepdim=True)
    p = torch.where(total > 0, p / total.clamp(min=1e-300), 0.0)  # p(o_t, y | o_<t)
    independent = p.sum(-1, keepdim=True) * p.sum(-2, keepdim=True)
    ratio = torch.where(p > 0, p / independent.clamp(min=1e-300), 1.0)
    return (p * ratio.log()).sum((-2, -1))


def entropy_drop(world: World, t: int) -> torch.Tensor:
    """Realised drop H(y | o_<t) - H(y | o_<=t) at every prefix of t symbols, (V,) * t, nats."""
    return entropy(world.belief(t - 1))[..., None] - entropy(world.belief(t))


def pointwise(world: World, t: int) -> torch.Tensor:
    """log p(y | o_<=t) - log p(y | o_<t) for every prefix and answer, (V,) * t + (Y,), nats."""
    return world.belief(t).log() - world.belief(t - 1).log()[..., None, :]


@functools.cache
def answer_posterior(unread: int) -> torch.Tensor:
    """p(answer | value now, number of operations not worked out yet) in the story world.

    What a reader knows who has followed a chain to a value and does not know what comes next, by
    the generator's rules: the operation is uniform over those allowed, its operand over those
    allowed for it.

    Args:
        unread: operations left, from 0.

    Returns:
        (MAX_VALUE + 1, MAX_VALUE + 1) fp64; row v is the distribution from value v.
    """
    if unread == 0:
        return torch.eye(MAX_VALUE + 1, dtype=torch.float64)
    step = torch.zeros(MAX_VALUE + 1, MAX_VALUE + 1, dtype=torch.float64)
    step[0, 0] = 1.0  # never reached
    for value in range(1, MAX_VALUE + 1):
        allowed = operands(value)
        for op, numbers in allowed.items():
            for n in numbers:
                step[value, apply(value, op, n)] += 1 / len(allowed) / len(numbers)
    return step @ answer_posterior(unread - 1)


def true_drops(problem: Problem, segments: Sequence[Segment]) -> list[float]:
    """Drop of the posterior entropy of the answer at each segment of a chain, nats.

    The j-th computing segment works out the j-th operation: the entropy falls from that with its
    operation unread to that with its result known. Every other segment tells nothing new.

    Args:
        problem: a story.
        segments: the chain that the world wrote for it (``tasks.chain_of_thought``).

    Raises:
        ValueError: when the chain does not have one computing segment for each operation.
    """
    steps, out, done = problem.steps, [], 0
    if sum(s.role == "compute" for s in segments) != len(steps):
        raise ValueError("segments has not one computing segment for each of the story's steps.")
    for segment in segments:
        if segment.role != "compute":
            out.append(0.0)
            continue
        step, left = steps[done], len(steps) - done
        before = entropy(answer_posterior(left)[step.before])
        after = entropy(answer_posterior(left - 1)[step.result])
        out.append(float(before - after))
        done += 1
    return out
