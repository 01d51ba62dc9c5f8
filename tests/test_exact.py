"""Closed-form worlds, checked by brute force, and the estimators applied to them."""

import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.information import (
    answer_entropies,
    answer_surprisals,
    belief_shift,
    candidate_logprobs,
    informativeness,
)
from iapo_mini.lab import exact
from iapo_mini.lab.exact import (
    World,
    answer_posterior,
    conditional_mi,
    conditional_mi_at,
    entropy_drop,
    mutual_information,
    pointwise,
    random_world,
    true_drops,
)
from iapo_mini.policy import Policy
from iapo_mini.problems.stories import (
    MAX_VALUE,
    Segment,
    apply,
    chain_of_thought,
    operands,
    stories,
)
from iapo_mini.rollouts import Rollouts

WORLDS = st.builds(
    random_world,
    symbols=st.integers(1, 3),
    length=st.integers(1, 4),
    answers=st.integers(1, 4),
    noise=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 999),
)


class Tables:
    """Every probability of a world, by summing over a dictionary."""

    def __init__(self, world):
        *shape, self.answers = world.joint.shape
        self.symbols, self.length = shape[0], len(shape)
        self.strings = list(itertools.product(*map(range, shape)))
        self.joint = {
            (o, y): float(world.joint[(*o, y)]) for o in self.strings for y in range(self.answers)
        }

    def p(self, prefix, y=None):
        t = len(prefix)
        return sum(
            p for (o, a), p in self.joint.items() if o[:t] == prefix and (y is None or a == y)
        )

    def belief(self, prefix):
        total = self.p(prefix)
        return [self.p(prefix, y) / total for y in range(self.answers)]

    def entropy(self, prefix):
        return -sum(p * math.log(p) for p in self.belief(prefix) if p > 0)

    def prefixes(self, t):
        return itertools.product(range(self.symbols), repeat=t)

    def conditional_mi(self, t):
        total = 0.0
        for o in self.prefixes(t):
            for y in range(self.answers):
                p = self.p(o, y)
                if p > 0:
                    before = o[:-1]
                    ratio = p * self.p(before) / (self.p(before, y) * self.p(o))
                    total += p * math.log(ratio)
        return total


@settings(max_examples=25)
@given(WORLDS)
def test_conditional_mi_by_brute_force(world):
    tables = Tables(world)
    for t in range(1, world.length + 1):
        assert conditional_mi(world, t) == pytest.approx(tables.conditional_mi(t), abs=1e-9)
        assert conditional_mi(world, t) >= -1e-12
        at = conditional_mi_at(world, t)
        for o in tables.prefixes(t - 1):
            total = 0.0
            for symbol in range(tables.symbols):
                p = tables.p((*o, symbol)) / tables.p(o)
                total += p * (tables.entropy(o) - tables.entropy((*o, symbol)))
            assert float(at[o]) == pytest.approx(total, abs=1e-9)


@settings(max_examples=20)
@given(WORLDS)
def test_prefixes_beliefs_and_drops_by_brute_force(world):
    tables = Tables(world)
    for t in range(world.length + 1):
        for o in tables.prefixes(t):
            assert float(world.prefix(t)[o]) == pytest.approx(tables.p(o), abs=1e-12)
            assert world.belief(t)[o].tolist() == pytest.approx(tables.belief(o), abs=1e-12)
            if t == 0:
                continue
            drop = tables.entropy(o[:-1]) - tables.entropy(o)
            assert float(entropy_drop(world, t)[o]) == pytest.approx(drop, abs=1e-9)
            now, before = tables.belief(o), tables.belief(o[:-1])
            for y in range(tables.answers):
                if now[y] > 0:
                    found = float(pointwise(world, t)[(*o, y)])
                    assert found == pytest.approx(math.log(now[y] / before[y]), abs=1e-9)


@given(WORLDS)
def test_chain_rule(world):
    total = sum(conditional_mi(world, t) for t in range(1, world.length + 1))
    assert total == pytest.approx(mutual_information(world), abs=1e-9)


def test_worlds_by_hand():
    """The answer is the first of two fair bits, which gives ln 2; the second gives 0."""
    joint = torch.zeros(2, 2, 2, dtype=torch.float64)
    joint[0, :, 0] = joint[1, :, 1] = 0.25
    world = World(joint)
    assert mutual_information(world) == pytest.approx(math.log(2))
    assert conditional_mi(world, 1) == pytest.approx(math.log(2))
    assert conditional_mi(world, 2) == pytest.approx(0.0)
    # The answer is their exclusive or, so each alone says nothing about it.
    joint = torch.zeros(2, 2, 2, dtype=torch.float64)
    joint[0, 0, 0] = joint[1, 1, 0] = joint[0, 1, 1] = joint[1, 0, 1] = 0.25
    world = World(joint)
    assert conditional_mi(world, 1) == pytest.approx(0.0)
    assert conditional_mi(world, 2) == pytest.approx(math.log(2))


def test_prefixes_that_never_occur():
    joint = torch.zeros(2, 2, 3, dtype=torch.float64)
    joint[0, 0, 0] = joint[0, 1, 1] = 0.5
    world = World(joint)
    assert world.belief(1)[1].tolist() == pytest.approx([1 / 3] * 3)
    assert conditional_mi_at(world, 2).tolist() == pytest.approx([math.log(2), 0.0])
    assert conditional_mi(world, 2) == pytest.approx(mutual_information(world))


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_noise_of_a_random_world(noise):
    world = random_world(2, 3, 4, noise=noise, seed=3)
    assert float(world.joint.sum()) == pytest.approx(1.0)
    highest = world.belief(3).max(-1).values
    torch.testing.assert_close(highest, torch.full_like(highest, 1 - noise + noise / 4))
    again, other = random_world(2, 3, 4, noise=noise, seed=3), random_world(2, 3, 4, seed=4)
    assert torch.equal(world.joint, again.joint) and not torch.equal(world.joint, other.joint)


@pytest.mark.parametrize(
    "joint",
    [
        torch.ones(4).double() / 4,
        torch.tensor([[1.5, -0.5], [0.0, 0.0]]).double(),
        torch.ones(2, 2).double() / 3,
    ],
)
def test_tensors_that_are_not_distributions_are_refused(joint):
    with pytest.raises(ValueError, match="joint must have at least 2 axes"):
        World(joint)


# The estimators on enumerated strings


def enumerated(world):
    """Strings, weights p(o, y), and log-beliefs (rows, T + 1, Y), with one row for each (o, y)."""
    tables = Tables(world)
    rows = [(o, y) for o in tables.strings for y in range(tables.answers)]
    weights = torch.tensor([tables.joint[row] for row in rows], dtype=torch.float64)
    beliefs = torch.tensor(
        [[tables.belief(o[:t]) for t in range(world.length + 1)] for o, _ in rows],
        dtype=torch.float64,
    )
    mask = torch.ones(len(rows), world.length, dtype=torch.bool)
    return rows, weights, beliefs, mask


@settings(max_examples=25)
@given(WORLDS)
def test_means_of_the_measures_are_the_conditional_mi(world):
    rows, weights, beliefs, mask = enumerated(world)
    logs = beliefs.clamp(min=1e-300).log()
    answers = torch.tensor([y for _, y in rows])
    surprisals = -logs.gather(2, answers[:, None, None].expand(-1, logs.shape[1], 1))[..., 0]
    values = {
        "entropy": informativeness(-(beliefs * logs).sum(-1), mask),
        "pointwise": informativeness(surprisals, mask),
        "shift": belief_shift(logs, mask),
    }
    expected = [conditional_mi(world, t) for t in range(1, world.length + 1)]
    for name, value in values.items():
        assert (weights @ value).tolist() == pytest.approx(expected, abs=1e-6), name
    assert values["shift"].min() > -1e-9
    # Single values differ, and the drop is that of the closed form.
    for t in range(1, world.length + 1):
        drop = entropy_drop(world, t)
        closed = [float(drop[o[:t]]) for o, _ in rows]
        assert values["entropy"][:, t - 1].tolist() == pytest.approx(closed, abs=1e-9)


class Alphabet:
    """Tokenizer of a world: symbols 0..V-1, the postfix, answers "y0", "y1", ..., the question."""

    def __init__(self, world):
        self.symbols = world.joint.shape[0]

    def encode(self, text, add_special_tokens=False):
        if text == "POST":
            return [self.symbols]
        return [self.symbols + 1 + int(text[1:])] if text[:1] == "y" else []

    def convert_ids_to_tokens(self, ids):
        return [str(i) for i in ids]


class Tabular(torch.nn.Module):
    """A world as a causal LM, which predicts symbols, and an answer after the postfix."""

    def __init__(self, world):
        super().__init__()
        self.world, self.symbols = world, world.joint.shape[0]
        self.device_tells = torch.nn.Parameter(torch.zeros(1))
        text = SimpleNamespace(
            vocab_size=self.symbols + 2 + world.joint.shape[-1],
            hidden_size=1,
            num_hidden_layers=1,
            _attn_implementation="tabular",
            model_type="tabular",
        )
        text.get_text_config = lambda: text
        self.config = text

    def forward(self, ids, logits_to_keep):
        assert ids.shape[0] == 1 and logits_to_keep == 1
        _question, *prefix = ids[0].tolist()
        p = torch.zeros(self.config.vocab_size, dtype=torch.float64)
        if prefix and prefix[-1] == self.symbols:
            prefix = tuple(prefix[:-1])
            p[self.symbols + 1 : -1] = self.world.belief(len(prefix))[prefix]
        else:
            p[: self.symbols] = self.world.prefix(len(prefix) + 1)[tuple(prefix)]
        # A finite floor: softmax of it is 0 in fp32, and 0 log 0 stays 0.
        return SimpleNamespace(logits=p.clamp(min=1e-40).log()[None, None])


def tabular(world, strings):
    """The policy of a world and rollouts that hold the given strings."""
    rows, width = len(strings), max(map(len, strings))
    lengths = torch.tensor([len(o) for o in strings])
    question = torch.full((rows, 1), world.joint.shape[0] + 1 + world.joint.shape[-1])
    rollouts = Rollouts(
        prompt_ids=question,
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        completion_ids=torch.tensor([[*o] + [0] * (width - len(o)) for o in strings]),
        completion_mask=torch.arange(width) < lengths[:, None],
        old_logprobs=torch.zeros(rows, width),
        num_generations=rows,
        finished=torch.ones(rows, dtype=torch.bool),
    )
    return Policy(Tabular(world), Alphabet(world)), rollouts


@pytest.mark.parametrize(
    ("symbols", "length", "answers", "noise"), [(3, 3, 3, 0.0), (2, 4, 3, 0.2), (4, 2, 2, 0.05)]
)
@pytest.mark.parametrize("way", ["packed", "naive"])
def test_the_estimator_finds_the_conditional_mi_of_a_tabular_policy(
    symbols, length, answers, noise, way, recwarn
):
    world = random_world(symbols, length, answers, noise=noise, seed=5)
    expected = [conditional_mi(world, t) for t in range(1, length + 1)]
    rows, weights, _, _ = enumerated(world)
    policy, rollouts = tabular(world, [o for o, _ in rows])
    assert max(expected) > 0.05 and len(rows) >= 32

    entropies = answer_entropies(policy, rollouts, EarlyExit("POST", way=way))
    s = informativeness(entropies, rollouts.completion_mask)
    assert (weights @ s.double()).tolist() == pytest.approx(expected, abs=1e-6)
    for t in range(1, length + 1):
        drop = entropy_drop(world, t)
        closed = [float(drop[o[:t]]) for o, _ in rows]
        assert s[:, t - 1].tolist() == pytest.approx(closed, abs=2e-6)  # fp32
    # Without a KV cache the definition is used, with one warning.
    told = [str(w.message) for w in recwarn if "way='naive'" in str(w.message)]
    assert len(told) == (way == "packed")

    naive = EarlyExit("POST", way="naive")
    surprisals = answer_surprisals(policy, rollouts, [f"y{y}" for _, y in rows], naive)
    s = informativeness(surprisals, rollouts.completion_mask).double()
    assert (weights @ s).tolist() == pytest.approx(expected, abs=1e-5)  # differences of fp32 logs
    assert s.min() < -0.1  # single values do go below 0

    logs = candidate_logprobs(policy, rollouts, [f"y{y}" for y in range(answers)], naive)
    shift = belief_shift(logs, rollouts.completion_mask).double()
    assert (weights @ shift).tolist() == pytest.approx(expected, abs=1e-5)
    assert shift.min() > -1e-5


# The story world


def rules(value):
    """(op, operand) of the next event and their probabilities, from the rules in words.

    Values stay within 1 to 60. Add or subtract 2 to 9, multiply by 2 to 4, or divide evenly by 2 to
    5, with a result of at least 1. First the operation is drawn, then the operand, both uniformly.
    """
    by_op = {
        "+": [value + n for n in range(2, 10)],
        "-": [value - n for n in range(2, 10)],
        "*": [value * n for n in range(2, 5)],
        "/": [value // n for n in range(2, 6) if value % n == 0 and value > n],
    }
    by_op = {op: [r for r in found if 1 <= r <= 60] for op, found in by_op.items()}
    by_op = {op: found for op, found in by_op.items() if found}
    return [(r, 1 / len(by_op) / len(found)) for found in by_op.values() for r in found]


def recursion(value, unread):
    if unread == 0:
        return {value: 1.0}
    out = Counter()
    for result, p in rules(value):
        for answer, q in recursion(result, unread - 1).items():
            out[answer] += p * q
    return out


@pytest.mark.parametrize("unread", [0, 1, 2])
def test_answer_posterior_by_recursion(unread):
    found = answer_posterior(unread)
    for value in range(1, MAX_VALUE + 1):
        expected = recursion(value, unread)
        row = [expected.get(answer, 0.0) for answer in range(MAX_VALUE + 1)]
        assert found[value].tolist() == pytest.approx(row, abs=1e-12)


def test_answer_posterior_by_drawing():
    rng, n, value = random.Random(0), 20_000, 12
    counts = Counter()
    for _ in range(n):
        now = value
        for _ in range(3):
            choices = operands(now)
            op = rng.choice(list(choices))
            now = apply(now, op, rng.choice(choices[op]))
        counts[now] += 1
    p = answer_posterior(3)[value]
    often = [a for a in range(MAX_VALUE + 1) if n * p[a] >= 20]
    statistic = sum((counts[a] - n * float(p[a])) ** 2 / (n * float(p[a])) for a in often)
    assert len(often) > 30 and statistic < len(often) + 5 * math.sqrt(2 * len(often))
    # The test would detect the posterior after one event less.
    q = answer_posterior(2)[value]
    wrong = sum(n * (float(q[a]) - float(p[a])) ** 2 / float(p[a]) for a in often)
    assert wrong > 10 * len(often)


@pytest.mark.parametrize("unread", range(7))
def test_answer_posteriors_are_distributions(unread):
    p = answer_posterior(unread)
    assert p.dtype == torch.float64 and p.min() >= 0
    torch.testing.assert_close(p.sum(1), torch.ones(MAX_VALUE + 1, dtype=torch.float64))
    assert not p[1:, 0].any()  # no quantity ever is 0


@pytest.mark.parametrize("seed", range(4))
def test_true_drops_of_a_chain(seed):
    for problem in itertools.islice(stories("test", seed=seed), 5):
        segments = chain_of_thought(problem, random.Random(seed), wordiness=0.9)
        drops = true_drops(problem, segments)
        assert len(drops) == len(segments)
        assert {d for d, s in zip(drops, segments) if s.role != "compute"} <= {0.0}
        # They sum to the entropy before any step minus that of the known answer.
        start = answer_posterior(len(problem.steps))[problem.steps[0].before]
        h = -sum(p * math.log(p) for p in start.tolist() if p > 0)
        assert sum(drops) == pytest.approx(h, abs=1e-9)
        computed = [d for d, s in zip(drops, segments) if s.role == "compute"]
        for j, (step, drop) in enumerate(zip(problem.steps, computed)):
            left = len(problem.steps) - j
            before = exact.entropy(answer_posterior(left)[step.before])
            after = exact.entropy(answer_posterior(left - 1)[step.result])
            assert drop == pytest.approx(float(before - after))


@pytest.mark.parametrize("change", [-1, 1])
def test_chains_of_another_story_are_refused(change):
    problem = next(stories("test"))
    segments = chain_of_thought(problem, random.Random(0))
    at = [s.role for s in segments].index("compute")
    segments = (
        segments[:at] + segments[at + 1 :] if change < 0 else [*segments, Segment(" 3.", "compute")]
    )
    with pytest.raises(ValueError, match="must hold one computing segment for each"):
        true_drops(problem, segments)


def test_entropy_of_probabilities():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3] * 3], dtype=torch.float64)
    expected = torch.tensor([math.log(2), 0.0, math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(exact.entropy(p), expected)
