"""The methods that IAPO is compared with, tested by plain Python and by numbers made by hand.

Each is compared with the formula of its source. If IAPO's authors use another form of a method,
that form is a separate method.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import check, example, norm, plain_grpo, rollouts

from iapo_mini.advantages import (
    COUNTED,
    SGRPO_ALWAYS,
    SGRPO_UNTIL,
    dapo,
    entropy_shares,
    gfpo,
    gfpo_tokens,
    grpo,
    grpo_efficient,
    grpo_kimi,
    gtpo,
    gtpo_iapo,
    overlong_punishment,
    sgrpo,
    sgrpo_tokens,
)


def groups_of(r):
    """Row numbers of each group."""
    size = r.num_generations
    return [range(i, i + size) for i in range(0, len(r.rewards), size)]


def repaid(r, change):
    """GRPO's rows after adding a list to the rewards."""
    return plain_grpo(r.filled(rewards=r.rewards + torch.tensor(change)))


def plain_overlong(r):
    """Eq. 13 of the DAPO paper with a buffer of a fifth of the limit."""
    out = []
    for n in r.lengths.tolist():
        buffer = 0.2 * r.limit
        free = r.limit - buffer
        out.append(0.0 if n <= free else (free - n) / buffer if n < r.limit else -1.0)
    return out


def plain_gfpo(r, share):
    lengths = r.lengths.tolist()
    rows = [[0.0] * n for n in lengths]
    for group in groups_of(r):
        count = math.ceil(share * len(group))
        kept = sorted(group, key=lambda i: (lengths[i], i))[:count]
        for i, a in zip(kept, norm([float(r.rewards[i]) for i in kept])):
            rows[i] = [a] * lengths[i]
    return rows


def plain_shares(r):
    lengths = r.lengths.tolist()
    rows = [[0.0] * n for n in lengths]
    for group in groups_of(r):
        for i in group:
            for t in range(lengths[i]):
                peers = [k for k in group if r.correct[k] == r.correct[i] and lengths[k] > t]
                h = {k: max(float(r.token_entropies[k, t]), 1e-4) for k in peers}
                if not r.correct[i]:
                    h = {k: 1 / x for k, x in h.items()}
                rows[i][t] = len(peers) * h[i] / sum(h.values())
    return rows


def plain_gtpo(r, weight):
    shares, rows = plain_shares(r), [[0.0] * n for n in r.lengths.tolist()]
    for group in groups_of(r):
        for right in (True, False):
            own = [i for i in group if bool(r.correct[i]) == right]
            sign = 1 if right else -1
            tokens = [(i, t) for i in own for t in range(len(rows[i]))]
            shaped = [sign * ((1 - weight) + weight * shares[i][t]) for i, t in tokens]
            # The share of a single completion is 1 up to rounding.
            flat = shaped and max(shaped) - min(shaped) < 1e-5
            for (i, t), a in zip(tokens, [0.0] * len(shaped) if flat else norm(shaped)):
                rows[i][t] = a
    return rows


def plain_kimi(r, weight):
    change = [0.0] * len(r.rewards)
    for group in groups_of(r):
        lengths = [int(r.lengths[i]) for i in group]
        low, high = min(lengths), max(lengths)
        for i, n in zip(group, lengths):
            value = 0.5 - (n - low) / (high - low) if high > low else 0.0
            change[i] = weight * (value if r.correct[i] else min(0.0, value))
    return change


def plain_efficient(r, weight):
    change = [0.0] * len(r.rewards)
    for group in groups_of(r):
        right = [i for i in group if r.correct[i]]
        for i, z in zip(right, norm([float(r.lengths[i]) for i in right])):
            change[i] = -weight / (1 + math.exp(-z))
    return change


@settings(max_examples=60)
@given(rollouts(), st.sampled_from([0.1, 0.4, 1.0]), st.integers(3, 9))
def test_baselines_equal_the_plain_reference(r, weight, limit):
    r = replace(r, limit=limit)
    check(dapo(r), repaid(r, plain_overlong(r)))
    check(gfpo(r, weight), plain_gfpo(r, weight))
    check(entropy_shares(r), plain_shares(r))
    check(gtpo(r, weight), plain_gtpo(r, weight))
    check(grpo_kimi(r, weight), repaid(r, plain_kimi(r, weight)))
    check(grpo_efficient(r, weight), repaid(r, plain_efficient(r, weight)))
    sign = [1 if right else -1 for right in r.correct]
    shaped = [
        [a + weight * s * w for a, w in zip(row, shares)]
        for row, s, shares in zip(plain_grpo(r), sign, plain_shares(r))
    ]
    check(gtpo_iapo(r, weight), shaped)


def test_overlong_punishment_by_hand():
    """Limit 10, buffer 2: 0 up to 8 tokens, -0.5 at 9, -1 at 10."""
    r = example(
        lengths=[4, 8, 9, 10], group=4, informativeness=[[0.0] * n for n in (4, 8, 9, 10)],
        old_probabilities=[[0.5] * n for n in (4, 8, 9, 10)],
    )  # fmt: skip
    assert overlong_punishment(replace(r, limit=10)).tolist() == [0, 0, -0.5, -1]
    assert not overlong_punishment(r).any()  # no limit is known
    assert torch.equal(dapo(r), grpo(r))
    assert r.rewards.tolist() == [1.5, -0.5, -1.5, 1.5]  # the logged reward does not change


def test_length_rewards_by_hand():
    """Lengths 3, 2, 4, 1 of one group, the first and last right."""
    r = example(group=4)
    # Kimi k1.5: 0.5 - (n - 1) / 3, and not above 0 for the wrong ones.
    paid = [-1 / 6, 1 / 6, -0.5, 0.5]
    change = [0.4 * p if right else min(0.0, 0.4 * p) for p, right in zip(paid, [1, 0, 0, 1])]
    check(grpo_kimi(r, 0.4), repaid(r, change))
    # Arora and Zanette: right lengths 3 and 1, mean 2, sample deviation sqrt(2).
    z = 1 / (math.sqrt(2) + 1e-4)
    loss = [1 / (1 + math.exp(-z)), 0.0, 0.0, 1 / (1 + math.exp(z))]
    check(grpo_efficient(r, 0.4), repaid(r, [-0.4 * x for x in loss]))


def test_equal_lengths_get_no_length_reward():
    r = example(
        lengths=[2, 2], rewards=[1.5, -0.5], informativeness=[[0.0] * 2] * 2,
        old_probabilities=[[0.5] * 2] * 2,
    )  # fmt: skip
    assert torch.equal(grpo_kimi(r, 0.7), grpo(r))


def test_gfpo_by_hand():
    """Of completions with 3, 2, 4 and 1 tokens, the longest is dropped, also from the mean."""
    r = example(group=4)
    found = gfpo(r)
    mean, std = (1.5 - 0.5 + 1.5) / 3, 2 / math.sqrt(3)
    for i, reward in [(0, 1.5), (1, -0.5), (3, 1.5)]:
        assert float(found[i, 0]) == pytest.approx((reward - mean) / (std + 1e-4))
    assert not found[2].any()
    assert gfpo_tokens(r, 0.75).sum(1).tolist() == [3, 2, 0, 1]


@pytest.mark.parametrize(
    ("group", "share", "kept"), [(8, 0.75, 6), (24, 1 / 3, 8), (8, 0.01, 1), (8, 1.0, 8)]
)
def test_gfpo_keeps_the_shortest_share(group, share, kept):
    lengths = [1 + 7 * i % 25 for i in range(group)]
    r = example(
        lengths=lengths, group=group, rewards=[1.5, -0.5] * (group // 2),
        informativeness=[[0.0] * n for n in lengths],
        old_probabilities=[[0.5] * n for n in lengths],
    )  # fmt: skip
    found = gfpo_tokens(r, share).any(1)
    assert int(found.sum()) == kept
    assert r.lengths[found].max() <= r.lengths[~found].min() if kept < group else True


def test_gtpo_by_hand():
    """Two right completions have entropies 1 and 3 at their first token; only one continues."""
    r = example(
        lengths=[2, 1], rewards=[1.5, 1.5], informativeness=[[0.0] * 2, [0.0]],
        old_probabilities=[[0.5, 0.5], [0.5]],
    )  # fmt: skip
    r = r.filled(token_entropies=torch.tensor([[1.0, 0.7], [3.0, 0.0]]))
    # Two are running: 2 * 1/4 and 2 * 3/4; alone: 1.
    torch.testing.assert_close(entropy_shares(r), torch.tensor([[0.5, 1.0], [1.5, 0.0]]))
    torch.testing.assert_close(gtpo_iapo(r, 0.1), torch.tensor([[0.05, 0.1], [0.15, 0.0]]))
    # As published the three tokens are normalised together: rewards 0.95, 1, 1.05.
    a = 0.05 / (0.05 + 1e-4)
    torch.testing.assert_close(gtpo(r, 0.1), torch.tensor([[-a, 0.0], [a, 0.0]]))
    wrong = r.filled(rewards=r.rewards - 2, correct=~r.correct)
    # In wrong completions the more certain token has three times the weight.
    torch.testing.assert_close(gtpo_iapo(wrong, 0.1), -torch.tensor([[0.15, 0.1], [0.05, 0.0]]))
    torch.testing.assert_close(gtpo(wrong, 0.1), torch.tensor([[-a, 0.0], [a, 0.0]]))


def test_gtpo_as_published_normalises_right_and_wrong_separately():
    """So the mean advantage of both is 0, and only single tokens differ."""
    r = example(group=4)
    found = gtpo(r, 0.3)
    for rows in (r.correct, ~r.correct):
        assert float(found[rows].sum()) == pytest.approx(0.0, abs=1e-4)
        assert found[rows].abs().max() > 0.5


def test_a_certain_token_does_not_dominate_gtpo():
    r = example()
    r = r.filled(token_entropies=torch.zeros_like(r.token_entropies))
    assert gtpo_iapo(r, 0.1).isfinite().all() and gtpo(r, 0.1).isfinite().all()
    check(entropy_shares(r), plain_shares(r))


def test_sgrpo_counts_the_first_tokens_and_flips_coins_for_the_rest():
    lengths = [400, 341, 340, 100] * 4
    r = example(
        lengths=lengths, group=16, rewards=[1.5, -0.5] * 8,
        informativeness=[[0.0] * n for n in lengths],
        old_probabilities=[[0.5] * n for n in lengths],
    )  # fmt: skip
    counts = sgrpo_tokens(r, 1.0)
    assert torch.equal(sgrpo(r), grpo(r) * counts) and (sgrpo(r) != 0).eq(counts).all()
    assert counts[:, :SGRPO_ALWAYS].eq(r.completion_mask[:, :SGRPO_ALWAYS]).all()
    assert not counts[:, SGRPO_UNTIL:].any()
    long = r.lengths >= SGRPO_UNTIL
    assert not counts[long, SGRPO_ALWAYS:].any()
    some = counts[r.lengths == 340, SGRPO_ALWAYS:340]
    # 760 fair coins: five standard deviations are 0.09.
    assert 0.41 < float(some.float().mean()) < 0.59
    assert torch.equal(counts, sgrpo_tokens(r, 1.0))


def test_sgrpo_scales_both_thresholds():
    r = example(lengths=[4, 3, 2, 2], group=4, rewards=[1.5, -0.5, 1.5, -0.5],
                informativeness=[[0.0] * n for n in (4, 3, 2, 2)],
                old_probabilities=[[0.5] * n for n in (4, 3, 2, 2)])  # fmt: skip
    counts = sgrpo_tokens(r, alpha=0.0099)  # 1.485 -> 1 and 3.38 -> 3 tokens
    assert counts[:2].tolist() == [[True, False, False, False]] * 2
    assert counts[2:, 0].all() and not counts[:, 2:].any()


@settings(max_examples=30)
@given(rollouts(), st.sampled_from([0.01, 0.35, 1.0]))
def test_tokens_that_are_not_counted_have_no_advantage(r, alpha):
    """Otherwise a token could have an advantage that the loss leaves out."""
    for name, rule in (("gfpo", gfpo), ("sgrpo", sgrpo)):
        counted = COUNTED[name](r, alpha)
        assert counted.dtype == torch.bool and not (counted & ~r.completion_mask).any()
        assert not rule(r, alpha)[~counted].any()
