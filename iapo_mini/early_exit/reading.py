"""Entropy of a prediction, from logits or directly from hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from iapo_mini.logprobs import NEVER


@torch.no_grad()
def logits_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats of softmax(logits) over the last dimension, fp32, no gradient."""
    log_p = torch.log_softmax(logits.float(), dim=-1).clamp_(min=NEVER)
    p = log_p.exp()
    return -p.mul_(log_p).sum(-1)  # in place, because these tensors are large


@torch.no_grad()
def head_entropy(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """``logits_entropy(head(hidden))``, computed in blocks of the vocabulary without full logits.

    The chain rule of entropy is used: the entropy is that of the token's block, plus the mean
    entropy within the blocks. A block stays in the processor's cache. With a vocabulary of 151,936
    this is more than twice as fast as with full logits. The head's weights are read once, not once
    for every few rows.

    Args:
        head: vocabulary head, d -> V.
        hidden: (..., d), the head's input.

    Returns:
        (...) fp32 nats.
    """
    numbers = 2**19 if hidden.device.type == "cpu" else 2**24
    weights = head.weight.split(1024)
    biases: Sequence[torch.Tensor | None] = [None] * len(weights)
    if head.bias is not None:
        biases = head.bias.split(1024)
    out = []
    for x in hidden.flatten(0, -2).split(max(1, numbers // min(1024, head.out_features))):
        of_block, of_words = [], []
        for weight, bias in zip(weights, biases):
            logits = torch.nn.functional.linear(x, weight, bias).float().clamp_(min=NEVER)
            log_p = torch.log_softmax(logits, dim=-1)
            top, at = logits.max(-1, keepdim=True)
            of_block.append((top - log_p.gather(1, at))[:, 0])  # log-sum-exp
            of_words.append(-log_p.exp().mul_(log_p).sum(-1))
        log_p, within = torch.log_softmax(torch.stack(of_block, 1), 1), torch.stack(of_words, 1)
        out.append((log_p.exp() * (within - log_p)).sum(1))
    return torch.cat(out).view(hidden.shape[:-1])
