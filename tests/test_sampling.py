"""Sampling, compared with transformers' generate and plain forward passes."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers import (
    TRIVIAL,
    close,
    perturb_lora,
    plain_log_softmax,
    plain_logprobs,
    unpadded,
)
from transformers import DynamicCache

from iapo_mini.chat import render_prompt
from iapo_mini.logprobs import token_logprobs
from iapo_mini.problems.stories import stories
from iapo_mini.sampling import _GrowingLayer, encode_prompts, from_ids, from_texts, sample
from iapo_mini.tasks import Problem

# Prompts of different lengths, so every test includes left padding.
PROBLEMS = [*TRIVIAL, *itertools.islice(stories("test"), 2)]


def first_token_probabilities(policy, problem, temperature=1.0):
    ids = policy.tokenizer(render_prompt(policy.tokenizer, problem), return_tensors="pt").input_ids
    with torch.no_grad():
        return torch.softmax(policy.model(ids).logits[0, -1].double() / temperature, dim=-1)


def chi_square(counts, expected):
    """Chi-square statistic over tokens expected at least 10 times; the others are one class."""
    often = expected >= 10
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def too_large(df):
    """A value that chance does not give: mean plus five standard deviations of chi-square."""
    return df + 5 * math.sqrt(2 * df)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_have_the_policys_distribution(base_policy, temperature):
    # The shorter prompt is next to a longer one and so is padded.
    problems, n = [PROBLEMS[0], PROBLEMS[2]], 5000
    drawn = [
        sample(
            base_policy,
            problems,
            num_generations=n // 5,
            max_completion_length=1,
            temperature=temperature,
            seed=seed,
        ).completion_ids.view(2, -1)
        for seed in range(5)
    ]
    for problem, tokens in zip(problems, torch.cat(drawn, dim=1)):
        p = first_token_probabilities(base_policy, problem, temperature)
        counts = torch.bincount(tokens, minlength=len(p)).double()
        statistic, df = chi_square(counts, n * p)
        assert df >= 10 and statistic < too_large(df)
        # The bound would detect a temperature that is off by a tenth, which adds to the statistic
        # twice the distance between its mean and the bound.
        for wrong in (0.9 * temperature, 1.1 * temperature):
            q = first_token_probabilities(base_policy, problem, wrong)
            assert chi_square(n * q, n * p)[0] > 2 * (too_large(df) - df)


def test_pairs_of_tokens_are_distributed_as_generate_draws_them(base_policy):
    """The second token depends on the KV cache, so pairs of tokens are compared."""
    n, problem = 1500, PROBLEMS[0]
    rollouts = sample(base_policy, [problem], num_generations=n, max_completion_length=2)
    ids, mask = encode_prompts(base_policy, [problem])
    drawn = base_policy.model.generate(
        ids,
        attention_mask=mask.long(),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=2,
        num_return_sequences=n,
    )[:, ids.shape[1] :]
    ours = Counter(map(tuple, rollouts.completion_ids.tolist()))
    theirs = Counter(map(tuple, drawn.tolist()))
    frequent = [pair for pair, c in (ours + theirs).items() if c >= 20]
    assert len(frequent) >= 10
    # For two samples of one distribution, a difference of counts has their sum as variance.
    statistic = sum((ours[k] - theirs[k]) ** 2 / (ours[k] + theirs[k]) for k in frequent)
    assert statistic < too_large(len(frequent))
    # generate at another temperature exceeds the bound, so the bound is meaningful.
    other = base_policy.model.generate(
        ids,
        attention_mask=mask.long(),
        do_sample=True,
        top_k=0,
        temperature=0.7,
        max_new_tokens=2,
        num_return_sequences=n,
    )[:, ids.shape[1] :]
    other = Counter(map(tuple, other.tolist()))
    frequent = [pair for pair, c in (ours + other).items() if c >= 20]
    statistic = sum((ours[k] - other[k]) ** 2 / (ours[k] + other[k]) for k in frequent)
    assert statistic > too_large(len(frequent))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_old_logprobs_are_those_of_a_plain_forward_pass(lora_policy, temperature):
    policy = perturb_lora(lora_policy)
    rollouts = sample(
        policy, PROBLEMS, num_generations=3, max_completion_length=10, temperature=temperature
    )
    with torch.no_grad():
        expected = plain_logprobs(policy.model, rollouts, temperature)
    torch.testing.assert_close(rollouts.old_logprobs, expected, atol=1e-4, rtol=0)
    for i, n in enumerate(rollouts.lengths.tolist()):
        with torch.no_grad():
            log_p = plain_log_softmax(policy.model, rollouts, i, temperature)
        entropies = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(rollouts.token_entropies[i, :n], entropies, atol=1e-4, rtol=0)
        assert not rollouts.token_entropies[i, n:].any()


def test_equal_seeds_give_equal_rollouts(base_policy):
    sizes = dict(num_generations=4, max_completion_length=8)
    one, again, other = (sample(base_policy, PROBLEMS, seed=s, **sizes) for s in (3, 3, 4))
    assert "token_entropies" in one.tensors()
    for name, value in one.tensors().items():
        assert torch.equal(value, again.tensors()[name]), name
    assert not torch.equal(one.completion_ids, other.completion_ids)


def test_sampling_leaves_global_random_state_alone(base_policy):
    before = torch.get_rng_state()
    sample(base_policy, PROBLEMS, num_generations=2, max_completion_length=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_are_adjacent_completions_of_their_prompt(base_policy):
    rollouts = sample(base_policy, PROBLEMS, num_generations=3, max_completion_length=2)
    for i in range(12):
        text = render_prompt(base_policy.tokenizer, PROBLEMS[i // 3])
        assert base_policy.tokenizer.decode(unpadded(rollouts, i)[0]) == text


def test_rows_end_with_a_stop_token_or_at_the_limit(stopping_policy):
    limit = 12
    rollouts = sample(
        stopping_policy, PROBLEMS, num_generations=16, max_completion_length=limit, seed=1
    )
    stop = set(stopping_policy.eos_ids.tolist())
    pad = stopping_policy.tokenizer.pad_token_id
    for i, finished in enumerate(rollouts.finished.tolist()):
        n = int(rollouts.lengths[i])
        completion = rollouts.completion_ids[i].tolist()
        assert rollouts.completion_mask[i].tolist() == [t < n for t in range(len(completion))]
        assert not stop & set(completion[: n - 1])
        assert finished == (completion[n - 1] in stop)
        assert finished or n == limit
        assert set(completion[n:]) <= {pad}
        assert not rollouts.old_logprobs[i, n:].any()
        assert (rollouts.old_logprobs[i, :n] < 0).all()
    # Both kinds of ending must occur for a meaningful test.
    assert 0 < rollouts.finished.sum() < len(rollouts.finished)


def test_a_stop_token_at_the_limit_counts_as_finished(stopping_policy):
    rollouts = sample(stopping_policy, PROBLEMS, num_generations=32, max_completion_length=1)
    stopped = torch.isin(rollouts.completion_ids[:, 0], stopping_policy.eos_ids)
    assert stopped.any() and not stopped.all()
    assert torch.equal(rollouts.finished, stopped)


def test_width_is_that_of_the_longest_row(stopping_policy):
    rollouts = sample(stopping_policy, PROBLEMS[:1], num_generations=2, max_completion_length=400)
    assert rollouts.finished.all()
    assert rollouts.completion_ids.shape[1] == int(rollouts.lengths.max()) < 400


@torch.no_grad()
def test_dropping_finished_rows_changes_no_other_row(stopping_policy):
    """Repeats each row alone with the same uniform numbers and without a cache."""
    group, limit, seed = 6, 20, 5
    rollouts = sample(
        stopping_policy,
        PROBLEMS[1:3],
        num_generations=group,
        max_completion_length=limit,
        temperature=0.9,
        seed=seed,
    )
    model, tokenizer = stopping_policy.model, stopping_policy.tokenizer
    stop = set(stopping_policy.eos_ids.tolist())
    rows = [
        tokenizer.encode(render_prompt(tokenizer, problem))
        for problem in PROBLEMS[1:3]
        for _ in range(group)
    ]
    starts, running = [len(row) for row in rows], [True] * len(rows)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(limit):
        uniforms = torch.rand(len(rows), generator=generator)
        for i, row in enumerate(rows):
            if running[i]:
                p = torch.softmax(model(torch.tensor([row])).logits[0, -1] / 0.9, dim=-1)
                row.append(int((p.cumsum(0) <= uniforms[i] * p.sum()).sum()))
                running[i] = row[-1] not in stop
    expected = [row[start:] for row, start in zip(rows, starts)]
    assert [unpadded(rollouts, i)[1].tolist() for i in range(len(rows))] == expected
    plain = plain_logprobs(model, rollouts, temperature=0.9)
    torch.testing.assert_close(rollouts.old_logprobs, plain, atol=1e-4, rtol=0)
    # Rows dropped out early and others ran on.
    assert min(map(len, expected)) < limit / 4 and max(map(len, expected)) > limit / 2


def test_given_texts_become_rollouts(base_policy):
    """The rows have the tokens of the texts, an end token, and the prompt of the problem."""
    written = ["<think> 3.</think><answer> 3</answer>", "hm", ""]
    rollouts = from_texts(base_policy, PROBLEMS[:3], written)
    tokenizer, eos = base_policy.tokenizer, base_policy.tokenizer.eos_token_id
    for i, text in enumerate(written):
        prompt, completion = unpadded(rollouts, i)
        assert tokenizer.decode(prompt) == render_prompt(tokenizer, PROBLEMS[i])
        assert completion.tolist() == [*tokenizer.encode(text), eos]
    assert rollouts.texts(tokenizer) == written
    assert rollouts.num_generations == 1 and rollouts.finished.all()
    # The rest of the pipeline accepts them.
    with torch.no_grad():
        logprobs, _ = token_logprobs(base_policy.model, rollouts)
        plain = plain_logprobs(base_policy.model, rollouts)
    torch.testing.assert_close(logprobs, plain, atol=1e-4, rtol=0)


def test_given_ids_become_rollouts(base_policy):
    """Two completions for each of two prompts; one of them does not end."""
    ids, mask = encode_prompts(base_policy, PROBLEMS[1:3])
    eos, pad = base_policy.tokenizer.eos_token_id, base_policy.tokenizer.pad_token_id
    rows = [[5, 6, eos], [7, eos], [8, 9], [eos]]
    rollouts = from_ids(base_policy, ids, mask, rows, 2)
    assert rollouts.num_generations == 2
    assert rollouts.finished.tolist() == [True, True, False, True]
    assert not rollouts.old_logprobs.any() and not rollouts.known
    for i, row in enumerate(rows):
        prompt, completion = unpadded(rollouts, i)
        assert torch.equal(prompt, ids[i // 2][mask[i // 2]])
        assert completion.tolist() == row
        assert rollouts.completion_ids[i, len(row) :].tolist() == [pad] * (3 - len(row))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_generations", 0),
        ("num_generations", -2),
        ("max_completion_length", 0),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("temperature", -1.0),
        ("temperature", math.nan),
    ],
)
def test_bad_arguments_are_refused(base_policy, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        sample(base_policy, [Problem("1 + 1?", "2")], **{name: value})


def test_no_problems_are_refused(base_policy):
    with pytest.raises(ValueError, match="problems is empty"):
        sample(base_policy, [])


# Keys and values kept for the estimator


@pytest.mark.parametrize("limit", [1, 6, 40])
@pytest.mark.parametrize("block", [3, 128])
def test_kept_keys_are_those_of_a_plain_pass(stopping_policy, monkeypatch, limit, block):
    monkeypatch.setattr(_GrowingLayer, "block", block)
    sizes = dict(num_generations=16, max_completion_length=limit, seed=1)
    rollouts = sample(stopping_policy, TRIVIAL, keep_cache=True, **sizes)
    plain = sample(stopping_policy, TRIVIAL, **sizes)
    assert plain.cache is None
    kept = rollouts.tensors()
    for name, value in plain.tensors().items():
        if not name.endswith(("logprobs", "entropies")):
            assert torch.equal(value, kept[name]), name
    close(rollouts.old_logprobs, plain.old_logprobs, atol=1e-5)
    close(rollouts.token_entropies, plain.token_entropies, atol=1e-5)
    config = stopping_policy.model.config
    assert len(rollouts.cache) == 32
    for i, layers in enumerate(rollouts.cache):
        ids = torch.cat(unpadded(rollouts, i))
        cache = DynamicCache()
        with torch.no_grad():
            stopping_policy.model(ids[None], past_key_values=cache)
        assert len(layers) == config.num_hidden_layers
        for (key, value), layer in zip(layers, cache.layers):
            assert key.shape == value.shape == (len(ids), config.num_key_value_heads, 32)
            close(key, layer.keys[0].transpose(0, 1))
            close(value, layer.values[0].transpose(0, 1))
    # Rows that end by themselves and, unless the limit is far, rows that are cut.
    assert rollouts.finished.any() and (limit == 40 or not rollouts.finished.all())
    assert limit == 1 or len(set(rollouts.lengths.tolist())) > 2


def test_temperature_0_takes_the_most_likely_token(base_policy):
    rollouts = sample(
        base_policy, PROBLEMS, num_generations=2, max_completion_length=8, temperature=0, seed=1
    )
    other = sample(
        base_policy, PROBLEMS, num_generations=2, max_completion_length=8, temperature=0, seed=2
    )
    assert torch.equal(rollouts.completion_ids, other.completion_ids)
    assert torch.equal(rollouts.completion_ids[0::2], rollouts.completion_ids[1::2])
    with torch.no_grad():
        expected = plain_logprobs(base_policy.model, rollouts)
        for i in range(len(rollouts.lengths)):
            log_p = plain_log_softmax(base_policy.model, rollouts, i)
            assert torch.equal(log_p.argmax(-1), unpadded(rollouts, i)[1])
    close(rollouts.old_logprobs, expected, atol=1e-4)
