"""Sampling with vLLM, tested with a stand-in that has the parts of ``vllm.LLM`` that we use."""

import math
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    TRIVIAL,
    assert_close_in_fp32,
    metrics,
    perturb_lora,
    plain_logprobs,
    unpadded,
)

from iapo_mini import objective
from iapo_mini import sampling as native
from iapo_mini.callbacks import Callback
from iapo_mini.chat import render_prompt
from iapo_mini.config import TrainConfig
from iapo_mini.engines.vllm import sample_with, sampler_of, sync_weights
from iapo_mini.policy import load_policy
from iapo_mini.trainer import train


class Engine:
    """Samples from its own plain model, which only ``load_weights`` can change.

    Its log-probability of every third token is too low by ``off`` nats, as if it rounded badly.
    """

    def __init__(self, folder, off=0.0, **settings):
        self.policy = load_policy(folder, lora_rank=0)
        self.forgot, self.off, self.settings, self.seeds = 0, off, settings, []
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)

    def load_weights(self, weights):
        own = self.policy.model.state_dict()
        names = set()
        for name, weight in weights:
            own[name].copy_(weight)  # raises for a name that the architecture does not have
            names.add(name)
        assert names == set(own)

    def reset_prefix_cache(self):
        self.forgot += 1

    @torch.no_grad()
    def generate(self, prompts, asked, use_tqdm):
        answers = []
        for prompt, params in zip(prompts, asked, strict=True):
            self.seeds.append(params.seed)
            torch.manual_seed(params.seed)
            ids = torch.tensor([prompt["prompt_token_ids"]])
            made = self.policy.model.generate(
                ids.expand(params.n, -1), do_sample=True, temperature=params.temperature, top_k=0,
                top_p=params.top_p, max_new_tokens=params.max_tokens,
                eos_token_id=params.stop_token_ids, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            log_p = torch.stack(made.scores, 1).log_softmax(-1)
            outputs = []
            for j, row in enumerate(made.sequences[:, ids.shape[1] :].tolist()):
                ends = [i for i, token in enumerate(row) if token in params.stop_token_ids]
                row = row[: ends[0] + 1 if ends else None]
                outputs.append(SimpleNamespace(token_ids=tuple(row)))
                if params.logprobs is not None:  # 0: only those of the drawn tokens
                    off = [self.off * (t % 3 == 0) for t in range(len(row))]
                    outputs[-1].logprobs = [
                        {token: SimpleNamespace(logprob=float(log_p[j, t, token]) - off[t])}
                        for t, token in enumerate(row)
                    ]
            answers.append(SimpleNamespace(outputs=outputs))
        return answers


@pytest.fixture
def policy(tiny_folder):
    policy = perturb_lora(load_policy(tiny_folder, lora_rank=4, four_bit=True))
    policy.model.generation_config.eos_token_id = [policy.tokenizer.eos_token_id, *range(5, 864, 6)]
    return policy


@torch.no_grad()
def test_the_engine_gets_the_merged_weights(policy, tiny_folder):
    engine, ids = Engine(tiny_folder), torch.tensor([[3, 1, 4, 1, 5]])
    own = policy.model.eval()(ids).logits
    assert not torch.allclose(engine.policy.model(ids).logits, own, atol=0.1)
    sync_weights(engine, policy)
    assert_close_in_fp32(engine.policy.model(ids).logits, own)
    assert engine.forgot == 1  # keys and values of older weights


def test_its_completions_become_rollouts(policy, tiny_folder):
    rollouts = sample_with(
        Engine(tiny_folder), SimpleNamespace, policy, TRIVIAL, num_generations=6,
        max_completion_length=10, temperature=0.9, seed=3,
    )  # fmt: skip
    stop = set(policy.eos_ids.tolist())
    assert len(rollouts.lengths) == 12 and rollouts.num_generations == 6
    assert len(set(rollouts.lengths.tolist())) > 2
    for i in range(12):
        prompt, completion = unpadded(rollouts, i)
        assert policy.tokenizer.decode(prompt) == render_prompt(policy.tokenizer, TRIVIAL[i // 6])
        assert not stop & set(completion[:-1].tolist())
        assert bool(rollouts.finished[i]) == (int(completion[-1]) in stop)
        assert rollouts.finished[i] or len(completion) == 10
    with torch.no_grad():
        plain = plain_logprobs(policy.model, rollouts, temperature=0.9)
    torch.testing.assert_close(rollouts.old_logprobs, plain, atol=1e-4, rtol=0)
    assert ((rollouts.token_entropies > 0) == rollouts.completion_mask).all()
    # What the engine says of its tokens is kept beside our own computation, and agrees with it.
    assert rollouts.sampled_logprobs.dtype == torch.float32
    torch.testing.assert_close(rollouts.sampled_logprobs, plain, atol=1e-3, rtol=0)
    assert not rollouts.sampled_logprobs[~rollouts.completion_mask].any()


def test_no_two_completions_share_their_random_numbers(policy, tiny_folder):
    """vLLM gives completion i of a prompt the seed plus i, in every step."""
    engine = Engine(tiny_folder)
    for step in range(3):
        sample_with(
            engine, SimpleNamespace, policy, TRIVIAL, num_generations=6, max_completion_length=2,
            seed=1_000_003 + step,
        )  # fmt: skip
    assert len({seed + i for seed in engine.seeds for i in range(6)}) == 3 * len(TRIVIAL) * 6


def test_no_problems_are_refused(policy, tiny_folder):
    with pytest.raises(ValueError, match="problems is empty"):
        sample_with(Engine(tiny_folder), SimpleNamespace, policy, [])


def test_without_vllm_it_warns_and_uses_the_built_in_sampler(monkeypatch, schooled_folder):
    monkeypatch.setitem(sys.modules, "vllm", None)  # import fails
    with pytest.warns(UserWarning, match="engine is 'vllm'.*built-in sampler") as caught:
        assert sampler_of("vllm", schooled_folder) is native.sample
    assert "\n" not in str(caught[0].message)
    assert sampler_of("native", schooled_folder) is native.sample


@pytest.fixture
def engines(monkeypatch):
    """A module ``vllm``; the list holds its engines, ``off`` is that of the engines to come."""
    made = SimpleNamespace(all=[], off=0.0)

    def make(folder, **settings):
        made.all.append(Engine(folder, made.off, **settings))
        return made.all[-1]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = make, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    return made


@pytest.fixture
def config(schooled_folder):
    return TrainConfig(
        model=schooled_folder, engine="vllm", max_steps=3, prompts_per_step=2, num_generations=4,
        max_completion_length=12, lora_rank=4, learning_rate=5e-3, warmup_steps=0, threads=1,
    )  # fmt: skip


def test_training_samples_with_the_engine_from_each_steps_weights(engines, config, tmp_path):
    lines = []
    trained = train(config, tmp_path / "run", progress=False, callbacks=[Callback(lines.append)])
    (engine,) = engines.all
    assert engine.forgot == 3 and engine.settings["gpu_memory_utilization"] == 0.4
    # Ours are of the tempered distribution, so the engine's must be, too.
    assert engine.settings["logprobs_mode"] == "processed_logprobs"
    assert len(lines) == 3 and any(line["grad_norm"] > 1e-2 for line in lines)
    # It still has the weights from the start of the last step, one update behind.
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        behind = engine.policy.model(ids).logits
        assert not torch.equal(behind, trained.for_inference()(ids).logits)
        assert torch.allclose(behind, trained.for_inference()(ids).logits, atol=2)


def test_the_share_of_memory_is_an_option(engines, config, tmp_path):
    config = replace(config, max_steps=1, vllm_gpu_memory_utilization=0.25)
    train(config, tmp_path / "run", progress=False)
    assert engines.all[0].settings["gpu_memory_utilization"] == 0.25
    for share in (0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="vllm_gpu_memory_utilization must be at"):
            TrainConfig(vllm_gpu_memory_utilization=share)


@pytest.mark.parametrize("off", [0.0, 1.0, -1.0])
def test_the_mismatch_of_the_engine_is_logged_in_every_step(engines, config, tmp_path, off):
    engines.off, lines = off, []
    train(config, tmp_path / "run", progress=False, callbacks=[Callback(lines.append)])
    for line in lines:
        if off == 0:
            assert line["sampler_ratio"] == pytest.approx(1, abs=1e-3)
            assert line["sampler_ratio_max"] == pytest.approx(1, abs=1e-2)
        else:
            # The first token of every completion is off, and a third of the later ones.
            assert min(1, math.e**off) < line["sampler_ratio"] < max(1, math.e**off)
            assert line["sampler_ratio_max"] == pytest.approx(max(1, math.e**off), rel=1e-2)
        assert (0.3 < line["sampler_ratio_above_2"] < 1) == (off == 1)
        assert line["sampler_ratio_above_2"] == 0 or off == 1


def test_the_built_in_sampler_logs_no_mismatch(config, tmp_path):
    lines = []
    train(
        replace(config, engine="native", max_steps=1), tmp_path / "run", progress=False,
        callbacks=[Callback(lines.append)],
    )  # fmt: skip
    assert not [name for name in lines[0] if name.startswith("sampler")]


@pytest.mark.parametrize(
    ("change", "cap"),
    [
        ({}, 2.0),
        ({"vllm_importance_sampling_clip_max": 1.5}, 1.5),
        ({"method": "dapo"}, 2.0),  # its groups are joined from several batches
        ({"micro_batch_size": 1}, 2.0),
        ({"vllm_importance_sampling_correction": False}, None),
        ({"engine": "native"}, None),
    ],
)
def test_truncated_weights_correct_the_loss_unless_switched_off(
    engines, config, tmp_path, monkeypatch, change, cap
):
    seen, loss = [], objective.policy_loss

    def lose(logprobs, old, advantages, mask, **settings):
        seen.append((settings["weights"], mask))
        return loss(logprobs, old, advantages, mask, **settings)

    engines.off = 1.0
    monkeypatch.setattr("iapo_mini.trainer.policy_loss", lose)
    train(replace(config, max_steps=1, **change), tmp_path / "run", progress=False)
    assert seen
    for weights, mask in seen:
        if cap is None:
            assert weights is None
            continue
        # The ratio is e where the engine is off, which is cut to the cap, and 1 elsewhere.
        expected = torch.ones(mask.shape)
        expected[:, ::3] = cap
        torch.testing.assert_close(weights[mask], expected[mask], atol=2e-2, rtol=0)


def test_a_log_probability_that_is_not_finite_ends_the_run(engines, config, tmp_path):
    engines.off = float("nan")
    with pytest.raises(FloatingPointError, match="log-probabilities from the engine of 8 of 8"):
        train(config, tmp_path / "run", progress=False)


def test_a_killed_run_with_an_engine_resumes_to_the_same_numbers(engines, config, tmp_path):
    engines.off = 0.5
    whole = replace(config, save_steps=1)
    train(whole, tmp_path / "whole", progress=False)
    train(replace(whole, max_steps=2), tmp_path / "parts", progress=False)
    train(whole, tmp_path / "parts", progress=False, resume=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_other_engines_are_refused():
    with pytest.raises(ValueError, match="engine must be one of native, vllm, got 'sglang'"):
        TrainConfig(engine="sglang")
