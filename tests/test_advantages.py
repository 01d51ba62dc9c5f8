"""Token advantages against plain Python with loops and the statistics module."""

import math
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import PATIENCE, make_rollouts
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo_mini.advantages import (
    ADVANTAGES,
    SGRPO_ALWAYS,
    SGRPO_UNTIL,
    dapo,
    exploration,
    gfpo,
    group_advantage,
    grpo,
    gtpo,
    iapo,
    iapo_ni,
    normalize,
    sgrpo,
)
from iapo_mini.config import RECIPES
from iapo_mini.information import INFORMATION


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
        # Any numbers do for entropies that are only compared with a reference that reads the same.
        h[i, :n] = torch.tensor(old_probabilities[i]).neg() + 1.0
    rewards = torch.tensor(rewards)
    r = r.filled(rewards=rewards, correct=rewards > 1, informativeness=s, token_entropies=h)
    return replace(r, old_logprobs=old)


@st.composite
def rollouts(draw):
    """Random groups, ragged lengths. Values lie on a grid: populations are flat or clearly not."""
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


def test_grpo_by_hand():
    """Two rewards 1.5 and -0.5: mean 0.5, sample deviation sqrt(2)."""
    a = 1 / (math.sqrt(2) + 1e-4)
    b = 1.5 / (1.5 * math.sqrt(2) + 1e-4)
    expected = [[a] * 3 + [0], [-a] * 2 + [0] * 2, [-b] * 4, [b] + [0] * 3]
    torch.testing.assert_close(grpo(example()), torch.tensor(expected))


def test_iapo_by_hand():
    r = example()
    check(iapo(r, 0.0, 0.0), plain_grpo(r))
    check(iapo(r, 1.0, 0.1), plain_iapo(r, 1.0, 0.1))
    # One number worked out on paper: row 1, token 0. s = 0.2, 0.4 and c = -0.2, -0.8.
    s = -0.1 / (0.1 * math.sqrt(2) + 1e-4)
    c = 0.3 / (0.3 * math.sqrt(2) + 1e-4)
    a = -1 / (math.sqrt(2) + 1e-4)
    assert float(iapo(r, 2.0, 0.5)[1, 0]) == pytest.approx(a + 2 * s + 0.5 * c, rel=1e-4)


@settings(max_examples=60)
@given(rollouts(), st.sampled_from([0.0, 1e-4, 0.3, 2.0]), st.sampled_from([0.0, 0.1, 1.0]))
def test_advantages_equal_the_plain_reference(r, alpha, beta):
    check(grpo(r), plain_grpo(r))
    check(iapo(r, alpha, beta), plain_iapo(r, alpha, beta))


@settings(max_examples=60)
@given(rollouts())
def test_without_extra_terms_iapo_is_grpo_to_the_last_bit(r):
    assert torch.equal(iapo(r, 0.0, 0.0), grpo(r))


def test_padding_is_in_no_population():
    """The same rollouts with more columns, and with any numbers in them."""
    expected = iapo(example(), 1.0, 1.0)
    for right, junk in [(3, 0.0), (0, 9.0), (2, -9.0)]:
        found = iapo(example(right=right, junk=junk), 1.0, 1.0)
        torch.testing.assert_close(found[:, :4], expected)
        assert not found[:, 4:].any()


def test_equal_rewards_give_no_advantage():
    # 0.1 is no binary fraction, so its mean is rounded.
    for value in (1.5, -1.5, 0.1):
        found = grpo(example(rewards=[value] * 4))
        assert torch.equal(found, torch.zeros_like(found))


def test_constant_rows_give_no_information_term():
    information = [[0.1] * 3, [0.3] * 2, [-0.7] * 4, [0.7]]
    r = example(informativeness=information)
    assert torch.equal(iapo(r, 5.0, 0.0), grpo(r))


def test_constant_confidence_gives_no_exploration_term():
    r = example(old_probabilities=[[0.3] * 3, [0.7] * 2, [1.0] * 4, [0.1]])
    assert torch.equal(iapo(r, 0.0, 5.0), grpo(r))


def test_single_tokens_get_the_group_advantage_alone():
    r = example(
        lengths=[1] * 4, informativeness=[[2.0], [1.0], [3.0], [0.0]], old_probabilities=[[0.5]] * 4
    )
    found = iapo(r, 3.0, 3.0)
    assert found.isfinite().all()
    assert torch.equal(found, grpo(r))


def test_exploration_is_signed_by_correctness():
    """+pi_old in correct completions, -pi_old in the others, nothing at padding."""
    expected = [
        [0.9, 0.1, 0.5, 0],
        [-0.2, -0.8, 0, 0],
        [-0.5, -0.25, -0.5, -1.0],
        [0.3, 0, 0, 0],
    ]
    torch.testing.assert_close(exploration(example()), torch.tensor(expected))


def test_exploration_reinforces_confidence_when_right_and_punishes_it_when_wrong():
    r = example()
    term = iapo(r, 0.0, 1.0) - grpo(r)
    assert term[0, 0] > term[0, 2] > term[0, 1]  # correct, probabilities 0.9, 0.5, 0.1
    assert term[1, 0] > term[1, 1]  # wrong, probabilities 0.2, 0.8


def test_informative_tokens_get_more():
    r = example()
    term = iapo(r, 1.0, 0.0) - grpo(r)
    assert term[0, 0] > term[0, 1] > term[0, 2]
    # A normalised term moves credit between the tokens of a completion and adds none.
    torch.testing.assert_close(term.sum(1), torch.zeros(4), atol=1e-5, rtol=0)


def test_group_advantage_stays_within_the_group():
    """A third group's rewards do not move the first two."""
    r = example()
    before = group_advantage(r)
    after = group_advantage(r.filled(rewards=torch.tensor([1.5, -0.5, 1.5, -0.5])))
    assert torch.equal(after[:2], before[:2])
    assert not torch.equal(after[2:], before[2:])


@settings(max_examples=60)
@given(st.lists(st.integers(-100, 100), min_size=1, max_size=8), st.integers(0, 3))
def test_normalize(values, masked):
    numbers = torch.tensor([*values, *[77] * masked]) / 8
    mask = torch.arange(len(numbers)) < len(values)
    expected = norm([v / 8 for v in values])
    found = normalize(numbers, mask)
    assert found[: len(values)].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not found[len(values) :].any()


def test_normalize_of_nothing_is_zero():
    values = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    mask = torch.tensor([[False, False], [True, False]])
    assert torch.equal(normalize(values, mask), torch.zeros(2, 2))


def test_methods_by_name():
    r = example()
    assert torch.equal(ADVANTAGES["grpo"](r, 1.0, 1.0), grpo(r))
    assert torch.equal(ADVANTAGES["iapo"](r, 1.0, 1.0), iapo(r, 1.0, 1.0))
    # GRPO runs must not pay for, nor need, the estimate.
    r = replace(r, known={name: x for name, x in r.known.items() if name != "informativeness"})
    informed = {name for name, recipe in RECIPES.items() if recipe.information is not None}
    assert informed == {"iapo", "iapo_ne", "iapo_pmi"}
    for name, recipe in RECIPES.items():
        rule = ADVANTAGES[recipe.rule]
        if name in informed:
            assert recipe.information in INFORMATION
            with pytest.raises(ValueError, match="no informativeness yet"):
                rule(r, 1.0, 1.0)
            continue
        found = rule(r, 1.0, 1.0)
        assert found.shape == r.completion_ids.shape and found.dtype == torch.float32
        assert not found[~r.completion_mask].any()


@pytest.mark.parametrize("module", ["advantages", "objective", "rollouts"])
def test_what_is_mathematics_is_imported_without_models_and_data(module):
    program = f"import sys, iapo_mini.{module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
    )
    imported = done.stdout.split()
    assert f"iapo_mini.{module}" in imported, done.stderr
    assert not {"transformers", "peft", "datasets"} & set(imported)


def groups_of(r):
    """Row numbers of each group."""
    size = r.num_generations
    return [range(i, i + size) for i in range(0, len(r.rewards), size)]


def plain_dapo(r):
    rows = plain_grpo(r)
    return [row if r.finished[i] else [0.0] * len(row) for i, row in enumerate(rows)]


def plain_gfpo(r):
    lengths = r.lengths.tolist()
    rows = [[0.0] * n for n in lengths]
    for group in groups_of(r):
        count = -(-3 * len(group) // 4)
        kept = sorted(group, key=lambda i: (lengths[i], i))[:count]
        for i, a in zip(kept, norm([float(r.rewards[i]) for i in kept])):
            rows[i] = [a] * lengths[i]
    return rows


def plain_gtpo(r, weight):
    rows, lengths = plain_grpo(r), r.lengths.tolist()
    for group in groups_of(r):
        for i in group:
            for t in range(lengths[i]):
                right = bool(r.correct[i])
                peers = [k for k in group if bool(r.correct[k]) == right and lengths[k] > t]
                h = {k: max(float(r.token_entropies[k, t]), 1e-4) for k in peers}
                if right:
                    rows[i][t] += weight * len(peers) * h[i] / sum(h.values())
                else:
                    total = sum(1 / x for x in h.values())
                    rows[i][t] -= weight * len(peers) * (1 / h[i]) / total
    return rows


@settings(max_examples=60)
@given(rollouts(), st.sampled_from([0.0, 0.1, 1.0]), st.lists(st.booleans(), min_size=12))
def test_other_methods_equal_the_plain_reference(r, weight, finished):
    r = replace(r, finished=torch.tensor(finished[: len(r.rewards)]))
    check(dapo(r), plain_dapo(r))
    check(gfpo(r), plain_gfpo(r))
    check(gtpo(r, weight), plain_gtpo(r, weight))
    check(iapo_ni(r, 3.0, weight), plain_iapo(r, 0.0, weight))


def test_dapo_drops_what_was_cut_at_the_limit():
    r = replace(example(), finished=torch.tensor([True, True, False, True]))
    assert torch.equal(dapo(r)[[0, 1, 3]], grpo(r)[[0, 1, 3]])
    assert not dapo(r)[2].any() and grpo(r)[2].any()


def test_gfpo_by_hand():
    """Four completions of 3, 2, 4 and 1 tokens: the one of 4 is dropped, also from the mean."""
    found = gfpo(example(group=4))
    mean, std = (1.5 - 0.5 + 1.5) / 3, 2 / math.sqrt(3)
    for i, reward in [(0, 1.5), (1, -0.5), (3, 1.5)]:
        assert float(found[i, 0]) == pytest.approx((reward - mean) / (std + 1e-4))
    assert not found[2].any()


def test_gfpo_keeps_six_of_eight():
    r = example(
        lengths=[5, 1, 4, 2, 8, 3, 7, 6], group=8, rewards=[1.5, -0.5] * 4,
        informativeness=[[0.0] * n for n in (5, 1, 4, 2, 8, 3, 7, 6)],
        old_probabilities=[[0.5] * n for n in (5, 1, 4, 2, 8, 3, 7, 6)],
    )  # fmt: skip
    kept = gfpo(r).abs().sum(1) > 0
    assert kept.tolist() == [True, True, True, True, False, True, False, True]


def test_gtpo_by_hand():
    """Two right completions with entropies 1 and 3 at a token share a bonus of two weights."""
    r = example(
        lengths=[2, 1], rewards=[1.5, 1.5], informativeness=[[0.0] * 2, [0.0]],
        old_probabilities=[[0.5, 0.5], [0.5]],
    )  # fmt: skip
    r = r.filled(token_entropies=torch.tensor([[1.0, 0.7], [3.0, 0.0]]))
    found = gtpo(r, 0.1)
    expected = torch.tensor([[0.1 * 2 / 4, 0.1], [0.1 * 2 * 3 / 4, 0.0]])
    torch.testing.assert_close(found, expected)
    r = r.filled(rewards=r.rewards - 2, correct=~r.correct)
    # Wrong: the sure one pays three times as much.
    expected = -torch.tensor([[0.1 * 2 * 3 / 4, 0.1], [0.1 * 2 / 4, 0.0]])
    torch.testing.assert_close(gtpo(r, 0.1), expected)


def test_gtpo_does_not_drown_in_a_token_without_doubt():
    r = example()
    r = r.filled(token_entropies=torch.zeros_like(r.token_entropies))
    found = gtpo(r, 0.1)
    assert found.isfinite().all()
    check(found, plain_gtpo(r, 0.1))


def test_sgrpo_counts_the_first_tokens_and_flips_coins_for_the_rest():
    lengths = [400, 341, 340, 100] * 4
    r = example(
        lengths=lengths, group=16, rewards=[1.5, -0.5] * 8,
        informativeness=[[0.0] * n for n in lengths],
        old_probabilities=[[0.5] * n for n in lengths],
    )  # fmt: skip
    counts = sgrpo(r) != 0
    assert torch.equal(sgrpo(r)[counts], grpo(r)[counts])
    assert counts[:, :SGRPO_ALWAYS].eq(r.completion_mask[:, :SGRPO_ALWAYS]).all()
    assert not counts[:, SGRPO_UNTIL:].any()
    long = r.lengths >= SGRPO_UNTIL
    assert not counts[long, SGRPO_ALWAYS:].any()
    some = counts[r.lengths == 340, SGRPO_ALWAYS:340]
    # 760 fair coins: five standard deviations are 0.09.
    assert 0.41 < float(some.float().mean()) < 0.59
    assert torch.equal(sgrpo(r), sgrpo(r))


def test_sgrpo_scales_both_thresholds():
    r = example(lengths=[4, 3, 2, 2], group=4, rewards=[1.5, -0.5, 1.5, -0.5],
                informativeness=[[0.0] * n for n in (4, 3, 2, 2)],
                old_probabilities=[[0.5] * n for n in (4, 3, 2, 2)])  # fmt: skip
    counts = sgrpo(r, alpha=0.0099) != 0  # 1.485 -> 1 and 3.38 -> 3 tokens
    assert counts[:2].tolist() == [[True, False, False, False]] * 2
    assert counts[2:, 0].all() and not counts[:, 2:].any()
