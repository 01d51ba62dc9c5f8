"""Asking after every prefix: each way is compared with a forward pass for every prefix."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import (
    BATCH,
    POSTFIXES,
    TRIVIAL,
    WAYS,
    close,
    entropies_by,
    explicit_entropies,
    make_rollouts,
    only,
    padded_pairs,
    perturb_lora,
    tiny_policy,
    unpadded,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo_mini import devices
from iapo_mini.early_exit import flat, prefixes
from iapo_mini.early_exit.prefixes import ask
from iapo_mini.early_exit.question import EarlyExit, Question
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.information import answer_entropies, encode_postfix
from iapo_mini.policy import Policy, load_policy
from iapo_mini.sampling import sample
from iapo_mini.tasks import POSTFIX


@pytest.mark.parametrize("postfix", [*POSTFIXES, POSTFIX])
def test_postfixes_have_the_intended_lengths(base_policy, postfix):
    expected = 2 if postfix == POSTFIX else postfix.count(" ")
    assert len(encode_postfix(base_policy, postfix)) == expected


@st.composite
def batches(draw, longest=10):
    """Rollouts of few different random tokens, so completions can begin alike."""
    prompts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    group = draw(st.integers(1, 3))
    rows = group * len(prompts)
    return make_rollouts(
        prompts,
        draw(st.lists(st.integers(0, longest), min_size=rows, max_size=rows)),
        group,
        vocabulary=draw(st.sampled_from([3, 800])),
        seed=draw(st.integers(0, 99)),
        left=draw(st.integers(0, 4)),
        right=draw(st.integers(0, 4)),
    )


@settings(max_examples=25)
@given(
    rollouts=batches(),
    postfix=st.sampled_from([*POSTFIXES, POSTFIX]),
    chunk_size=st.sampled_from([1, 2, 7, None]),
    memory_mb=st.sampled_from([0.01, 256.0]),
    queries=st.sampled_from([1, 3, 128]),
)
def test_every_way_equals_the_definition(
    base_policy, monkeypatch, rollouts, postfix, chunk_size, memory_mb, queries
):
    monkeypatch.setattr(flat, "_QUERIES", queries)
    expected = explicit_entropies(base_policy, rollouts, postfix)
    for way in WAYS:
        found = entropies_by(
            way, base_policy, rollouts, postfix, chunk_size=chunk_size, memory_mb=memory_mb
        )
        assert found.dtype == torch.float32, way
        close(found, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_the_last_positions_of_the_suffix_are_kept(base_policy, way, keep):
    """Compares all kept log-probabilities, with a different suffix for each row."""
    rollouts = make_rollouts(**BATCH, left=1)
    suffix = torch.randint(1, 800, (6, 5), generator=torch.Generator().manual_seed(keep))
    question = Question(suffix, lambda _, x: x.log_softmax(-1)[..., ::50].flatten(1), keep=keep)
    with only(way, chunk_size=4) as how:
        found = ask(base_policy.model, rollouts, question, how)
    for i, n in enumerate(rollouts.lengths.tolist()):
        prompt, completion = unpadded(rollouts, i)
        for t in range(n + 1):
            ids = torch.cat([prompt, completion[:t], suffix[i]])
            with torch.no_grad():
                log_p = base_policy.model(ids[None]).logits[0, -keep:].log_softmax(-1)
            close(found[i, t], log_p[:, ::50].flatten(), atol=1e-3)
        assert not found[i, n + 1 :].any()


@pytest.mark.parametrize("way", WAYS)
def test_only_asked_prefixes_get_values(base_policy, way):
    rollouts = make_rollouts(**BATCH, right=2)
    expected = explicit_entropies(base_policy, rollouts)
    asked = torch.rand(expected.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    asked[3] = False
    reached = torch.arange(expected.shape[1]) <= rollouts.lengths[:, None]
    seen = []

    def read(rows, logits):
        seen.extend(rows.tolist())
        return logits_entropy(logits)

    question = Question(encode_postfix(base_policy), read)
    with only(way, chunk_size=2) as how:
        found = ask(base_policy.model, rollouts, question, how, asked)[..., 0]
    close(found, expected * asked)
    assert (asked & ~reached).any() and len(seen) <= int((asked & reached).sum())


def test_the_estimator_uses_no_random_numbers_and_keeps_no_graph(base_policy):
    before = torch.get_rng_state()
    for way in WAYS:
        found = entropies_by(way, base_policy, make_rollouts([4], [3, 2], group=2))
        assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_a_schooled_policy(schooled_folder):
    """Uses trained weights, the real postfix and sampled text."""
    policy = load_policy(schooled_folder, lora_rank=0)
    rollouts = sample(policy, TRIVIAL, num_generations=4, max_completion_length=12)
    expected = explicit_entropies(policy, rollouts)
    for way in WAYS:
        close(entropies_by(way, policy, rollouts), expected)


# Off-by-ones of the released code


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("postfix", [POSTFIX, POSTFIXES[0], POSTFIXES[4]])
def test_column_t_follows_t_completion_tokens(base_policy, way, postfix):
    rollouts = make_rollouts([4, 9], [5, 1, 3, 6], group=2, left=2, right=1)
    expected = explicit_entropies(base_policy, rollouts, postfix)
    close(entropies_by(way, base_policy, rollouts, postfix, chunk_size=3), expected)
    # Neighbouring columns differ, so the test would detect a shift by one.
    for i, n in enumerate(rollouts.lengths.tolist()):
        assert (expected[i, 1 : n + 1] - expected[i, :n]).abs().min() > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_a_token_is_seen_from_its_own_column_on(base_policy, way):
    """The cached prefix is neither one token too short nor one too long."""
    rollouts = make_rollouts([4, 9], [6, 6, 6, 6], group=2, left=1)
    before = entropies_by(way, base_policy, rollouts)
    for t in range(6):
        ids = rollouts.completion_ids.clone()
        ids[:, t] = ids[:, t] % 800 + 1
        after = entropies_by(way, base_policy, replace(rollouts, completion_ids=ids))
        close(after[:, : t + 1], before[:, : t + 1], atol=1e-5)
        assert (after[:, t + 1] - before[:, t + 1]).abs().min() > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_short_prefixes_next_to_long_ones_keep_their_positions(base_policy, way):
    """The values of a row depend neither on its chunk nor on other rows."""
    rollouts = make_rollouts(**BATCH)
    whole = entropies_by(way, base_policy, rollouts)
    for chunk_size in (1, 2, 3, 50):
        close(entropies_by(way, base_policy, rollouts, chunk_size=chunk_size), whole, atol=1e-5)
    for start in (0, 2, 4):
        part = rollouts.rows(start, start + 2)
        found = entropies_by(way, base_policy, part)
        close(found, whole[start : start + 2, : found.shape[1]], atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [{"left": 5}, {"right": 5}, {"left": 3, "right": 2}])
def test_padding_has_no_effect(base_policy, way, padding):
    plain = entropies_by(way, base_policy, make_rollouts(**BATCH))
    for pad in (0, 7):
        found = entropies_by(way, base_policy, make_rollouts(**BATCH, **padding, pad=pad))
        close(found[:, : plain.shape[1]], plain, atol=1e-5)
        assert not found[:, plain.shape[1] :].any()


@settings(max_examples=12)
@given(padded_pairs(), st.integers(1, 6))
def test_a_row_gets_the_same_values_alone(base_policy, pair, chunk_size):
    """This holds for any padding and any other rows."""
    rollouts, padded = pair
    how = EarlyExit(chunk_size=chunk_size)
    found, more = (answer_entropies(base_policy, x, how) for x in pair)
    close(more[:, : found.shape[1]], found, atol=1e-5)
    assert not more[:, found.shape[1] :].any()
    for i, n in enumerate(rollouts.lengths.tolist()):
        prompt, completion = unpadded(padded, i)
        alone = make_rollouts([len(prompt)], [n], group=1)
        alone = replace(alone, prompt_ids=prompt[None], completion_ids=completion[None])
        close(found[i, : n + 1], answer_entropies(base_policy, alone)[0])


# Architectures


FAMILIES = [(name, "sdpa") for name in ("qwen2", "qwen3", "llama", "gemma", "gpt2")]


FAMILIES += [("llama", "eager"), ("gpt2", "eager")]


@pytest.mark.parametrize(("name", "attention"), FAMILIES)
def test_tested_architectures(tokenizer, name, attention):
    policy = tiny_policy(name, tokenizer, attention)
    assert policy.model.config._attn_implementation == attention
    assert policy.model.config.model_type in prefixes.TESTED
    rollouts = make_rollouts(**BATCH, left=2, right=1)
    expected = explicit_entropies(policy, rollouts)
    # The entropies of prefixes differ, so a wrong mask or position would show.
    assert all((expected[i, 1 : n + 1].diff().abs() > 1e-3).all() for i, n in ((0, 5), (3, 6)))
    for way in WAYS:
        if way == "flat" and name == "gpt2":
            continue
        for sizes in ({}, {"chunk_size": 2}, {"memory_mb": 0.01}):
            close(entropies_by(way, policy, rollouts, **sizes), expected)


# Adapters and number formats


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_the_adapter_is_used(lora_policy, monkeypatch, way, merged):
    """Entropies are those of the policy with its adapter, not of the base model."""
    if not merged:
        monkeypatch.setattr(devices, "COPY_LIMIT", 0)
    assert (lora_policy.for_inference() is lora_policy.model) != merged
    rollouts = make_rollouts([4, 9], [5, 1, 3, 6], group=2)
    before = entropies_by(way, lora_policy, rollouts)
    perturb_lora(lora_policy)
    after = entropies_by(way, lora_policy, rollouts)
    close(after, explicit_entropies(lora_policy, rollouts))
    assert not torch.allclose(before, after, atol=1e-2)


@pytest.mark.parametrize("name", ["qwen2", "gemma", "gpt2"])
def test_bfloat16_weights_give_fp32_entropies(tokenizer, name):
    """No way has larger rounding errors than the definition, compared with fp32 arithmetic."""
    policy = tiny_policy(name, tokenizer, dtype=torch.bfloat16)
    rollouts = make_rollouts(**BATCH, left=1)
    naive = entropies_by("naive", policy, rollouts)
    exact = explicit_entropies(Policy(copy.deepcopy(policy.model).float(), tokenizer), rollouts)
    noise = float((naive - exact).abs().mean())
    assert 0 < noise < 0.05 < float(exact[0, 1:6].diff().abs().min())
    for way in WAYS[:3]:
        if way == "flat" and name == "gpt2":
            continue
        found = entropies_by(way, policy, rollouts)
        assert found.dtype == torch.float32
        assert float((found - exact).abs().mean()) < 1.5 * noise, way


def test_4_bit_weights(tiny_folder, tokenizer):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=config, device_map="cpu"
    )
    linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    for linear in linears:
        linear.support_avx512bf16_for_cpu = False
    assert linears
    policy = Policy(model.eval(), tokenizer)
    rollouts = make_rollouts(**BATCH)
    naive = entropies_by("naive", policy, rollouts)
    atol = 1e-3 if model.dtype == torch.float32 else 0.05
    for way in WAYS[:3]:
        close(entropies_by(way, policy, rollouts), naive, atol=atol)
