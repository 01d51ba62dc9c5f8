"""Sampling with vLLM, tested with a stand-in that has the parts of ``vllm.LLM`` that we use."""

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from helpers import TRIVIAL, assert_close_in_fp32, perturb_lora, plain_logprobs, unpadded

from iapo_mini import sampling as native
from iapo_mini.callbacks import Callback
from iapo_mini.chat import render_prompt
from iapo_mini.config import TrainConfig
from iapo_mini.engines.vllm import sample_with, sampler_of, sync_weights
from iapo_mini.policy import load_policy
from iapo_mini.trainer import train


class Engine:
    """Samples from its own plain model, which only ``load_weights`` can change."""

    def __init__(self, folder, **settings):
        self.policy = load_policy(folder, lora_rank=0)
        self.forgot, self.settings = 0, settings
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
    def generate(self, prompts, params, use_tqdm):
        torch.manual_seed(params.seed)
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            made = self.policy.model.generate(
                ids.expand(params.n, -1), do_sample=True, temperature=params.temperature, top_k=0,
                top_p=params.top_p, max_new_tokens=params.max_tokens,
                eos_token_id=params.stop_token_ids, pad_token_id=0,
            )[:, ids.shape[1] :]  # fmt: skip
            outputs = []
            for row in made.tolist():
                ends = [i for i, token in enumerate(row) if token in params.stop_token_ids]
                outputs.append(
                    SimpleNamespace(token_ids=tuple(row[: ends[0] + 1 if ends else None]))
                )
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


def test_no_problems_are_refused(policy, tiny_folder):
    with pytest.raises(ValueError, match="problems is empty"):
        sample_with(Engine(tiny_folder), SimpleNamespace, policy, [])


def test_without_vllm_it_warns_and_uses_the_built_in_sampler(monkeypatch, schooled_folder):
    monkeypatch.setitem(sys.modules, "vllm", None)  # import fails
    with pytest.warns(UserWarning, match="engine is 'vllm'.*built-in sampler") as caught:
        assert sampler_of("vllm", schooled_folder) is native.sample
    assert "\n" not in str(caught[0].message)
    assert sampler_of("native", schooled_folder) is native.sample


def test_training_samples_with_the_engine_from_each_steps_weights(
    monkeypatch, schooled_folder, tmp_path
):
    engines = []

    def make(folder, **settings):
        engines.append(Engine(folder, **settings))
        return engines[-1]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = make, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    config = TrainConfig(
        model=schooled_folder, engine="vllm", max_steps=3, prompts_per_step=2, num_generations=4,
        max_completion_length=12, lora_rank=4, learning_rate=5e-3, warmup_steps=0, threads=1,
    )  # fmt: skip
    lines = []
    trained = train(config, tmp_path / "run", progress=False, callbacks=[Callback(lines.append)])
    (engine,) = engines
    assert engine.forgot == 3 and 0 < engine.settings["gpu_memory_utilization"] < 1
    assert len(lines) == 3 and any(line["grad_norm"] > 1e-2 for line in lines)
    # It still has the weights from the start of the last step, one update behind.
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        behind = engine.policy.model(ids).logits
        assert not torch.equal(behind, trained.for_inference()(ids).logits)
        assert torch.allclose(behind, trained.for_inference()(ids).logits, atol=2)


def test_other_engines_are_refused():
    with pytest.raises(ValueError, match="engine must be one of native, vllm, got 'sglang'"):
        TrainConfig(engine="sglang")
