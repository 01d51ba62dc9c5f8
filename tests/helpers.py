"""Simple, slow computations that the tests compare the library with."""

import contextlib
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from iapo_mini.early_exit import flat, prefixes
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.information import answer_entropies, encode_postfix
from iapo_mini.lab.runs import run_job
from iapo_mini.lab.sizes import SHORT
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts
from iapo_mini.tasks import POSTFIX, Problem
from iapo_mini.trainer import train

PATIENCE = 1800
"""Seconds that a test waits for another process; long enough for a busy machine."""

REAL_DATA = "IAPO_TEST_DATA"
"""Environment variable: a folder with gsm8k_test.jsonl and math500_test.json."""


def load_script(path):
    """The module of a script that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def real_problems(name):
    """Path of a file of real problems; the test is skipped if there is none."""
    path = Path(os.environ.get(REAL_DATA, "")) / name
    if not path.is_file():
        pytest.skip(f"{REAL_DATA} names no folder that holds {name}")
    return path


REAL_MODEL = "IAPO_REAL_MODEL"
"""Environment variable: a folder or a hub id of a pretrained model; `make real` sets it."""


def real_model():
    """The model in ``REAL_MODEL``, a folder as absolute path; the test is skipped without it."""
    named = os.environ.get(REAL_MODEL)
    if not named:
        pytest.skip(f"{REAL_MODEL} names no model; make real MODEL=... runs this")
    path = Path(named).expanduser()
    return str(path.resolve()) if path.is_dir() else named


TRIVIAL = [
    Problem("How many sides has a pentagon?", "5"),
    Problem("How many fingers are on one hand?", "5"),
]

BATCH = dict(prompts=[4, 9, 2], completions=[5, 1, 3, 6, 0, 9], group=2)
"""Sizes of a small ragged batch for :func:`make_rollouts`."""

# Each number with its space is one token: postfixes of 1 to 8 tokens.
POSTFIXES = ["".join(f" {n}" for n in range(7, 7 + k)) for k in range(1, 9)]


def close(found, expected, atol=1e-4):
    """Equal up to the absolute tolerance ``atol``."""
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def redraw(model, seed=0):
    """Draw new weights that are large enough for wrong masks or positions to change the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "ln_" in name:
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
            else:
                outer = any(part in name for part in ("embed", "lm_head", "wte", "wpe"))
                std = 0.4 if outer else 0.15
                p.copy_(std * torch.randn(p.shape, generator=generator))
    return model.eval()


def perturb_lora(policy, seed=1, scale=0.1):
    """Change the adapter's weights, because a new adapter has lora_B = 0 and no effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            if "lora_B" in name:
                p.add_(scale * torch.randn(p.shape, generator=generator))
    return policy


def assert_close_in_fp32(one, other):
    """Equal up to the fp32 rounding of a few layers, relative to the largest value.

    One rounding is 6e-8 of a value. Sums in another order in several layers gave errors up to 9e-6
    of the largest logit, depending on the processor.
    """
    size = float(other.abs().max())
    torch.testing.assert_close(one, other, atol=3e-5 * size, rtol=0)


def make_rollouts(prompts, completions, group, vocabulary=800, pad=0, seed=0, left=0, right=0):
    """Rollouts of random tokens.

    ``prompts``: length of each group's prompt; ``completions``: length of each row. ``left`` and
    ``right`` are numbers of additional columns of padding, which do not change the tokens.
    """
    assert len(completions) == group * len(prompts)
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(1, vocabulary, (n,), generator=generator)

    p, c = max(prompts) + left, max(1, *completions) + right
    rows = len(completions)
    prompt_ids, completion_ids = torch.full((rows, p), pad), torch.full((rows, c), pad)
    prompt_mask = torch.zeros(rows, p, dtype=torch.bool)
    completion_mask = torch.zeros(rows, c, dtype=torch.bool)
    for j, n in enumerate(prompts):
        tokens = draw(n)
        for i in range(j * group, (j + 1) * group):
            prompt_ids[i, p - n :] = tokens
            prompt_mask[i, p - n :] = True
    for i, n in enumerate(completions):
        completion_ids[i, :n] = draw(n)
        completion_mask[i, :n] = True
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        old_logprobs=-torch.rand(rows, c, generator=generator) * completion_mask,
        num_generations=group,
        finished=torch.ones(rows, dtype=torch.bool),
    )


def written(completions, group, pad=0):
    """Rollouts with the given lists of tokens after random prompts of three tokens."""
    prompts = [3] * (len(completions) // group)
    rollouts = make_rollouts(prompts, [len(row) for row in completions], group, pad=pad)
    ids = rollouts.completion_ids.clone()
    for i, row in enumerate(completions):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return replace(rollouts, completion_ids=ids)


@st.composite
def padded_pairs(draw):
    """The same rollouts twice, the second time with more padding of another token on both sides."""
    prompts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    group = draw(st.integers(1, 3))
    rows = group * len(prompts)
    completions = draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows))
    sizes = dict(
        prompts=prompts, completions=completions, group=group, seed=draw(st.integers(0, 99))
    )
    more = dict(left=draw(st.integers(1, 6)), right=draw(st.integers(1, 6)), pad=7)
    return make_rollouts(**sizes), make_rollouts(**sizes, **more)


def unpadded(rollouts, i):
    """Prompt and completion of row i without padding."""
    prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
    return prompt, rollouts.completion_ids[i][rollouts.completion_mask[i]]


def plain_log_softmax(model, rollouts, i, temperature=1.0):
    """(length, V) log-probabilities of row i from one forward pass without padding."""
    prompt, completion = unpadded(rollouts, i)
    logits = model(torch.cat([prompt, completion])[None], use_cache=False).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)


def plain_logprobs(model, rollouts, temperature=1.0):
    """(B, L) log-probabilities of the completion tokens, row by row; 0 at padding."""
    rows = []
    for i in range(len(rollouts.completion_ids)):
        completion = unpadded(rollouts, i)[1]
        log_p = plain_log_softmax(model, rollouts, i, temperature)
        chosen = log_p.gather(1, completion[:, None])[:, 0]
        pad = rollouts.completion_ids.shape[1] - len(completion)
        rows.append(torch.nn.functional.pad(chosen, (0, pad)))
    return torch.stack(rows)


_GPT2 = {"n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers"}
_GPT2 |= {"n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}


def tiny_policy(name, tokenizer, attention="sdpa", dtype=torch.float32, **changes):
    """A random policy of a given ``model_type``, with fewer key-value than query heads."""
    sizes = dict(
        vocab_size=864,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if name in ("qwen3", "gemma"):
        sizes["head_dim"] = 24
    if name == "gpt2":
        del sizes["num_key_value_heads"]
        sizes |= {ours: sizes.pop(theirs) for ours, theirs in _GPT2.items()}
    config = AutoConfig.for_model(name, **(sizes | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return Policy(redraw(model).to(dtype), tokenizer)


def saved_bytes(policy, rollouts, memory_mb):
    """Bytes that the forward pass keeps for the backward pass, with each storage counted once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logprobs, _ = token_logprobs(policy.model.train(), rollouts, memory_mb=memory_mb)
    del logprobs
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    return sum(n for pointer, n in storages.items() if pointer not in weights)


WINDOWED = ("mistral", "qwen2")
"""Model types that :func:`windowed_policy` makes."""


def windowed_policy(name, tokenizer, window):
    """A policy in which every layer sees only the last ``window`` tokens."""
    qwen2 = {"use_sliding_window": True, "max_window_layers": 0}
    changes = qwen2 if name == "qwen2" else {}
    return tiny_policy(name, tokenizer, sliding_window=window, **changes)


WAYS = ("flat", "shared", "cached", "naive")
"""Ways to ask after prefixes; "flat" and "shared" are the two variants of ``way="packed"``."""


@contextlib.contextmanager
def only(way, **settings):
    """Yield the ``EarlyExit`` for one of ``WAYS``; fail if another way is used."""
    ran = set()
    with pytest.MonkeyPatch.context() as patch:
        if way == "shared":
            patch.setattr(flat, "walkable", lambda model: False)
        places = {name: (prefixes, f"_{name}") for name in ("packed", "cached", "naive")}
        for name, (module, function) in (places | {"flat": (flat, "run_branches")}).items():
            run = getattr(module, function)

            def watched(*args, run=run, name=name):
                ran.add(name)
                return run(*args)

            patch.setattr(module, function, watched)
        yield EarlyExit(way=way if way in ("cached", "naive") else "packed", **settings)
    assert ran == {"packed" if way == "shared" else way}


def entropies_by(way, policy, rollouts, postfix=POSTFIX, **sizes):
    """Answer entropies by one of ``WAYS``."""
    with only(way, postfix=postfix, **sizes) as how:
        return answer_entropies(policy, rollouts, how)


@torch.no_grad()
def forced_logits(policy, rollouts, i, t, suffix):
    """(suffix length, V): logits of one forward pass over prompt, t completion tokens and suffix.

    Row j predicts the token after the suffix's j-th token.
    """
    prompt, completion = unpadded(rollouts, i)
    ids = torch.cat([prompt, completion[:t], suffix])
    return policy.model(ids[None], use_cache=False).logits[0, -len(suffix) :].float()


def explicit_entropies(policy, rollouts, postfix=POSTFIX):
    """H(y | q, o_<=t) by its definition, (B, L + 1)."""
    suffix = encode_postfix(policy, postfix)
    out = torch.zeros(len(rollouts.lengths), rollouts.completion_ids.shape[1] + 1)
    for i, n in enumerate(rollouts.lengths.tolist()):
        for t in range(n + 1):
            logits = forced_logits(policy, rollouts, i, t, suffix)[-1]
            out[i, t] = torch.distributions.Categorical(logits=logits).entropy()
    return out


def metrics(folder):
    """The logged lines without numbers that depend on the clock."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timing = ("seconds_", "tokens_per_second")
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(timing)} for x in lines]


def weights(folder):
    """Bytes of the trained weights that a run has saved."""
    (file,) = (Path(folder) / "final").glob("*.safetensors")
    return file.read_bytes()


def content(folder):
    """Metrics without numbers that depend on the clock, and the bytes of the final weights."""
    return metrics(folder), weights(folder)


def run(config, folder, **kwargs):
    """Train without a progress bar."""
    return train(config, folder, progress=False, **kwargs)


def run_here(jobs, parallel=None, kept=None):
    """Run an experiment's jobs in this process and with short completions, to save time."""
    short = {"max_completion_length": SHORT}
    for job in jobs:
        if not (Path(job["run"]) / "result.json").is_file():
            config = job["config"] and job["config"] | short
            run_job(job | {"config": config, "evaluation": job["evaluation"] | short})
