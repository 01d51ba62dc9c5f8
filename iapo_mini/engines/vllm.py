"""Sampling with vLLM, an optional extra: ``pip install 'iapo-mini[vllm]'``, ``--engine vllm``.

vLLM keeps a 16-bit copy of the model on the GPU. Before every batch it gets the merged weights
(:meth:`iapo_mini.policy.Policy.merged_weights`), so it samples from the policy of the current step.
Its arithmetic still differs from ours by rounding, so log pi_old is computed again by our model on
the sampled tokens. The log-probabilities with which vLLM drew them are kept beside it, and the loss
is corrected for the difference (:func:`iapo_mini.objective.truncated_weights`).

This module has not been tested on a GPU; see docs/real_models.md.
"""

from __future__ import annotations

import os
import random
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


def sampler_of(engine: str, model: str, memory_share: float = 0.4) -> Callable[..., Rollouts]:
    """The function that samples, with the arguments of :func:`iapo_mini.sampling.sample`.

    Args:
        engine: one of ``config.ENGINES``. If vLLM is not installed, ``"vllm"`` warns and uses the
            built-in sampler.
        model: the model that vLLM loads before it gets the weights.
        memory_share: share of the GPU's memory for vLLM's weights and cache; the rest is for the
            update.
    """
    if engine == "native":
        return sample
    # The weights of an engine can only be replaced if it runs in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        import vllm
    except ImportError:
        warnings.warn(
            "engine is 'vllm', which is not installed here (pip install 'iapo-mini[vllm]', on a "
            "machine with a CUDA GPU); the built-in sampler is used instead.",
            stacklevel=2,
        )
        return sample
    llm = vllm.LLM(
        model_source(model), dtype="auto", gpu_memory_utilization=memory_share,
        enable_prefix_caching=True,
        # Log-probabilities of the tempered distribution that tokens are drawn from, as ours are.
        logprobs_mode="processed_logprobs",
    )  # fmt: skip

    def with_vllm(policy: Policy, problems: list[Problem], **settings: Any) -> Rollouts:
        return sample_with(llm, vllm.SamplingParams, policy, problems, **settings)

    return with_vllm


def sync_weights(llm: Any, policy: Policy) -> None:
    """Load the policy's merged weights into the engine and clear its cache of older ones."""
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
    """Sample with a vLLM engine, with the same result types as :func:`iapo_mini.sampling.sample`.

    Args:
        llm: a ``vllm.LLM`` in this process.
        sampling_params: ``vllm.SamplingParams``.
        policy: its weights are first loaded into the engine.
        problems, num_generations, max_completion_length, temperature, seed: as for ``sample``.
        keep_cache: has no effect, because vLLM does not give out its keys and values; the estimator
            runs prompt and completion again.
        on_token: has no effect, because the engine returns a batch only when it is finished.

    Returns:
        Rollouts as from ``sample``, with ``sampled_logprobs`` filled in.

    Raises:
        ValueError: the same errors as ``sample``.
    """
    check_sampling(problems, num_generations, max_completion_length, temperature)
    sync_weights(llm, policy)
    prompt_ids, prompt_mask = encode_prompts(policy, problems)
    # vLLM gives completion i of a prompt the seed of the prompt plus i. Seeds that are near each
    # other would therefore draw the same random numbers for two prompts, or in two steps.
    seeds = random.Random(seed)
    params = [
        sampling_params(
            n=num_generations, temperature=temperature, top_p=1.0, max_tokens=max_completion_length,
            stop_token_ids=policy.eos_ids.tolist(), seed=seeds.getrandbits(62), logprobs=0,
        )
        for _ in problems
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": i[m].tolist()} for i, m in zip(prompt_ids, prompt_mask)]
    answers = llm.generate(prompts, params, use_tqdm=False)
    outputs = [output for answer in answers for output in answer.outputs]
    rows = [list(output.token_ids) for output in outputs]
    rollouts = from_ids(policy, prompt_ids, prompt_mask, rows, num_generations)
    with torch.no_grad():
        logprobs, entropies = token_logprobs(policy.for_inference(), rollouts, temperature)
    rollouts = replace(rollouts, old_logprobs=logprobs, limit=max_completion_length)
    return rollouts.filled(
        token_entropies=entropies, sampled_logprobs=_sampled_logprobs(outputs, rollouts)
    )


def _sampled_logprobs(outputs: list[Any], rollouts: Rollouts) -> torch.Tensor:
    """Log-probabilities with which the engine drew its tokens, (B, L) fp32 nats; padding 0."""
    drawn = [
        # Each entry holds the drawn token and, in some versions of vLLM, the most likely one.
        entry[token].logprob
        for output in outputs
        for token, entry in zip(output.token_ids, output.logprobs, strict=True)
    ]
    values = torch.zeros_like(rollouts.completion_ids, dtype=torch.float32)
    return values.masked_scatter(
        rollouts.completion_mask, torch.tensor(drawn, dtype=torch.float32, device=values.device)
    )
