"""Sampling with vLLM, an optional extra: ``pip install 'iapo-mini[vllm]'``, ``--engine vllm``.

vLLM keeps a 16-bit copy of the model on the card and is given the merged weights before every batch
(:meth:`iapo_mini.policy.Policy.merged_weights`), so that what it samples from is the policy of this
very step. Its own arithmetic still differs from ours by rounding, therefore log pi_old is computed
by our model, once more, on what it has written.

Not a part of what is tested on hardware: see docs/real_models.md.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from iapo_mini.logprobs import token_logprobs
from iapo_mini.model_files import model_source
from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import check_sampling, encode_prompts, from_ids, sample
from iapo_mini.tasks import Problem

MEMORY_SHARE = 0.4
"""Share of the card that vLLM may take for its weights and cache; the rest is for the update."""


def sampler_of(engine: str, model: str) -> Callable[..., Rollouts]:
    """The function that samples, with the arguments of :func:`iapo_mini.sampling.sample`.

    Args:
        engine: one of ``config.ENGINES``. Without vLLM, ``"vllm"`` says so and samples natively.
        model: what vLLM loads before the weights are put in.
    """
    if engine == "native":
        return sample
    # Only an engine in this process lets its weights be written.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        import vllm
    except ImportError:
        warnings.warn(
            "engine is 'vllm', which is not installed here (pip install 'iapo-mini[vllm]', on a "
            "machine with a CUDA card); sampling goes on with the built-in sampler.",
            stacklevel=2,
        )
        return sample
    llm = vllm.LLM(
        model_source(model), dtype="auto", gpu_memory_utilization=MEMORY_SHARE,
        enable_prefix_caching=True,
    )  # fmt: skip

    def with_vllm(policy: Policy, problems: list[Problem], **settings: Any) -> Rollouts:
        return sample_with(llm, vllm.SamplingParams, policy, problems, **settings)

    return with_vllm


def sync_weights(llm: Any, policy: Policy) -> None:
    """Put the policy's merged weights into the engine and forget what it cached of older ones."""
    executor = llm.llm_engine.model_executor
    executor.driver_worker.model_runner.model.load_weights(policy.merged_weights())
    llm.reset_prefix_cache()


def sample_with(
    llm: Any,
    sampling_params: Callable,
    policy: Policy,
    problems: list[Problem],
    *,
    num_generations: int = 8,
    max_completion_length: int = 224,
    temperature: float = 1.0,
    seed: int = 0,
    keep_cache: bool = False,
    on_token: Callable[[int, int], object] = lambda tokens, running: None,
) -> Rollouts:
    """Sample with an engine, as :func:`iapo_mini.sampling.sample` does without one.

    Args:
        llm: a ``vllm.LLM`` in this process.
        sampling_params: ``vllm.SamplingParams``.
        policy: its weights are put into the engine first.
        problems, num_generations, max_completion_length, temperature, seed: as for ``sample``.
        keep_cache: of no effect, since vLLM's keys and values are its own; the estimator runs the
            trunk itself.
        on_token: of no effect; a batch is the engine's until it is finished.

    Raises:
        ValueError: as ``sample``.
    """
    check_sampling(problems, num_generations, max_completion_length, temperature)
    sync_weights(llm, policy)
    prompt_ids, prompt_mask = encode_prompts(policy, problems)
    params = sampling_params(
        n=num_generations, temperature=temperature, top_p=1.0, max_tokens=max_completion_length,
        stop_token_ids=policy.eos_ids.tolist(), seed=seed,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": i[m].tolist()} for i, m in zip(prompt_ids, prompt_mask)]
    answers = llm.generate(prompts, params, use_tqdm=False)
    rows = [list(output.token_ids) for answer in answers for output in answer.outputs]
    rollouts = from_ids(policy, prompt_ids, prompt_mask, rows, num_generations)
    with torch.no_grad():
        logprobs, entropies = token_logprobs(policy.for_inference(), rollouts, temperature)
    rollouts = replace(rollouts, old_logprobs=logprobs, limit=max_completion_length)
    return rollouts.filled(token_entropies=entropies)
