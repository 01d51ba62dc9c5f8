"""The clipped surrogate, the KL estimate and the two means, compared with plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo_mini.objective import (
    aggregate,
    clipped_surrogate,
    kl_estimate,
    policy_loss,
    truncated_weights,
)

MASK = torch.arange(4) < torch.tensor([[4], [1], [2]])
VALUES = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 99.0, 99.0, 99.0], [5.0, 7.0, 99.0, 99.0]])


def batch(seed=0, rows=6, width=5):
    """Random log-probabilities of the current, old and reference policy, advantages and a mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(rows, width, generator=generator)

    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    logprobs = (-1 + 0.3 * draw()).requires_grad_()
    old, ref = -1 + 0.3 * draw(), -1 + 0.3 * draw()
    return logprobs, old, ref, draw(), torch.arange(width) < lengths


def plain_loss(logprobs, old, ref, advantages, mask, low, high, kl_coef, how):
    """-J with loops: TRL's "grpo" is the mean over rows of row means, its "bnpo" the token mean."""
    logprobs, rows = logprobs.detach(), []
    for i in range(len(mask)):
        row = []
        for t in range(mask.shape[1]):
            if mask[i, t]:
                ratio = math.exp(logprobs[i, t] - old[i, t])
                clipped = min(max(ratio, 1 - low), 1 + high)
                gain = min(ratio * advantages[i, t], clipped * advantages[i, t])
                d = float(ref[i, t] - logprobs[i, t])
                row.append(-(float(gain) - kl_coef * (math.exp(d) - d - 1)))
        rows.append(row)
    if how == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / sum(map(len, rows))


def test_aggregate_by_hand():
    assert float(aggregate(VALUES, MASK, "sequence")) == pytest.approx((2.5 + 10 + 6) / 3)
    assert float(aggregate(VALUES, MASK, "token")) == pytest.approx((10 + 10 + 12) / 7)


@pytest.mark.parametrize("how", ["sequence", "token"])
def test_aggregate_of_a_constant_is_the_constant(how):
    """Both are means for all lengths."""
    assert float(aggregate(torch.full((3, 4), 2.5), MASK, how)) == pytest.approx(2.5)


@pytest.mark.parametrize("how", ["sequence", "token"])
def test_aggregate_of_rows_without_tokens_is_finite(how):
    assert float(aggregate(VALUES, torch.zeros_like(MASK), how)) == 0.0


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="aggregation must be one of sequence, token, got 'dapo'"):
        aggregate(VALUES, MASK, "dapo")


@pytest.mark.parametrize("advantage", [-2.0, -0.5, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("ratio", [0.1, 0.7, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 3.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, None), (0.2, 0.28)])
def test_clipped_surrogate(ratio, advantage, low, high):
    upper = 1 + (low if high is None else high)
    clipped_ratio = min(max(ratio, 1 - low), upper)
    expected = min(ratio * advantage, clipped_ratio * advantage)
    binds = (advantage > 0 and ratio > upper) or (advantage < 0 and ratio < 1 - low)
    logprobs = torch.tensor([[math.log(ratio) - 1.3]], requires_grad=True)
    value, clipped = clipped_surrogate(
        logprobs, torch.tensor([[-1.3]]), torch.tensor([[advantage]]), low, high
    )
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert bool(clipped) is binds
    # A clipped token has no gradient; the others have d(rho A) / d log pi = rho A.
    value.sum().backward()
    assert float(logprobs.grad) == pytest.approx(0.0 if binds else ratio * advantage, rel=1e-5)


def test_on_policy_gradient_is_the_advantage():
    """At ratio 1 nothing is clipped and the gradient is that of A log pi."""
    logprobs, _, _, advantages, _ = batch()
    value, clipped = clipped_surrogate(logprobs, logprobs.detach(), advantages)
    value.sum().backward()
    torch.testing.assert_close(logprobs.grad, advantages)
    assert not clipped.any()


@settings(max_examples=50)
@given(st.floats(-8, 0), st.floats(-8, 0))
def test_kl_estimate_is_never_negative(logprob, ref):
    value = float(kl_estimate(*torch.tensor([logprob, ref], dtype=torch.double)))
    ratio = math.exp(ref - logprob)
    assert value == pytest.approx(ratio - math.log(ratio) - 1, abs=1e-9)
    assert value >= 0
    if abs(logprob - ref) > 1e-3:
        assert value > 0


def test_kl_estimate_is_zero_at_equality_and_flat_there():
    logprobs = torch.tensor([-0.3, -4.0], requires_grad=True)
    value = kl_estimate(logprobs, logprobs.detach())
    assert value.tolist() == [0.0, 0.0]
    value.sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_kl_estimate_is_unbiased():
    """Its mean over the policy's tokens is KL(pi || pi_ref), not KL(pi_ref || pi)."""
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    expected = float((p * (p / q).log()).sum())
    assert float((p * kl_estimate(p.log(), q.log())).sum()) == pytest.approx(expected)


@pytest.mark.parametrize("how", ["sequence", "token"])
@pytest.mark.parametrize("high", [None, 0.28])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
def test_loss_equals_the_formula(how, high, kl_coef):
    logprobs, old, ref, advantages, mask = batch()
    loss, stats = policy_loss(
        logprobs, old, advantages, mask,
        ref_logprobs=ref, kl_coef=kl_coef, epsilon=0.2, epsilon_high=high, aggregation=how,
    )  # fmt: skip
    upper = 0.2 if high is None else high
    expected = plain_loss(logprobs, old, ref, advantages, mask, 0.2, upper, kl_coef, how)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    d = (ref - logprobs.detach())[mask]
    assert stats["kl"] == pytest.approx(float((d.exp() - d - 1).mean()), rel=1e-5)
    ratio, a = (logprobs.detach() - old).exp()[mask], advantages[mask]
    clipped = ((a > 0) & (ratio > 1 + upper)) | ((a < 0) & (ratio < 0.8))
    assert 0 < stats["clip_ratio"] == pytest.approx(float(clipped.float().mean()))


def test_sequence_and_token_means_differ_in_how_they_weigh_lengths():
    """One gives equal weight to completions, one to tokens; for equal lengths they agree."""
    logprobs, old, _, advantages, mask = batch()
    losses = [
        policy_loss(logprobs, old, advantages, m, aggregation=how)[0].item()
        for m in (mask, torch.ones_like(mask))
        for how in ("sequence", "token")
    ]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert losses[2] == pytest.approx(losses[3], rel=1e-5)


def test_without_a_reference_there_is_no_kl():
    logprobs, old, _, advantages, mask = batch()
    loss, stats = policy_loss(logprobs, old, advantages, mask)
    assert stats["kl"] == 0.0
    plain = plain_loss(logprobs, old, old, advantages, mask, 0.2, 0.2, 0.0, "sequence")
    assert loss.item() == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("how", ["sequence", "token"])
def test_padding_has_no_gradient(how):
    logprobs, old, ref, advantages, mask = batch()
    options = dict(ref_logprobs=ref, kl_coef=0.1, aggregation=how)
    policy_loss(logprobs, old, advantages, mask, **options)[0].backward()
    assert not logprobs.grad[~mask].any()
    assert logprobs.grad[mask].abs().max() > 0


@pytest.mark.parametrize("how", ["sequence", "token"])
def test_micro_batches_add_up_to_the_whole(how):
    """Parts weighted by rows (sequence) or tokens (token) give the whole batch's gradient."""
    logprobs, old, ref, advantages, mask = batch()

    def loss(*tensors):
        logprobs, old, ref, advantages, mask = tensors
        options = dict(ref_logprobs=ref, kl_coef=0.1, aggregation=how)
        return policy_loss(logprobs, old, advantages, mask, **options)[0]

    whole = loss(logprobs, old, ref, advantages, mask)
    (expected,) = torch.autograd.grad(whole, logprobs)
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = loss(*(x[rows] for x in (logprobs, old, ref, advantages, mask)))
        counted = mask.any(1) if how == "sequence" else mask
        total = total + part * float(counted[rows].sum() / counted.sum())
    torch.testing.assert_close(torch.autograd.grad(total, logprobs)[0], expected)
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)


def test_weights_are_the_ratio_of_both_policies_up_to_the_cap():
    old, sampled = torch.tensor([[-1.0, -1.0, -2.0]]), torch.tensor([[-1.0, -0.5, -5.0]])
    expected = [[1.0, math.exp(-0.5), 2.0]]
    torch.testing.assert_close(truncated_weights(old, sampled, 2.0), torch.tensor(expected))


@pytest.mark.parametrize("how", ["sequence", "token"])
def test_weights_multiply_the_surrogate_and_leave_the_kl_term(how):
    logprobs, old, ref, advantages, mask = batch()
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) * 2
    loss, stats = policy_loss(
        logprobs, old, advantages, mask, ref_logprobs=ref, kl_coef=0.1, weights=weights,
        aggregation=how,
    )  # fmt: skip
    # A positive weight of a token acts as a factor of its advantage.
    expected = plain_loss(logprobs, old, ref, advantages * weights, mask, 0.2, 0.2, 0.1, how)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
    _, without = policy_loss(logprobs, old, advantages, mask, ref_logprobs=ref, kl_coef=0.1)
    assert stats == without
