"""Shared fixtures: tiny policies that the tests make, so no test needs a download."""

import copy
import os
import random

# Set before transformers is imported. A test that loads an unknown model must not wait for a
# network or depend on one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Expected values were computed on a CPU, where random numbers and sums differ from those of a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from helpers import TRIVIAL, redraw
from hypothesis import HealthCheck, settings

from iapo_mini.chat import render_prompt
from iapo_mini.config import TrainConfig
from iapo_mini.lab.pretrain import build_model, build_tokenizer
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import stories

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _repeatable():
    """Give each test one thread and fixed seeds, whatever ran before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(n_stories=300)


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory):
    """Folder of a random Qwen2 model whose predictions depend strongly on the whole context."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.set_num_threads(1)
    model = redraw(build_model(tokenizer, seed=0, hidden=64, layers=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def base_policy(tiny_folder):
    """The tiny policy without an adapter. It is shared, so tests never train it."""
    return load_policy(tiny_folder, lora_rank=0)


@pytest.fixture
def lora_policy(tiny_folder):
    """The tiny policy with a fresh adapter, which changes nothing until it is perturbed."""
    return load_policy(tiny_folder, lora_rank=4)


@pytest.fixture
def stopping_policy(base_policy):
    """The tiny policy with a sixth of the vocabulary as stop tokens, so rows have many lengths."""
    policy = Policy(copy.deepcopy(base_policy.model), base_policy.tokenizer)
    size = policy.model.config.vocab_size
    eos = policy.tokenizer.eos_token_id
    policy.model.generation_config.eos_token_id = sorted({eos, *range(5, size, 6)})
    return policy


@pytest.fixture(scope="session")
def schooled_folder(tokenizer, tmp_path_factory):
    """Folder of a tiny policy that writes short answers, so rewards vary and training works.

    It answers any prompt with ``<think> n.</think><answer> n</answer>``, with a random n from 4 to
    7, and leaves out the closing tag three times in ten. All completions of a random policy would
    earn the same reward, and a test that trains it would compare runs in which nothing happens.
    """
    folder = tmp_path_factory.mktemp("schooled")
    torch.set_num_threads(1)
    model = build_model(tokenizer, seed=0, hidden=64, layers=2)
    rng, told = random.Random(0), stories("train", seed=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        rows = []
        for problem in [next(told) for _ in range(8)] + [rng.choice(TRIVIAL) for _ in range(8)]:
            n, end = rng.randint(4, 7), "" if rng.random() < 0.3 else "</answer>"
            completion = f"<think> {n}.</think><answer> {n}{end}{tokenizer.eos_token}"
            rows.append(
                (tokenizer.encode(render_prompt(tokenizer, problem)), tokenizer.encode(completion))
            )
        width = max(len(p) + len(c) for p, c in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        for i, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            ids[i, :end] = torch.tensor(prompt + completion)
            labels[i, len(prompt) : end] = torch.tensor(completion)
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(schooled_folder):
    """A short run in which weights change. Test files replace fields for other lengths."""
    return TrainConfig(
        method="iapo",
        model=schooled_folder,
        learning_rate=5e-3,
        warmup_steps=2,
        max_steps=4,
        prompts_per_step=2,
        num_generations=2,
        max_completion_length=12,
        lora_rank=4,
        micro_batch_size=2,
        save_steps=2,
        threads=1,
    )
