"""Masks, positions and sliding windows."""

import pytest
import torch
from helpers import TRIVIAL, WINDOWED, make_rollouts, tiny_policy, windowed_policy

from iapo_mini.attention import check_window, model_mask, positions_of, sliding_window
from iapo_mini.logprobs import token_logprobs
from iapo_mini.sampling import sample


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    assert positions_of(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 1, 2, 2], [0] * 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_in_the_form_that_the_attention_takes(tokenizer, dtype):
    """Where the mask is added to the scores, True would count as 1."""
    mask = torch.tensor([[[[True, False], [True, True]]]])
    assert model_mask(tiny_policy("llama", tokenizer, "sdpa", dtype).model, mask) is mask
    added = model_mask(tiny_policy("llama", tokenizer, "eager", dtype).model, mask)
    assert added.dtype == dtype and torch.equal(added == 0, mask)
    assert added[0, 0, 0, 1] == torch.finfo(dtype).min


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_is_found_and_sequences_within_it_pass(tokenizer, name):
    assert sliding_window(tiny_policy("llama", tokenizer).model.config) is None
    model = windowed_policy(name, tokenizer, 6).model
    assert sliding_window(model.config) == 6
    check_window(model, 6)
    with pytest.raises(ValueError, match=r"must be at most .* sliding window, got up to 7"):
        check_window(model, 7)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_short_sliding_window_is_neither_sampled_nor_trained(tokenizer, name):
    policy = windowed_policy(name, tokenizer, 6)
    with pytest.raises(ValueError, match="must be at most 6 tokens, the model's sliding window"):
        sample(policy, TRIVIAL, num_generations=1, max_completion_length=4)
    with pytest.raises(ValueError, match="must be at most 6 tokens, the model's sliding window"):
        token_logprobs(policy.model, make_rollouts([4, 9], [8, 1, 3, 6], group=2))
