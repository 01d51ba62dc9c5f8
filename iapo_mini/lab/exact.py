"""Worlds small enough to enumerate: conditional mutual information in closed form.

There are three kinds, all without a neural network. The estimators of :mod:`iapo_mini.information`
and the paper's theory (:mod:`iapo_mini.lab.theory`) are compared with them:

* :class:`World`: a tabular policy over strings of T symbols with an answer for each string. Every
  quantity of the paper's Section 4 is a sum over a tensor.
* :class:`Strings`: completions of different lengths under a tabular softmax policy, where an update
  changes the expected length. Every function takes leading dimensions, for many worlds at once, and
  gradients are written out.
* the story world, where the generator's rules give the posterior of the answer for the operations
  that a chain has not computed yet (:func:`answer_posterior`, :func:`true_drops`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from iapo_mini.errors import shown
from iapo_mini.problems.stories import MAX_VALUE, Segment, apply, operands
from iapo_mini.tasks import Problem


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
                "joint must have at least 2 axes, entries from 0 and sum 1, got "
                f"{self.joint.ndim} axes, least entry {float(self.joint.min()):g}, sum {total:g}"
            )

    @property
    def length(self) -> int:
        """T, the number of symbols of a string."""
        return self.joint.ndim - 1

    def prefix(self, t: int) -> torch.Tensor:
        """p(o_<=t), shape (V,) * t."""
        axes = tuple(range(t, self.joint.ndim))
        return self.joint.sum(axes)

    def belief(self, t: int) -> torch.Tensor:
        """p(y | o_<=t), shape (V,) * t + (Y,); uniform for prefixes that never occur."""
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
        noise: probability that the answer is drawn uniformly instead of given by the string.
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

    Computed as the sum over o_t and y of p log(p(y, o_t | prefix) / p(y | prefix) p(o_t | prefix)).
    The estimators use a difference of entropies, so this is an independent check.
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


@dataclass(frozen=True)
class Strings:
    """All completions that a world allows, each as a path through its prefixes.

    There are N prefixes, S completions of at most L tokens, and V symbols. The end-of-sequence
    token is V and counts as a token (as in ``Rollouts.lengths``).

    Attributes:
        prefixes: (S, L) long, the prefix after which each token is chosen; padding 0.
        tokens: (S, L) long, the chosen tokens; padding V.
        mask: (S, L) bool, right-padded.
        allowed: (N, V + 1) bool, whether some completion has the token after the prefix.
        passes: (S, N) bool, whether the completion begins with the prefix.
    """

    prefixes: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    allowed: torch.Tensor
    passes: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """|o|, (S,) fp64 tokens."""
        return self.mask.sum(1).double()

    @property
    def after(self) -> torch.Tensor:
        """(S, L) long: the prefix that a token leads to; arbitrary after end-of-sequence."""
        return torch.nn.functional.pad(self.prefixes[:, 1:], (0, 1))


def strings_of(completions: Sequence[tuple[int, ...]], symbols: int) -> Strings:
    """Make the world with these completions, each followed by the end-of-sequence token.

    Args:
        completions: different tuples of symbols, without the end-of-sequence token.
        symbols: V.

    Raises:
        ValueError: for no completions, equal completions, or a symbol outside 0..V-1.
    """
    used = {symbol for completion in completions for symbol in completion}
    if not completions or len(set(completions)) < len(completions):
        raise ValueError(
            f"completions must be one or more and all different, got {len(completions)}, of which "
            f"{len(set(completions))} are different"
        )
    if not used <= set(range(symbols)):
        raise ValueError(
            f"completions must use symbols 0 to {symbols - 1}, got {shown(sorted(used))}"
        )
    begins = [[c[:t] for t in range(len(c) + 1)] for c in completions]
    known = sorted({p for row in begins for p in row}, key=lambda p: (len(p), p))
    index = {prefix: n for n, prefix in enumerate(known)}
    size, width = (len(completions), max(map(len, begins))), len(known)
    prefixes, tokens = torch.zeros(size, dtype=torch.long), torch.full(size, symbols)
    allowed = torch.zeros(width, symbols + 1, dtype=torch.bool)
    passes = torch.zeros(len(completions), width, dtype=torch.bool)
    for i, (completion, row) in enumerate(zip(completions, begins)):
        for t, (prefix, token) in enumerate(zip(row, (*completion, symbols))):
            n = index[prefix]
            prefixes[i, t], tokens[i, t] = n, token
            allowed[n, token] = passes[i, n] = True
    lengths = torch.tensor([len(row) for row in begins])
    return Strings(prefixes, tokens, torch.arange(size[1]) < lengths[:, None], allowed, passes)


def every_string(symbols: int, longest: int, shortest: int = 0) -> list[tuple[int, ...]]:
    """All tuples of ``shortest`` to ``longest`` symbols from 0..symbols-1."""
    lengths = range(shortest, longest + 1)
    return [c for n in lengths for c in itertools.product(range(symbols), repeat=n)]


def log_policy(strings: Strings, theta: torch.Tensor) -> torch.Tensor:
    """log pi(. | prefix) = log softmax of the logits over the allowed tokens.

    Args:
        theta: (..., N, V + 1) fp64 logits; those of tokens that are not allowed are ignored.

    Returns:
        (..., N, V + 1) nats, -inf where not allowed.
    """
    return theta.masked_fill(~strings.allowed, -torch.inf).log_softmax(-1)


def string_logprobs(strings: Strings, theta: torch.Tensor) -> torch.Tensor:
    """log p(o) of every completion, (..., S) nats; the probabilities sum to 1."""
    chosen = log_policy(strings, theta)[..., strings.prefixes, strings.tokens]
    return chosen.masked_fill(~strings.mask, 0.0).sum(-1)


def string_drops(strings: Strings, theta: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """s_t = H(y | o_<t) - H(y | o_<=t) from the exact posterior of the answer (Section 4).

    Args:
        theta: (..., N, V + 1) logits.
        answers: (..., S, Y) fp64, p(y | o) of each completion.

    Returns:
        (..., S, L) fp64 nats, 0 at padding; their mean over o_t is I(y; o_t | o_<t), and each row
        sums to H(y) - H(y | o) (chain rule).
    """
    joint = string_logprobs(strings, theta).exp()[..., None] * answers
    joint = strings.passes.double().T @ joint  # p(y, o begins with the prefix)
    belief = entropy(joint / joint.sum(-1, keepdim=True))
    ends = strings.tokens == strings.allowed.shape[1] - 1
    after = torch.where(ends, entropy(answers)[..., None], belief[..., strings.after])
    return (belief[..., strings.prefixes] - after) * strings.mask


def policy_gradient(strings: Strings, theta: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """E_o[sum_t A(o, t) grad log pi(o_t | o_<t)], the mean over all completions.

    For tabular logits, grad log pi(a | n) is the one-hot vector of a minus pi(. | n), in row n.

    Args:
        theta: (..., N, V + 1) logits.
        weights: (..., S, L), A(o, t) including the 1/|o| of the objective.

    Returns:
        (..., N, V + 1) fp64.
    """
    p = string_logprobs(strings, theta).exp()
    weights = (p[..., None] * weights * strings.mask).flatten(-2)
    where = (strings.prefixes * theta.shape[-1] + strings.tokens).flatten()
    counts = torch.zeros(theta.shape, dtype=torch.float64).flatten(-2)
    counts = counts.index_add(-1, where, weights).view(theta.shape)
    return counts - log_policy(strings, theta).exp() * counts.sum(-1, keepdim=True)


def added_score(strings: Strings, theta: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """S(o) = sum_t g_t, g_t = grad log pi(o_t | o_<t) . change (paper, Theorem 4.1).

    Args:
        theta: (..., N, V + 1) logits at which the gradient is taken, theta_GRPO.
        change: (..., N, V + 1), the change of parameters by a term of the advantage.

    Returns:
        (..., S) fp64; to first order p(o) becomes p(o) (1 + S(o)).
    """
    inner = change - (log_policy(strings, theta).exp() * change).sum(-1, keepdim=True)
    return (inner[..., strings.prefixes, strings.tokens] * strings.mask).sum(-1)


def covariance(p: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cov(a, b) under probabilities p, over the last dimension; (...,)."""
    mean = (p * a).sum(-1, keepdim=True)
    return (p * (a - mean) * b).sum(-1)


@functools.cache
def answer_posterior(unread: int) -> torch.Tensor:
    """p(answer | current value, number of operations not computed yet) in the story world.

    This is the belief of a reader who has followed a chain to a value and does not know what comes
    next. By the generator's rules, the operation is uniform over the allowed ones, and its operand
    is uniform over those allowed for it.

    Args:
        unread: number of remaining operations, from 0.

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

    The j-th computing segment computes the j-th operation. There the entropy falls from its value
    before the operation to its value after the result is known. Other segments say nothing new.

    Args:
        problem: a story.
        segments: the chain that the world wrote for it (``stories.chain_of_thought``).

    Raises:
        ValueError: when the chain does not have one computing segment for each operation.
    """
    steps, out, done = problem.steps, [], 0
    if sum(s.role == "compute" for s in segments) != len(steps):
        raise ValueError("segments must hold one computing segment for each step of the story.")
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
