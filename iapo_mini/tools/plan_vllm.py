"""The memory that vLLM takes beside a training run on the same GPU."""

from __future__ import annotations

import math

PART = "vLLM: 16-bit weights and cache"
"""Name of this memory in a plan."""

GB = 2**30

MOST_SHARE = 0.95
"""Largest share of a GPU that vLLM may take."""


def vllm_bytes(
    share: float, gpu_gb: float | None, parameters: int, cache_of_a_token: int, tokens: int
) -> int:
    """Bytes that vLLM reserves: its share of the GPU, for a copy of the model and its cache.

    Args:
        share: ``TrainConfig.vllm_gpu_memory_utilization``.
        gpu_gb: memory of the GPU in GB of 2**30 bytes.
        parameters: number of parameters of the model.
        cache_of_a_token: bytes of the keys and values of one token in 16 bits.
        tokens: number of tokens of prompt and completion.

    Raises:
        ValueError: without ``gpu_gb``, or for a GPU or a share that has no room for the weights and
            the keys and values of one completion.
    """
    if gpu_gb is None:
        raise ValueError("gpu_gb must be given with engine 'vllm', which takes a share of it")
    needed = 2 * parameters + cache_of_a_token * tokens
    what = "the 16-bit weights of vLLM and the cache of one completion"
    if needed > MOST_SHARE * gpu_gb * GB:
        raise ValueError(
            f"gpu must have at least {math.ceil(needed / (MOST_SHARE * GB))} GB for {what}, got "
            f"{gpu_gb:g}; engine 'native' needs no copy of the model"
        )
    if share * gpu_gb * GB < needed:
        least = math.ceil(100 * needed / (gpu_gb * GB)) / 100
        raise ValueError(
            f"vllm_gpu_memory_utilization must be at least {least:.2f} on {gpu_gb:g} GB, for "
            f"{what}, got {share:g}"
        )
    return int(share * gpu_gb * GB)
