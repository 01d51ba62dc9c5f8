"""Rollouts: what was sampled and what is known of it; the one object that flows through.

Shapes: B = prompts x num_generations, P prompt length (left-padded), L completion length
(right-padded, the end-of-sequence token included), V vocabulary. Masks are bool.

Rows of one prompt stand next to each other: sampling runs every prompt once per *group*, and so do
the passes over what was sampled (:mod:`iapo_mini.logprobs`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass
class Rollouts:
    """Completions of a batch of prompts; the one object that flows through the pipeline.

    Attributes:
        prompt_ids, prompt_mask: (B, P) long and bool, left-padded.
        completion_ids, completion_mask: (B, L) long and bool, right-padded.
        old_logprobs: (B, L) fp32 nats, log pi_old(o_t | q, o_<t) of the tempered policy; padding 0.
        token_entropies: (B, L) fp32 nats, entropy of the distribution each token was drawn from;
            padding 0. None for completions that nobody sampled.
        num_generations: G, completions per prompt; rows of one prompt are adjacent.
        finished: (B,) bool, whether the row ended by itself (False: cut at the length limit).
        rewards: (B,) fp32, filled in by ``rewards.score``.
        correct: (B,) bool, filled in by ``rewards.score``.
        informativeness: (B, L) fp32 nats, s_{i,t}, filled in by ``information.informativeness``.
        cache: for each row and layer the keys and values of its prompt and completion, each
            (S, key-value heads, D), rotated as the model does; kept by ``sample`` on request, so
            that the estimator need not run the trunk again. Stale once the policy has changed.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    old_logprobs: torch.Tensor
    num_generations: int
    finished: torch.Tensor
    token_entropies: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    informativeness: torch.Tensor | None = None
    cache: list[list[tuple[torch.Tensor, torch.Tensor]]] | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) long: completion tokens per row."""
        return self.completion_mask.sum(1)

    def rows(self, start: int, stop: int) -> Rollouts:
        """Rows ``start`` to ``stop`` (whole groups), completions cut to their longest."""
        width = max(1, int(self.lengths[start:stop].max()))
        cut = {"completion_ids", "completion_mask", "old_logprobs", "token_entropies"}
        cut |= {"informativeness"}
        fields = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                value = value[start:stop]
                fields[name] = value[:, :width] if name in cut else value
        if self.cache is not None:
            fields["cache"] = self.cache[start:stop]
        return replace(self, **fields)

    def texts(self, tokenizer) -> list[str]:
        """Completions as text, tags kept, the end-of-sequence token left out."""
        skip = set(tokenizer.all_special_ids)
        out = []
        for ids, mask in zip(self.completion_ids.tolist(), self.completion_mask.tolist()):
            kept = [i for i, real in zip(ids, mask) if real and i not in skip]
            out.append(tokenizer.decode(kept, skip_special_tokens=False))
        return out
