"""Log-probabilities, compared with plain passes: shared prompts, padding, chunks, checkpoints.

On a small GPU a large vocabulary would exhaust memory; here a tiny budget has the same effect.
"""

import pytest
import torch
from helpers import (
    TRIVIAL,
    close,
    make_rollouts,
    padded_pairs,
    perturb_lora,
    plain_log_softmax,
    plain_logprobs,
    saved_bytes,
    tiny_policy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from iapo_mini import logprobs as module
from iapo_mini.information import answer_entropies
from iapo_mini.logprobs import head_alone, token_logprobs
from iapo_mini.policy import load_policy
from iapo_mini.sampling import sample


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_shared_prompts_change_neither_logprobs_nor_gradients(tiny_folder, lora_rank, temperature):
    policy = perturb_lora(load_policy(tiny_folder, lora_rank=lora_rank))
    rollouts = make_rollouts([9, 4, 6], [5, 1, 8, 3, 8, 2], group=2)
    weights = torch.randn(rollouts.completion_ids.shape)

    def gradients(logprobs):
        (logprobs * weights).sum().backward()
        grads = {name: p.grad.clone() for name, p in policy.trainable().items()}
        policy.model.zero_grad()
        return grads

    naive = plain_logprobs(policy.model, rollouts, temperature)
    expected = gradients(naive)
    assert all(g.abs().max() > 1e-3 for g in expected.values() if g.ndim == 2)
    for rows_per_block in (1, 4, 16):
        logprobs, _ = token_logprobs(policy.model, rollouts, temperature, rows_per_block)
        torch.testing.assert_close(logprobs, naive, atol=1e-4, rtol=0)
        for name, grad in gradients(logprobs).items():
            scale = expected[name].abs().max()
            torch.testing.assert_close(grad, expected[name], atol=1e-4 * float(scale), rtol=1e-3)


def test_entropies_of_token_logprobs(base_policy):
    rollouts = make_rollouts([5, 7], [4, 1, 6, 3], group=2)
    with torch.no_grad():
        _, entropies = token_logprobs(base_policy.model, rollouts, temperature=0.7)
        for i, n in enumerate(rollouts.lengths.tolist()):
            log_p = plain_log_softmax(base_policy.model, rollouts, i, temperature=0.7)
            expected = torch.distributions.Categorical(logits=log_p).entropy()
            torch.testing.assert_close(entropies[i, :n], expected, atol=1e-4, rtol=0)
            assert not entropies[i, n:].any()


def test_entropies_carry_no_gradient(lora_policy):
    logprobs, entropies = token_logprobs(lora_policy.model, make_rollouts([5], [4, 1], group=2))
    assert logprobs.requires_grad and not entropies.requires_grad


@settings(max_examples=12)
@given(padded_pairs(), st.integers(1, 6))
def test_padding_changes_nothing(base_policy, pair, block):
    rollouts, padded = pair
    with torch.no_grad():
        plain = plain_logprobs(base_policy.model, rollouts)
        logprobs, _ = token_logprobs(base_policy.model, rollouts, rows_per_block=block)
        more, _ = token_logprobs(base_policy.model, padded, rows_per_block=block)
    close(logprobs, plain)
    close(more[:, : plain.shape[1]], logprobs, atol=1e-5)
    assert not more[:, plain.shape[1] :].any()


# The vocabulary head in chunks, layers checkpointed


SIZES = dict(prompts=[5, 9], completions=[4, 1, 6, 3], group=2)


CHUNKS = 0.05  # MiB: four tokens at a time with the tests' vocabulary of 864


class Widest(TorchDispatchMode):
    """Records the largest number of rows of any tensor whose last dimension is the vocabulary."""

    rows, vocabulary = 0, 864

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            # A view, such as the transposed weight of the head, is not new memory.
            new = isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given
            if new and x.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, x.numel() // self.vocabulary)
        return out


def weighed(model, rollouts, **settings):
    """Log-probabilities, entropies and gradients of a weighted sum."""
    model.zero_grad()
    logprobs, entropies = token_logprobs(model, rollouts, temperature=0.8, **settings)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    (logprobs * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach(), entropies, gradients


def assert_same(one, other, atol=1e-6):
    """Compare values to ``atol`` nats, and gradients (sums of many terms) to 3 ``atol``."""
    for x, y in zip(one[:2], other[:2]):
        torch.testing.assert_close(x, y, atol=atol, rtol=1e-6)
    assert one[2].keys() == other[2].keys() and one[2]
    for name, gradient in other[2].items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(one[2][name], gradient, atol=3 * atol * max(1, size), rtol=0)


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("rows_per_block", [3, 16])
def test_chunks_give_the_same_results_and_gradients(tiny_folder, rank, rows_per_block):
    """With rank 0 the head is trained as well, and its gradients add up over chunks."""
    policy = perturb_lora(load_policy(tiny_folder, lora_rank=rank))
    rollouts = make_rollouts(**SIZES)
    policy.model.train()
    plain = weighed(policy.model, rollouts, rows_per_block=rows_per_block)
    chunked = weighed(policy.model, rollouts, rows_per_block=rows_per_block, memory_mb=CHUNKS)
    assert_same(chunked, plain)
    assert not torch.equal(chunked[0], plain[0]) or rank  # another way was gone


def test_entropies_are_not_computed_again_for_the_gradients_of_a_chunk(lora_policy, monkeypatch):
    asked, read = [], module._read

    def reading(*given, entropies=True):
        asked.append(entropies)
        return read(*given, entropies=entropies)

    monkeypatch.setattr(module, "_read", reading)
    weighed(lora_policy.model, make_rollouts(**SIZES, left=3), memory_mb=CHUNKS)
    chunks = len(asked) // 2
    assert chunks > 1 and asked == [True] * chunks + [False] * chunks


def test_no_tensor_of_all_logits_exists(lora_policy):
    rollouts = make_rollouts(**SIZES)
    tokens = int(rollouts.completion_mask.sum())
    lora_policy.model.train()
    head_alone(lora_policy.model.get_base_model())
    with Widest() as whole:
        weighed(lora_policy.model, rollouts)
    with Widest() as chunked:
        weighed(lora_policy.model, rollouts, memory_mb=CHUNKS)
    assert whole.rows >= tokens
    assert 0 < chunked.rows <= 4


def test_small_logits_are_not_chunked(lora_policy):
    """If all logits fit, nothing is computed twice, and the results are the same."""
    rollouts = make_rollouts(**SIZES)
    with Widest() as seen:
        token_logprobs(lora_policy.model, rollouts, memory_mb=512)
    assert seen.rows == 4 * 7  # one block, its longest row and the token before it


ODD = {
    "gemma2": dict(final_logit_softcapping=0.5, head_dim=16, sliding_window=512),
    "granite": dict(logits_scaling=8.0),
    "cohere": dict(logit_scale=0.0625),
}


@pytest.mark.parametrize("name", ODD)
def test_logits_that_change_after_the_head_are_not_chunked(tokenizer, name):
    attention = "eager" if name == "gemma2" else "sdpa"
    policy = tiny_policy(name, tokenizer, attention, **ODD[name])
    assert not head_alone(policy.model)
    rollouts = make_rollouts(**SIZES)
    with torch.no_grad():
        logprobs, _ = token_logprobs(policy.model, rollouts, memory_mb=CHUNKS)
        plain = plain_logprobs(policy.model, rollouts)
    torch.testing.assert_close(logprobs, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "gemma", "gpt2"])
def test_plain_heads_are_recognised(tokenizer, name):
    policy = tiny_policy(name, tokenizer)
    policy.model.train()  # dropout must not make a head look odd
    assert head_alone(policy.model)
    policy.model.eval()
    rollouts = make_rollouts(**SIZES)
    with torch.no_grad():
        logprobs, _ = token_logprobs(policy.model, rollouts, memory_mb=CHUNKS)
        plain = plain_logprobs(policy.model, rollouts)
    torch.testing.assert_close(logprobs, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("memory_mb", [512, CHUNKS])
@pytest.mark.parametrize("rank", [4, 0])
def test_gradient_checkpointing_changes_nothing(tiny_folder, rank, memory_mb):
    """With checkpointing the prompts are run for each row, without a cache."""
    results = []
    for checkpointing in (False, True):
        policy = load_policy(tiny_folder, lora_rank=rank, gradient_checkpointing=checkpointing)
        perturb_lora(policy).model.train()
        results.append(weighed(policy.model, make_rollouts(**SIZES, left=3), memory_mb=memory_mb))
    assert_same(results[1], results[0], atol=2e-5)


def test_gradient_checkpointing_keeps_less(tiny_folder):
    rollouts = make_rollouts([40, 40], [30] * 8, group=4)
    kept = [
        saved_bytes(
            load_policy(tiny_folder, lora_rank=4, gradient_checkpointing=c), rollouts, CHUNKS
        )
        for c in (False, True)
    ]
    assert kept[1] < kept[0] / 5


def test_half_a_group_works_with_checkpointed_layers(tiny_folder):
    policy = load_policy(tiny_folder, lora_rank=4, gradient_checkpointing=True)
    perturb_lora(policy).model.train()
    rollouts = make_rollouts([5, 9], [4, 1, 6, 3, 2, 2], group=3)
    whole, _ = token_logprobs(policy.model, rollouts)
    parts = [token_logprobs(policy.model, rollouts.rows(i, i + 2))[0] for i in (0, 2, 4)]
    for i, part in enumerate(parts):
        rows = whole[2 * i : 2 * i + 2, : part.shape[1]]
        torch.testing.assert_close(part, rows, atol=1e-5, rtol=0)


def test_a_banned_token_leaves_logprobs_entropies_and_gradients_finite(tokenizer):
    """The last logits of the head are -inf, as in a padded vocabulary."""
    policy = tiny_policy("qwen2", tokenizer, tie_word_embeddings=False)
    head = policy.model.get_output_embeddings()
    bias = torch.nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        bias[-32:] = -torch.inf
    head.bias = bias
    rollouts = make_rollouts([4, 3], [5, 2, 3, 4], group=2)
    for memory_mb in (512.0, 0.05):
        logprobs, entropies = token_logprobs(policy.model, rollouts, memory_mb=memory_mb)
        assert logprobs.isfinite().all() and entropies.isfinite().all()
        (gradient,) = torch.autograd.grad(logprobs.sum(), [head.weight])
        assert gradient.isfinite().all() and gradient.abs().max() > 0
    drawn = sample(policy, TRIVIAL, num_generations=4, max_completion_length=8)
    assert drawn.token_entropies.isfinite().all() and drawn.old_logprobs.isfinite().all()
    assert int(drawn.completion_ids.max()) < head.out_features - 32
    assert answer_entropies(policy, drawn).isfinite().all()
