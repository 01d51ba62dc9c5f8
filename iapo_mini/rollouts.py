"""Rollouts: what was sampled and what is known of it; the one object that flows through.

Shapes: B = prompts x num_generations, P prompt length (left-padded), L completion length
(right-padded, the end-of-sequence token included), V vocabulary. Masks are bool.

Rows of one prompt stand next to each other: sampling runs every prompt once per *group*, and so do
the passes over what was sampled (:mod:`iapo_mini.logprobs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cache = list[list[tuple[torch.Tensor, torch.Tensor]]]
"""For each row and layer the keys and values of its prompt and completion, each
(S, key-value heads, D), rotated as the model does."""

FILLED_BY = {
    "token_entropies": "sampling.sample",
    "rewards": "rewards.score",
    "correct": "rewards.score",
    "informativeness": "information.inform",
}
"""What may be known of rollouts, and who finds it out."""


@dataclass(frozen=True)
class Rollouts:
    """Completions of a batch of prompts. Nothing is written into them: :meth:`filled` makes a copy.

    Attributes:
        prompt_ids, prompt_mask: (B, P) long and bool, left-padded.
        completion_ids, completion_mask: (B, L) long and bool, right-padded.
        old_logprobs: (B, L) fp32 nats, log pi_old(o_t | q, o_<t) of the tempered policy; padding 0.
        num_generations: G, completions per prompt; rows of one prompt are adjacent.
        finished: (B,) bool, whether the row ended by itself (False: cut at the length limit).
        known: what has been filled in so far, by name; read it through the properties below.
        prefill: what the chat template wrote of every completion (``<think>`` and a line break, or
            nothing): it stands in the prompt, and before the texts.
        limit: tokens at which a completion was cut; 0 where no limit is known.
        references: B reference answers; empty until ``rewards.score`` fills them in.
        cache: kept by ``sample`` on request, so that the estimator need not run the trunk again.
            Stale once the policy has changed.
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
        """A copy that knows more: any of the names in ``FILLED_BY``.

        Raises:
            TypeError: for another name.
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
        """A seed made of the tokens: what is drawn for a batch is drawn again after a resume."""
        return int(self.completion_ids[self.completion_mask].sum())

    def rows(self, start: int, stop: int) -> Rollouts:
        """Rows ``start`` to ``stop`` (whole groups), completions cut to their longest."""
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
        """Every tensor by name, what has been filled in included; the cache left out."""
        own = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return {**own, **self.known}

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Completions as text, prefill and tags included, the token that ended the row left out."""
        out = []
        lengths = (self.lengths - self.finished.long()).tolist()
        for ids, length in zip(self.completion_ids.tolist(), lengths):
            text = str(tokenizer.decode(ids[:length], skip_special_tokens=False))
            out.append(self.prefill + text)
        return out


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Rollouts of several batches as one, padded to the longest prompt and completion.

    Args:
        parts: batches with equal ``num_generations``, ``limit`` and ``prefill``, which know the
            same things; their caches are left out.
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
        # What stands at padding is never read: the masks are False there.
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
