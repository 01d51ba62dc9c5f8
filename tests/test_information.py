"""The early-exit estimator: packed against the definition, off-by-ones, chain rule, calibration."""

import math

import pytest
import torch
from helpers import TRIVIAL, make_rollouts, perturb_lora, redraw, unpadded
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from iapo_mini.information import (
    answer_entropies,
    branch_inputs,
    encode_postfix,
    entropy,
    exit_calibration,
    expected_calibration_error,
    informativeness,
)
from iapo_mini.policy import Policy, load_policy
from iapo_mini.rollouts import sample
from iapo_mini.tasks import POSTFIX

# Each number with its space is one token: postfixes of 1 to 8 tokens.
POSTFIXES = ["".join(f" {n}" for n in range(7, 7 + k)) for k in range(1, 9)]


def family(name, tokenizer):
    """A random policy of another architecture, with fewer key-value than query heads."""
    sizes = dict(
        vocab_size=864,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if name == "llama":
        return Policy(redraw(LlamaForCausalLM(LlamaConfig(**sizes))), tokenizer)
    return Policy(redraw(Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=24))), tokenizer)


@torch.no_grad()
def entropy_after(policy, rollouts, i, t, postfix):
    """H(y | q, o_<=t) of row i spelled out: prompt, first t completion tokens, postfix, forward."""
    prompt, completion = unpadded(rollouts, i)
    ids = torch.cat([prompt, completion[:t], encode_postfix(policy, postfix)])
    logits = policy.model(ids[None], use_cache=False).logits[0, -1]
    return float(torch.distributions.Categorical(logits=logits).entropy())


def explicit(policy, rollouts, postfix):
    out = torch.zeros(len(rollouts.lengths), rollouts.completion_ids.shape[1] + 1)
    for i, n in enumerate(rollouts.lengths.tolist()):
        for t in range(n + 1):
            out[i, t] = entropy_after(policy, rollouts, i, t, postfix)
    return out


@pytest.mark.parametrize("postfix", [*POSTFIXES, POSTFIX])
def test_postfixes_have_the_lengths_meant(base_policy, postfix):
    expected = 2 if postfix == POSTFIX else postfix.count(" ")
    assert len(encode_postfix(base_policy, postfix)) == expected


@settings(max_examples=25)
@given(data=st.data(), group=st.integers(1, 3), seed=st.integers(0, 99))
def test_packed_equals_the_definition(base_policy, data, group, seed):
    prompts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3), label="prompts")
    rows = group * len(prompts)
    lengths = st.lists(st.integers(0, 10), min_size=rows, max_size=rows)
    completions = data.draw(lengths, label="completions")
    rollouts = make_rollouts(
        prompts,
        completions,
        group,
        seed=seed,
        left=data.draw(st.integers(0, 4), label="left"),
        right=data.draw(st.integers(0, 4), label="right"),
    )
    postfix = data.draw(st.sampled_from([*POSTFIXES, POSTFIX]), label="postfix")
    naive = answer_entropies(base_policy, rollouts, postfix, method="naive")
    packed = answer_entropies(
        base_policy,
        rollouts,
        postfix,
        method="packed",
        rows_per_block=data.draw(st.integers(1, 16), label="rows_per_block"),
        chunk_size=data.draw(st.sampled_from([1, 2, 7, 256]), label="chunk_size"),
    )
    assert packed.shape == (rows, rollouts.completion_ids.shape[1] + 1)
    torch.testing.assert_close(packed, naive, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["packed", "naive"])
@pytest.mark.parametrize("postfix", [POSTFIX, POSTFIXES[0], POSTFIXES[4]])
def test_column_t_follows_t_completion_tokens(base_policy, method, postfix):
    rollouts = make_rollouts([4, 9], [5, 1, 3, 6], group=2, left=2, right=1)
    expected = explicit(base_policy, rollouts, postfix)
    found = answer_entropies(base_policy, rollouts, postfix, method=method, chunk_size=3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # Neighbouring columns differ, so a shift by one would have been seen.
    for i, n in enumerate(rollouts.lengths.tolist()):
        assert (expected[i, 1 : n + 1] - expected[i, :n]).abs().min() > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_other_architectures(tokenizer, name):
    policy = family(name, tokenizer)
    rollouts = make_rollouts([4, 9, 2], [5, 1, 3, 6, 0, 4], group=2)
    expected = explicit(policy, rollouts, POSTFIX)
    for chunk_size, rows_per_block in [(1, 2), (7, 4), (256, 16)]:
        found = answer_entropies(
            policy, rollouts, chunk_size=chunk_size, rows_per_block=rows_per_block
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_adapter_is_used(lora_policy):
    """Entropies are those of the current policy, not of the base below the adapter."""
    rollouts = make_rollouts([4, 9], [5, 1, 3, 6], group=2)
    before = answer_entropies(lora_policy, rollouts)
    perturb_lora(lora_policy)
    after = answer_entropies(lora_policy, rollouts)
    expected = explicit(lora_policy, rollouts, POSTFIX)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(before, after, atol=1e-2)


def test_sampled_rollouts(stopping_policy):
    rollouts = sample(stopping_policy, TRIVIAL, num_generations=4, max_completion_length=12)
    found = answer_entropies(stopping_policy, rollouts)
    expected = explicit(stopping_policy, rollouts, POSTFIX)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_branches_stand_behind_their_own_prefix():
    """Two rows by hand: the first has two columns of left-padding; K = 2, branches after 2 ends."""
    trunk_mask = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    position_ids = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]])
    ends = torch.tensor([[2, 4], [0, 3]])
    inputs = branch_inputs(trunk_mask, position_ids, ends, torch.tensor([50, 60]))
    assert inputs["input_ids"].tolist() == [[50, 60, 50, 60]] * 2
    assert inputs["position_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 4, 5]]
    expected = [
        [
            [0, 0, 1, 0, 0, 1, 0, 0, 0],
            [0, 0, 1, 0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0, 0, 1, 0],
            [0, 0, 1, 1, 1, 0, 0, 1, 1],
        ],
        [
            [1, 0, 0, 0, 0, 1, 0, 0, 0],
            [1, 0, 0, 0, 0, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 1, 0],
            [1, 1, 1, 1, 0, 0, 0, 1, 1],
        ],
    ]
    assert inputs["attention_mask"].dtype == torch.bool
    assert inputs["attention_mask"][:, 0].int().tolist() == expected


def test_estimating_consumes_no_randomness_and_keeps_no_graph(base_policy):
    before = torch.get_rng_state()
    found = answer_entropies(base_policy, make_rollouts([4], [3, 2], group=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not found.requires_grad


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_informativeness_telescopes(lengths, seed):
    """Chain rule: what the tokens tell sums to what the whole completion tells."""
    generator = torch.Generator().manual_seed(seed)
    width = max(1, *lengths)
    entropies = 5 * torch.rand(len(lengths), width + 1, generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    s = informativeness(entropies, mask)
    assert s.shape == mask.shape and not s[~mask].any()
    for i, n in enumerate(lengths):
        for t in range(n):
            assert float(s[i, t]) == pytest.approx(float(entropies[i, t] - entropies[i, t + 1]))
        whole = float(entropies[i, 0] - entropies[i, n])
        assert float(s[i].sum()) == pytest.approx(whole, abs=1e-5)


def test_informativeness_sign():
    """A token that makes the answer surer is informative; one that confuses counts negative."""
    s = informativeness(torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([[True, True]]))
    assert s.tolist() == [[1.5, -0.5]]


@settings(max_examples=30)
@given(st.integers(0, 999), st.floats(0, 50))
def test_entropy_is_that_of_the_categorical_distribution(seed, scale):
    logits = scale * torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(seed))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), expected, atol=1e-5, rtol=1e-5)


def test_entropy_of_known_distributions():
    assert float(entropy(torch.full((1000,), 3.0))) == pytest.approx(math.log(1000), rel=1e-6)
    assert float(entropy(torch.tensor([1e4, 0.0, -1e4]))) == 0.0
    half = torch.tensor([5.0, 5.0, -1e4])
    assert float(entropy(half)) == pytest.approx(math.log(2), rel=1e-6)


def test_entropy_of_half_precision_logits_is_computed_in_full_precision():
    logits = torch.zeros(50_000, dtype=torch.bfloat16)
    assert entropy(logits).dtype == torch.float32
    assert float(entropy(logits)) == pytest.approx(math.log(50_000), rel=1e-5)


@pytest.mark.parametrize(
    ("confidence", "correct", "error"),
    [
        ([1.0] * 4, [1, 1, 1, 1], 0.0),
        ([0.0] * 4, [0, 0, 0, 0], 0.0),
        ([0.8] * 5, [1, 1, 1, 1, 0], 0.0),
        ([1.0] * 4, [1, 0, 1, 0], 0.5),
        ([0.5] * 4, [1, 1, 1, 1], 0.5),
        # Two bins: three at 0.9 with 1/3 right (gap 17/30), one at 0.1 that is right (gap 0.9).
        ([0.9, 0.9, 0.9, 0.1], [1, 0, 0, 1], 0.75 * (0.9 - 1 / 3) + 0.25 * 0.9),
        # Gaps of opposite sign in two bins do not cancel.
        ([0.75, 0.25], [0, 1], 0.75),
    ],
)
def test_calibration_error_by_hand(confidence, correct, error):
    found = expected_calibration_error(torch.tensor(confidence), torch.tensor(correct).bool())
    assert found == pytest.approx(error, abs=1e-6)


def test_calibration_error_with_one_bin_is_the_overall_gap():
    confidence, correct = torch.tensor([0.75, 0.25]), torch.tensor([False, True])
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(0.0)


@torch.no_grad()
def test_exit_calibration_asks_after_equal_parts(schooled_folder):
    """Against explicit forwards, with references that the policy gives at some of the exits."""
    policy = load_policy(schooled_folder, lora_rank=0)
    rollouts = sample(policy, TRIVIAL, num_generations=4, max_completion_length=12)
    answers = ["4", "5", "6", "7"] * 2
    found = exit_calibration(policy, rollouts, answers, parts=4)
    for i, n in enumerate(rollouts.lengths.tolist()):
        prompt, completion = unpadded(rollouts, i)
        truth = policy.tokenizer.encode(f" {answers[i]}")
        for part in range(5):
            t = round(n * part / 4)  # halves go to the even neighbour, as in torch
            ids = torch.cat([prompt, completion[:t], encode_postfix(policy)])
            p = torch.softmax(policy.model(ids[None]).logits[0, -1], dim=-1)
            h = float(torch.distributions.Categorical(p).entropy())
            assert float(found["confidence"][i, part]) == pytest.approx(float(p.max()), abs=1e-4)
            assert float(found["entropy"][i, part]) == pytest.approx(h, abs=1e-4)
            assert bool(found["correct"][i, part]) == ([int(p.argmax())] == truth)
    assert 0 < found["correct"].float().mean() < 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("method", "exact"),
        ("postfix", ""),
        ("rows_per_block", 0),
        ("chunk_size", 0),
        ("chunk_size", -3),
    ],
)
def test_bad_arguments_are_refused(base_policy, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value!r}"):
        answer_entropies(base_policy, make_rollouts([4], [3, 2], group=2), **{argument: value})
