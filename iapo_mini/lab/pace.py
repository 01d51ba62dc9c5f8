"""How long a study of a real model will take, told before it begins."""

from __future__ import annotations

import time

import torch

from iapo_mini.policy import Policy

SAMPLE, LEARN, REFER = 2.0, 3.5, 1.0
"""Cost of a token in passes over it: sampled one by one, with gradients, and by the reference."""


@torch.no_grad()
def forward_speed(policy: Policy, rows: int = 8, length: int = 64) -> float:
    """Tokens per second of a plain forward pass without the vocabulary head, measured once.

    A real model on two cores needs about a second for it.
    """
    model = policy.for_inference()
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(rows * length, device=policy.device).view(rows, length) % vocabulary
    model(ids[:1, :2], logits_to_keep=1)  # whatever is set up at first use
    began = time.perf_counter()
    model(ids, logits_to_keep=1)
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return rows * length / (time.perf_counter() - began)


def duration(seconds: float) -> str:
    """A rough duration in words: ``about 40 seconds``, ``about 3 minutes``, ``about 2.5 hours``."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} seconds"
    if seconds < 5400:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"
