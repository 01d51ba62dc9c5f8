"""Tokenizer and model of the embedded policy, before any training."""

from __future__ import annotations

import itertools
import math
import random

import torch
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from iapo_mini.problems.stories import chain_of_thought, stories

# ChatML without a system turn, because the embedded policy needs no instructions.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

HEAD_WIDTH = 32
"""Width of an attention head; the hidden size is a multiple of it."""


def build_tokenizer(n_stories: int = 6000) -> Qwen2Tokenizer:
    """Byte-level Qwen2 tokenizer trained on the story world; `` 0`` to `` 99`` are one token each.

    It must be compatible with Qwen2: for ``model_type: qwen2`` transformers always loads
    ``Qwen2Tokenizer`` and would replace any other pre-tokenizer.
    """
    rng = random.Random(0)
    texts = []
    for problem in itertools.islice(stories("train", seed=0), n_stories):
        chain = "".join(s.text for s in chain_of_thought(problem, rng) if s.role != "format")
        texts += [problem.question, chain, "user\n", "assistant\n"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size=4000, show_progress=False
    )
    tokenizer.add_tokens([f" {n}" for n in range(100)])
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer, seed: int, hidden: int, layers: int) -> Qwen2ForCausalLM:
    """Make a small random Qwen2: tied embeddings, heads of width 32, a KV head per query head."""
    torch.manual_seed(seed)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_WIDTH,
        num_key_value_heads=hidden // HEAD_WIDTH,
        max_position_embeddings=512,
        # The usual 0.02 suits widths in the thousands. With this width, names and items would start
        # almost equal, and the model would need thousands of steps to distinguish them.
        initializer_range=hidden**-0.5,
        tie_word_embeddings=True,
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = pad
    return model
