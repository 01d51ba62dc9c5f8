"""Flat packing: its attention, the models it handles, and keys and values kept by sampling."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    BATCH,
    TRIVIAL,
    WAYS,
    close,
    entropies_by,
    explicit_entropies,
    make_rollouts,
    perturb_lora,
    tiny_policy,
)

from iapo_mini.early_exit import flat
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.information import answer_entropies, candidate_logprobs
from iapo_mini.sampling import sample
from iapo_mini.tasks import POSTFIX


def plain_attention(query, key, value, mask, scale):
    """Query by query, head by head."""
    n, sets, heads, _ = query.shape
    shared = heads // key.shape[1]
    out, lse = torch.zeros_like(query), torch.zeros(n, sets, heads)
    for i in range(n):
        for q in range(sets):
            for h in range(heads):
                scores = key[:, h // shared] @ query[i, q, h] * scale + mask[i]
                lse[i, q, h] = scores.exp().sum().log()
                out[i, q, h] = scores.softmax(0) @ value[:, h // shared]
    return out, lse


class ElsewhereTensor(torch.Tensor):
    """A tensor that claims to be on an accelerator, so the code for accelerators is used."""

    device = torch.device("cuda")


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "sets"), [(2, 2, 1), (4, 2, 3), (6, 1, 2)])
def test_attention_and_its_log_sum_exp(heads, kv_heads, sets, elsewhere):
    generator = torch.Generator().manual_seed(0)
    n, length, size = 5, 9, 8
    query = torch.randn(n, sets, heads, size, generator=generator)
    key, value = torch.randn(2, length, kv_heads, size, generator=generator)
    mask = torch.full((n, length), float("-inf")).triu(length - n + 1)
    given = query.as_subclass(ElsewhereTensor) if elsewhere else query
    out, lse = flat.attend(given, key, value, mask, 0.3)
    expected, expected_lse = plain_attention(query, key, value, mask, 0.3)
    close(torch.Tensor(out), expected, atol=1e-5)
    close(torch.Tensor(lse), expected_lse, atol=1e-5)


@pytest.mark.parametrize("places", [1, 3, None])
@pytest.mark.parametrize("suffix", [1, 4, 7, 30])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_a_branch_sees_its_trunk_and_its_own_earlier_tokens(heads, kv_heads, suffix, places):
    """Merging both parts of the attention gives attention over all keys at once."""
    generator = torch.Generator().manual_seed(suffix)
    branches, trunk, size, places = 3, 5, 8, min(places or suffix, suffix)
    query = torch.randn(branches, places, heads, size, generator=generator)
    key, value = torch.randn(2, branches, suffix, kv_heads, size, generator=generator)
    keys, values = torch.randn(2, trunk, kv_heads, size, generator=generator)
    seen = torch.full((branches, trunk), float("-inf")).triu(trunk - branches + 1)
    out, lse = flat.attend(query, keys, values, seen, 0.3)
    found = flat._merge_own(query, key, value, out, lse, 0.3)
    for n in range(branches):
        for i in range(places):
            last = suffix - places + i + 1
            mask = torch.cat([seen[n], torch.zeros(last)])[None]
            expected, _ = plain_attention(
                query[n, i][None, None], torch.cat([keys, key[n, :last]]),
                torch.cat([values, value[n, :last]]), mask, 0.3,
            )  # fmt: skip
            close(found[n, i], expected.flatten(), atol=1e-5)


class OtherHead(torch.nn.Linear):
    """A head that does more than multiply by its weights, like one with an adapter or 4 bits."""

    def forward(self, x):
        return super().forward(x) * 3


def test_a_head_that_is_not_a_plain_matrix_computes_logits(tokenizer):
    policy = tiny_policy("qwen2", tokenizer)
    rollouts, plain = make_rollouts(**BATCH), policy.model.lm_head
    policy.model.lm_head = OtherHead(plain.in_features, plain.out_features, bias=False)
    policy.model.lm_head.weight = plain.weight
    close(entropies_by("flat", policy, rollouts), explicit_entropies(policy, rollouts))
    texts = [" 7", " 12", " 30"]
    flat_way, naive = (
        candidate_logprobs(policy, rollouts, texts, EarlyExit(way=way))
        for way in ("packed", "naive")
    )
    close(flat_way, naive, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 1e4,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            }
        },
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 8},
    ],
)  # fmt: skip
def test_llamas_of_other_kinds(tokenizer, changes):
    policy = tiny_policy("llama", tokenizer, **changes)
    rollouts = make_rollouts(**BATCH, left=2)
    expected = explicit_entropies(policy, rollouts)
    for way in WAYS:
        close(entropies_by(way, policy, rollouts, POSTFIX), expected)


def test_rotations_that_depend_on_the_length_are_not_packed_flat(tokenizer):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    assert not flat.walkable(tiny_policy("llama", tokenizer, rope_parameters=rope).model)
    assert flat.walkable(tiny_policy("llama", tokenizer).model)


# Keys and values kept by sampling


@pytest.mark.parametrize("size", [{}, {"chunk_size": 2}, {"memory_mb": 0.05}])
def test_kept_keys_give_the_same_entropies(stopping_policy, size):
    rollouts = sample(
        stopping_policy, TRIVIAL, num_generations=8, max_completion_length=12, keep_cache=True
    )
    assert rollouts.finished.any() and not rollouts.finished.all()
    expected = explicit_entropies(stopping_policy, rollouts)
    for kept in (rollouts, replace(rollouts, cache=None)):
        for way in WAYS:
            close(entropies_by(way, stopping_policy, kept, **size), expected)


def test_kept_keys_replace_the_trunk_pass(stopping_policy):
    """Wrong keys and values give other entropies, so they are really used."""
    rollouts = sample(
        stopping_policy, TRIVIAL, num_generations=2, max_completion_length=8, keep_cache=True
    )
    right = answer_entropies(stopping_policy, rollouts)
    wrong = [[(k, -v) for k, v in layers] for layers in rollouts.cache]
    found = answer_entropies(stopping_policy, replace(rollouts, cache=wrong))
    assert (found - right).abs().max() > 0.1


def test_kept_keys_of_an_adapter(lora_policy):
    perturb_lora(lora_policy)
    rollouts = sample(
        lora_policy, TRIVIAL, num_generations=3, max_completion_length=6, keep_cache=True
    )
    close(entropies_by("flat", lora_policy, rollouts), explicit_entropies(lora_policy, rollouts))


@pytest.mark.parametrize("name", ["qwen3", "gemma", "gpt2"])
def test_kept_keys_of_other_architectures(tokenizer, name):
    policy = tiny_policy(name, tokenizer)
    rollouts = sample(policy, TRIVIAL, num_generations=3, max_completion_length=6, keep_cache=True)
    close(answer_entropies(policy, rollouts), explicit_entropies(policy, rollouts))


def test_selected_rows_keep_their_keys(stopping_policy):
    rollouts = sample(
        stopping_policy, TRIVIAL, num_generations=4, max_completion_length=10, keep_cache=True
    )
    part = rollouts.rows(4, 8)
    assert len(part.cache) == 4 and part.cache[0][0][0] is rollouts.cache[4][0][0]
    whole = answer_entropies(stopping_policy, rollouts)
    found = answer_entropies(stopping_policy, part)
    close(found, whole[4:, : found.shape[1]], atol=1e-5)
