"""Rollouts: sampled completions and what is computed from them, passed from stage to stage.

Shapes: B = prompts x num_generations, P prompt length (left-padded), L completion length
(right-padded, including the end-of-sequence token), V vocabulary size. Masks are bool.

The rows of one prompt are adjacent. So sampling runs every prompt once per *group*, and so do the
later passes over the completions (:mod:`iapo_mini.logprobs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cache = list[list[tuple[torch.Tensor, torch.Tensor]]]
"""The keys and values of prompt and completion for each row and layer, each of shape
(S, key-value heads, D), with the model's rotary embedding applied."""

FILLED_BY = {
    "token_entropies": "sampling.sample",
    "sampled_logprobs": "engines.vllm.sample_with",
    "rewards": "rewards.score",
    "correct": "rewards.score",
    "informativeness": "information.inform",
}
"""Name of each quantity that can be filled in -> the function that computes it."""


@dataclass(frozen=True)
class Rollouts:
    """Completions of a batch of prompts. Immutable: :meth:`filled` returns a copy.

    Attributes:
        prompt_ids, prompt_mask: (B, P) long and bool, left-padded.
        completion_ids, completion_mask: (B, L) long and bool, right-padded.
        old_logprobs: (B, L) fp32 nats, log pi_old(o_t | q, o_<t) of the tempered policy; padding 0.
        num_generations: G, completions per prompt; rows of one prompt are adjacent.
        finished: (B,) bool, whether the row ended by itself (False: cut at the length limit).
        known: the quantities filled in so far, by name. Use the properties below to read them.
        prefill: the start of every completion that the chat template writes (``<think>`` and a line
            break, or nothing). Its tokens are in the prompt; :meth:`texts` puts it in front.
        limit: number of tokens at which completions were cut; 0 if no limit is known.
        references: B reference answers; empty until ``rewards.score`` fills them in.
        cache: keys and values, kept by ``sample`` on request so the estimator can skip the pass
            over prompt and completion. Not valid after the policy has changed.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    old_logprobs: torch.Tensor
    num_generations: int
    finished: torch.Tensor
    known: Mapping[str, torch.Tensor] = field(default_factory=dict)
    prefill: str = ""
    limit: int = 0
    references: tuple[str, ...] = ()
    cache: Cache | None = None

    def filled(self, **values: torch.Tensor) -> Rollouts:
        """A copy with further quantities, under names of ``FILLED_BY``.

        Raises:
            TypeError: for any other name.
        """
        for name in values:
            if name not in FILLED_BY:
                raise TypeError(f"name must be one of {', '.join(FILLED_BY)}, got '{name}'")
        return replace(self, known={**self.known, **values})

    def _filled_in(self, name: str) -> torch.Tensor:
        if name not in self.known:
            raise ValueError(f"these rollouts have no {name} yet; {FILLED_BY[name]} fills it in.")
        return self.known[name]

    @property
    def token_entropies(self) -> torch.Tensor:
        """(B, L) fp32 nats, entropy of the distribution each token was drawn from; padding 0."""
        return self._filled_in("token_entropies")

    @property
    def sampled_logprobs(self) -> torch.Tensor:
        """(B, L) fp32 nats, log-probabilities with which another engine drew the tokens.

        Padding is 0. They differ from ``old_logprobs`` by the rounding of that engine.
        """
        return self._filled_in("sampled_logprobs")

    @property
    def rewards(self) -> torch.Tensor:
        """(B,) fp32, r_i."""
        return self._filled_in("rewards")

    @property
    def correct(self) -> torch.Tensor:
        """(B,) bool, whether the answer is right."""
        return self._filled_in("correct")

    @property
    def informativeness(self) -> torch.Tensor:
        """(B, L) fp32 nats, s_{i,t}; padding 0."""
        return self._filled_in("informativeness")

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) long: completion tokens per row."""
        return self.completion_mask.sum(1)

    def seed(self) -> int:
        """A seed computed from the tokens, so a resumed run makes the same random choices."""
        return int(self.completion_ids[self.completion_mask].sum())

    def rows(self, start: int, stop: int) -> Rollouts:
        """Rows ``start`` to ``stop`` (whole groups), padded only to their longest completion."""
        rows = slice(start, stop)
        width = max(1, int(self.lengths[rows].max()))
        return replace(
            self,
            prompt_ids=self.prompt_ids[rows],
            prompt_mask=self.prompt_mask[rows],
            completion_ids=self.completion_ids[rows, :width],
            completion_mask=self.completion_mask[rows, :width],
            old_logprobs=self.old_logprobs[rows, :width],
            finished=self.finished[rows],
            known={n: v[rows, :width] if v.ndim == 2 else v[rows] for n, v in self.known.items()},
            references=self.references[rows],
            cache=None if self.cache is None else self.cache[rows],
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, including the quantities filled in, but not the cache."""
        own = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return {**own, **self.known}

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Completions as text, with prefill and tags, without the token that ended the row."""
        out = []
        lengths = (self.lengths - self.finished.long()).tolist()
        for ids, length in zip(self.completion_ids.tolist(), lengths):
            text = str(tokenizer.decode(ids[:length], skip_special_tokens=False))
            out.append(self.prefill + text)
        return out


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Join the rollouts of several batches, padded to the longest prompt and completion.

    Args:
        parts: batches with equal ``num_generations``, ``limit`` and ``prefill`` and with the same
            quantities filled in. Their caches are left out.
    """
    if len(parts) == 1:
        return parts[0]
    prompt, width = (max(x.shape[1] for x in each) for each in zip(
        *((part.prompt_ids, part.completion_ids) for part in parts)
    ))  # fmt: skip

    def together(values: Sequence[torch.Tensor], name: str) -> torch.Tensor:
        if values[0].ndim == 1:
            return torch.cat(list(values))
        left = name.startswith("prompt")
        size = prompt if left else width
        # The values at padding are never read, since the masks are False there.
        grown = [
            torch.nn.functional.pad(v, (size - v.shape[1], 0) if left else (0, size - v.shape[1]))
            for v in values
        ]
        return torch.cat(grown)

    tensors = [part.tensors() for part in parts]
    merged: dict[str, Any] = {
        name: together([t[name] for t in tensors], name) for name in tensors[0]
    }
    known = {name: merged.pop(name) for name in parts[0].known}
    references = tuple(answer for part in parts for answer in part.references)
    return replace(parts[0], **merged, known=known, references=references, cache=None)
