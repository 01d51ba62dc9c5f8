"""Batched sampling with a KV cache, and rollouts made from given texts.

The rows of one prompt are adjacent, so every prompt is run once per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from iapo_mini.attention import (
    check_positions,
    check_reach,
    check_window,
    model_mask,
    positions_of,
)
from iapo_mini.chat import continuation_ids, prefill, render_prompt, without_prefill
from iapo_mini.errors import MOST_ROWS, MOST_TOKENS, check_number, check_temperature
from iapo_mini.logprobs import NEVER
from iapo_mini.memory import CACHE_BLOCK
from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts
from iapo_mini.tasks import Problem


class _GrowingLayer(DynamicLayer):
    """Cache layer whose buffer grows in blocks, so a decoding step writes one column in place.

    ``DynamicLayer`` concatenates, which copies the whole cache at every token. Finished rows are
    swapped behind the running ones, where their keys and values can still be read.
    """

    block = CACHE_BLOCK

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers: list[torch.Tensor] | None = None
            self._used = 0
        new = self._used + key_states.shape[-2]
        if self._buffers is None or new > self._buffers[0].shape[-2]:
            # Keys and values may differ in the last dimension (multi-head latent attention).
            grown = [
                x.new_empty((*x.shape[:-2], new + self.block, x.shape[-1]))
                for x in (key_states, value_states)
            ]
            for buffer, old in zip(grown, (self.keys, self.values)):
                if self._used and old is not None:
                    buffer[..., : self._used, :] = old
            self._buffers = grown
        self._used = new
        keys, values = self.show(len(key_states))
        keys[..., new - key_states.shape[-2] :, :] = key_states
        values[..., new - key_states.shape[-2] :, :] = value_states
        return keys, values

    def show(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Use only the first ``rows`` rows from now on; the others stay in the buffer."""
        assert self._buffers is not None  # something has been written
        keys, values = (b[:rows, :, : self._used] for b in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def swap(self, holes: torch.Tensor, movers: torch.Tensor) -> None:
        """Swap the rows at ``holes`` with those at ``movers``."""
        for x in (self.keys, self.values):
            assert x is not None  # something has been written
            retired = x.index_select(0, holes)
            x[holes] = x.index_select(0, movers)
            x[movers] = retired

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._buffers = [b.repeat_interleave(repeats, dim=0) for b in self._buffers or ()]
        self.show(len(self._buffers[0]))


def encode_prompts(policy: Policy, problems: list[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts with the chat template: ids (N, P) long and mask (N, P) bool, left-padded."""
    texts = [render_prompt(policy.tokenizer, problem) for problem in problems]
    batch = policy.tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(policy.device)
    return batch["input_ids"], batch["attention_mask"].bool()


def check_length(policy: Policy, problems: Sequence[Problem], tokens: int, asked: int = 0) -> None:
    """Check, before any long work, that the model can read these problems with a completion.

    Args:
        tokens: number of tokens of a completion, and of what is read in the same pass.
        asked: number of tokens of a forced answer after it.

    Raises:
        ValueError: for a prompt that leaves fewer positions, or does not fit a sliding window.
    """
    texts = [render_prompt(policy.tokenizer, problem) for problem in problems]
    ids = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, ids)) + tokens
    check_positions(policy.model, longest + asked)
    check_window(policy.model, longest)


def check_sampling(
    problems: list[Problem], num_generations: int, max_completion_length: int, temperature: float
) -> None:
    """Refuse arguments that can't be sampled with.

    Raises:
        ValueError: when an argument is out of range or ``problems`` is empty.
    """
    if not problems:
        raise ValueError("problems is empty; at least one problem is needed to sample completions.")
    check_number("num_generations", num_generations, 1, MOST_ROWS)
    check_number("max_completion_length", max_completion_length, 1, MOST_TOKENS)
    check_temperature(temperature)


class Rows:
    """The rows of a batch that are still in use: all at first, then those that are not retired.

    Attributes:
        width: P, columns of the prompts in the cache.
        positions: (b,) long, number of prompt tokens.
        attend: (b, 1, 1, P + L) bool, the columns that a row may attend to.
        active: (b,) long, row number in the full batch.
        running: (b,) bool, not ended.
    """

    def __init__(
        self, prompt_mask: torch.Tensor, num_generations: int, longest: int, keep_cache: bool
    ) -> None:
        mask = prompt_mask.repeat_interleave(num_generations, dim=0)
        total, self.width = mask.shape
        self.positions = mask.sum(1)
        self.attend = torch.ones(
            total, 1, 1, self.width + longest, dtype=torch.bool, device=mask.device
        )
        self.attend[:, 0, 0, : self.width] = mask
        self.active = torch.arange(total, device=mask.device)
        self.running = torch.ones(total, dtype=torch.bool, device=mask.device)
        self.padding = (self.width - self.positions).tolist()  # of the full batch
        self.kept: list[Any] | None = [None] * total if keep_cache else None

    def keep_keys(self, slots: range, cache: Any, lengths: torch.Tensor) -> None:
        """Keep views of the real columns (not padding) that these rows have in the cache."""
        if self.kept is None:
            return
        for j in slots:
            i = int(self.active[j])
            real = slice(self.padding[i], self.width + int(lengths[i]))
            self.kept[i] = [
                tuple(x[j, :, real].transpose(0, 1) for x in (y.keys, y.values))
                for y in cache.layers
            ]

    def retire(self, staying: torch.Tensor, cache: Any, lengths: torch.Tensor) -> torch.Tensor:
        """Swap the rows that do not stay behind the others, and continue without them.

        Returns:
            (rows that stay,) long, the old index of each of them.
        """
        count = int(staying.sum())
        holes = (~staying[:count]).nonzero()[:, 0]
        movers = count + staying[count:].nonzero()[:, 0]
        order = torch.arange(len(self.active), device=staying.device)
        order[holes], order[movers] = movers, holes
        self.active = self.active[order]
        for layer in cache.layers:
            layer.swap(holes, movers)
        self.keep_keys(range(count, len(self.active)), cache, lengths)
        for layer in cache.layers:
            layer.show(count)
        order = order[:count]
        self.active, self.running = self.active[:count], self.running[order]
        self.attend, self.positions = self.attend[order], self.positions[order]
        return order


Force = Callable[[int, Rows, torch.Tensor, Cache], torch.Tensor]
"""(number of tokens so far, rows in use, ids (B, L) of all rows, cache of the rows in use) ->
(b,) long, the next token of each row, or -1 where the policy shall choose it."""


def _draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token for each row by inverse CDF, or take the most likely at temperature 0.

    Args:
        logits: (b, V); uniform: (b,) in 0..1.
        forced: (b,) long, tokens to take instead of drawing, or -1.

    Returns:
        Tokens (b, 1) long, their log-probabilities (b,) and the entropies (b,) of the distributions
        they were drawn from, both fp32 nats.
    """
    log_p = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    p = log_p.exp()
    if temperature == 0:
        token = log_p.argmax(-1, keepdim=True)
    else:
        cdf = p.cumsum(-1)
        # Rounding could point past the vocabulary; scaling by the last entry prevents that.
        token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)
        token = token.clamp(max=cdf.shape[1] - 1)
    if forced is not None:
        token = torch.where(forced < 0, token[:, 0], forced)[:, None]
    return token, log_p.gather(1, token)[:, 0], -p.mul_(log_p.clamp_(min=NEVER)).sum(-1)


def _first_logits(
    model: Any, cache: Cache, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, group: int
) -> torch.Tensor:
    """Run every prompt once into the cache and return logits (N * group, V) of the first tokens."""
    logits = model(
        prompt_ids,
        attention_mask=prompt_mask,
        position_ids=positions_of(prompt_mask),
        past_key_values=cache,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(group)
    return logits.repeat_interleave(group, dim=0)


def sample(
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
    """Sample ``num_generations`` completions for each problem from the policy.

    One uniform number per row and step decides the token, so a row does not depend on the lengths
    of the others. Finished rows are dropped from the batch during sampling.

    Args:
        policy: the policy to sample from.
        problems: N problems; the result has B = N * num_generations rows.
        num_generations: completions per problem, at least 1.
        max_completion_length: number of tokens after which a row is cut.
        temperature: temperature of the softmax and of ``old_logprobs``; 0 takes the most likely
            token.
        seed: equal seeds give equal completions on the same machine.
        keep_cache: keep the keys and values of every row in ``Rollouts.cache``.
        on_token: called after each step with the number of tokens so far and of running rows.

    Raises the same errors as :func:`check_sampling`.
    """
    check_sampling(problems, num_generations, max_completion_length, temperature)
    return sample_after(
        policy, *encode_prompts(policy, problems), num_generations=num_generations,
        max_completion_length=max_completion_length, temperature=temperature, seed=seed,
        keep_cache=keep_cache, on_token=on_token,
    )  # fmt: skip


@torch.no_grad()
def sample_after(
    policy: Policy,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    *,
    num_generations: int,
    max_completion_length: int,
    temperature: float = 1.0,
    seed: int = 0,
    keep_cache: bool = False,
    on_token: Callable[[int, int], object] = lambda tokens, running: None,
    force: Force | None = None,
) -> Rollouts:
    """Sample after given tokens: prompts, or prompts with the start of a completion.

    Args:
        prompt_ids, prompt_mask: (N, P) long and bool, left-padded. The other arguments are those
            of :func:`sample`.
        force: called before each token; it may choose tokens in place of the policy.
    """
    model, device = policy.for_inference(), policy.device
    total, longest = len(prompt_ids) * num_generations, max_completion_length
    check_reach(model, prompt_ids.shape[1] + longest)
    generator = torch.Generator(device).manual_seed(seed)
    cache = Cache(layer_class_to_replicate=_GrowingLayer)
    logits = _first_logits(model, cache, prompt_ids, prompt_mask, num_generations)
    rows = Rows(prompt_mask, num_generations, longest, keep_cache)
    pad, stops = policy.tokenizer.pad_token_id, policy.eos_ids
    ids = torch.full((total, longest), pad, dtype=torch.long, device=device)
    logprobs, entropies = torch.zeros(2, total, longest, device=device)
    lengths = torch.full((total,), longest, device=device)
    for t in range(longest):
        uniform = torch.rand(total, generator=generator, device=device)[rows.active]
        forced = None if force is None else force(t, rows, ids, cache)
        token, log_p, entropy = _draw(logits, uniform, temperature, forced)
        running, alive = rows.running, rows.active[rows.running]
        ids[alive, t] = token[running, 0]
        logprobs[alive, t], entropies[alive, t] = log_p[running], entropy[running]
        ended = running & torch.isin(token[:, 0], stops)
        lengths[rows.active[ended]] = t + 1
        rows.running = running & ~ended
        left = int(rows.running.sum())
        on_token(t + 1, left)
        done = left == 0 or t + 1 == longest
        if done and not keep_cache:
            break
        if left <= 0.8 * len(rows.active) and not done:
            # A row whose keys are kept stays until the model has processed its last token.
            staying = rows.running | ended if keep_cache else rows.running
            token = token[rows.retire(staying, cache, lengths)]
        logits = model(
            token,
            attention_mask=model_mask(model, rows.attend[..., : rows.width + t + 1]),
            position_ids=(rows.positions + t)[:, None],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        if done:
            rows.keep_keys(range(len(rows.active)), cache, lengths)
            break
    width = int(lengths.max())
    mask = torch.arange(width, device=device) < lengths[:, None]
    return Rollouts(
        prompt_ids=prompt_ids.repeat_interleave(num_generations, dim=0),
        prompt_mask=prompt_mask.repeat_interleave(num_generations, dim=0),
        completion_ids=ids[:, :width].masked_fill(~mask, pad),
        completion_mask=mask, old_logprobs=logprobs[:, :width] * mask,
        finished=torch.isin(ids[torch.arange(total), lengths - 1], stops),
        num_generations=num_generations, known={"token_entropies": entropies[:, :width] * mask},
        prefill=prefill(policy.tokenizer), limit=longest, cache=rows.kept,
    )  # fmt: skip


def from_texts(policy: Policy, problems: list[Problem], completions: list[str]) -> Rollouts:
    """Make rollouts from given completions, one for each problem, as if the policy wrote them.

    Args:
        policy: its tokenizer is used; the token that ends a turn is appended to each completion.
        problems: N problems.
        completions: N texts. A start that the chat template writes itself is removed.

    Returns:
        Rollouts with B = N rows, ``num_generations`` 1 and ``old_logprobs`` all zero.
    """
    prompt_ids, prompt_mask = encode_prompts(policy, problems)
    eos, tokenizer = int(policy.eos_ids[0]), policy.tokenizer
    own = [without_prefill(tokenizer, text) for text in completions]
    rows = [[*continuation_ids(tokenizer, text), eos] for text in own]
    return from_ids(policy, prompt_ids, prompt_mask, rows, 1)


def from_ids(
    policy: Policy,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    rows: list[list[int]],
    num_generations: int,
) -> Rollouts:
    """Make rollouts from token ids, with ``old_logprobs`` all zero.

    Args:
        policy: its tokenizer pads, and its stop tokens decide which rows are ``finished``.
        prompt_ids, prompt_mask: (N, P) long and bool, one row for each prompt.
        rows: N * num_generations completions of at least one token; rows of one prompt adjacent.
        num_generations: completions for each prompt.
    """
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    width, pad = int(lengths.max()), policy.tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=policy.device)
    last = ids[torch.arange(len(rows)), lengths - 1]
    return Rollouts(
        prompt_ids=prompt_ids.repeat_interleave(num_generations, dim=0),
        prompt_mask=prompt_mask.repeat_interleave(num_generations, dim=0),
        completion_ids=ids,
        completion_mask=torch.arange(width, device=policy.device) < lengths[:, None],
        old_logprobs=torch.zeros(ids.shape, device=policy.device),
        num_generations=num_generations,
        finished=torch.isin(last, policy.eos_ids),
        prefill=prefill(policy.tokenizer),
    )
