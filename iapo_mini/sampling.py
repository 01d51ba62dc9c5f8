"""Rollouts: batched sampling with a KV cache; what was sampled and what is known of it.

Shapes: B = prompts x num_generations, P prompt length (left-padded), L completion length
(right-padded, the end-of-sequence token included), V vocabulary. Masks are bool.

Rows of one prompt stand next to each other: sampling runs every prompt once per *group*, and so do
the passes over what was sampled (:mod:`iapo_mini.logprobs`).
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer

from iapo_mini.attention import check_window, model_mask, positions_of
from iapo_mini.memory import CACHE_BLOCK
from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts
from iapo_mini.tasks import Problem, render_prompt


class _GrowingLayer(DynamicLayer):
    """Cache layer whose buffer grows in blocks: a decoding step writes one column in place.

    ``DynamicLayer`` concatenates, which copies the whole cache at every token. Rows are retired by
    swapping them behind the running ones, where their keys and values stay readable.
    """

    block = CACHE_BLOCK

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers, self._used = None, 0
        new = self._used + key_states.shape[-2]
        if self._buffers is None or new > self._buffers[0].shape[-2]:
            shape = list(key_states.shape)
            shape[-2] = new + self.block
            grown = [key_states.new_empty(shape), value_states.new_empty(shape)]
            for buffer, old in zip(grown, (self.keys, self.values)):
                if self._used:
                    buffer[..., : self._used, :] = old
            self._buffers = grown
        self._used = new
        self.show(len(key_states))
        self.keys[..., new - key_states.shape[-2] :, :] = key_states
        self.values[..., new - key_states.shape[-2] :, :] = value_states
        return self.keys, self.values

    def show(self, rows: int) -> None:
        """Go on with the first ``rows`` rows; the others stay in the buffer."""
        self.keys, self.values = (b[:rows, :, : self._used] for b in self._buffers)

    def swap(self, holes: torch.Tensor, movers: torch.Tensor) -> None:
        """Swap the rows at ``holes`` with those at ``movers``."""
        for x in (self.keys, self.values):
            retired = x.index_select(0, holes)
            x[holes] = x.index_select(0, movers)
            x[movers] = retired

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._buffers = [b.repeat_interleave(repeats, dim=0) for b in self._buffers]
        self.show(len(self._buffers[0]))


def encode_prompts(policy: Policy, problems: list[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt ids (N, P) long and mask (N, P) bool, left-padded, by the chat template."""
    texts = [render_prompt(policy.tokenizer, problem) for problem in problems]
    batch = policy.tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(policy.device)
    return batch["input_ids"], batch["attention_mask"].bool()


def check_sampling(
    problems: list[Problem], num_generations: int, max_completion_length: int, temperature: float
) -> None:
    """Refuse what can't be sampled.

    Raises:
        ValueError: when an argument is out of range or ``problems`` is empty.
    """
    if not problems:
        raise ValueError("problems is empty; at least one problem is needed to sample completions.")
    for name, value in (
        ("num_generations", num_generations),
        ("max_completion_length", max_completion_length),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed are 1 and above.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed are numbers above 0.")


@torch.no_grad()
def sample(
    policy: Policy,
    problems: list[Problem],
    *,
    num_generations: int = 8,
    max_completion_length: int = 224,
    temperature: float = 1.0,
    seed: int = 0,
    keep_cache: bool = False,
) -> Rollouts:
    """Sample ``num_generations`` completions for each problem from the policy.

    One uniform number per row and step decides the token by inverse CDF, so a row's completion
    does not depend on when other rows stop: finished rows are dropped from the batch on the way.

    Args:
        policy: the policy to sample from.
        problems: N problems; B = N * num_generations rows come back.
        num_generations: completions per problem, at least 1.
        max_completion_length: tokens after which a row is cut.
        temperature: softmax temperature > 0; ``old_logprobs`` are those of the tempered policy.
        seed: equal seeds give equal completions on the same machine.
        keep_cache: keep the keys and values of every row in ``Rollouts.cache``.

    Raises:
        ValueError: when an argument is out of range or ``problems`` is empty.
    """
    check_sampling(problems, num_generations, max_completion_length, temperature)
    model, device = policy.for_inference(), policy.device
    prompt_ids, prompt_mask = encode_prompts(policy, problems)
    total, width = len(problems) * num_generations, prompt_ids.shape[1]
    check_window(model, width + max_completion_length)
    generator = torch.Generator(device).manual_seed(seed)

    cache = Cache(layer_class_to_replicate=_GrowingLayer)
    logits = model(
        prompt_ids,
        attention_mask=prompt_mask,
        position_ids=positions_of(prompt_mask),
        past_key_values=cache,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(num_generations)
    logits = logits.repeat_interleave(num_generations, dim=0)
    positions = prompt_mask.sum(1).repeat_interleave(num_generations)
    attend = torch.ones(total, 1, 1, width + max_completion_length, dtype=torch.bool, device=device)
    attend[:, 0, 0, :width] = prompt_mask.repeat_interleave(num_generations, dim=0)

    ids = torch.full(
        (total, max_completion_length),
        policy.tokenizer.pad_token_id,
        dtype=torch.long,
        device=device,
    )
    logprobs = torch.zeros(total, max_completion_length, device=device)
    entropies = torch.zeros(total, max_completion_length, device=device)
    lengths = torch.full((total,), max_completion_length, device=device)
    active = torch.arange(total, device=device)  # rows of the full batch still in the cache
    running = torch.ones(total, dtype=torch.bool, device=device)  # of those, not yet ended
    kept: list | None = [None] * total if keep_cache else None
    padding = (width - positions).tolist()

    def keep_keys(slots: range) -> None:
        """Remember where in the cache the real columns of these rows are."""
        for j in slots if keep_cache else ():
            i = int(active[j])
            real = slice(padding[i], width + int(lengths[i]))
            kept[i] = [
                tuple(x[j, :, real].transpose(0, 1) for x in (y.keys, y.values))
                for y in cache.layers
            ]

    for t in range(max_completion_length):
        uniform = torch.rand(total, generator=generator, device=device)[active]
        log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
        p = log_p.exp()
        cdf = p.cumsum(-1)
        # Scaling by the last entry keeps rounding from pointing past the vocabulary.
        token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)
        token = token.clamp(max=cdf.shape[1] - 1)
        alive = active[running]
        ids[alive, t] = token[running, 0]
        logprobs[alive, t] = log_p.gather(1, token)[running, 0]
        entropies[alive, t] = -p.mul_(log_p).sum(-1)[running]
        ended = running & torch.isin(token[:, 0], policy.eos_ids)
        lengths[active[ended]] = t + 1
        running &= ~ended
        left = int(running.sum())
        done = left == 0 or t + 1 == max_completion_length
        if done and not keep_cache:
            break
        if left <= 0.8 * len(active) and not done:
            # A row whose keys are kept stays until its last token has been through the model.
            staying = running | ended if keep_cache else running
            count = int(staying.sum())
            holes = (~staying[:count]).nonzero()[:, 0]
            movers = count + staying[count:].nonzero()[:, 0]
            order = torch.arange(len(active), device=device)
            order[holes], order[movers] = movers, holes
            active = active[order]
            for layer in cache.layers:
                layer.swap(holes, movers)
            keep_keys(range(count, len(active)))
            for layer in cache.layers:
                layer.show(count)
            order = order[:count]
            active, token, running = active[:count], token[order], running[order]
            attend, positions = attend[order], positions[order]
        logits = model(
            token,
            attention_mask=model_mask(model, attend[..., : width + t + 1]),
            position_ids=(positions + t)[:, None],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        if done:
            keep_keys(range(len(active)))
            break

    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]
    finished = torch.isin(ids[torch.arange(total), lengths - 1], policy.eos_ids)
    return Rollouts(
        prompt_ids=prompt_ids.repeat_interleave(num_generations, dim=0),
        prompt_mask=prompt_mask.repeat_interleave(num_generations, dim=0),
        completion_ids=ids[:, :longest].masked_fill(~mask, policy.tokenizer.pad_token_id),
        completion_mask=mask,
        old_logprobs=logprobs[:, :longest] * mask,
        num_generations=num_generations,
        finished=finished,
        token_entropies=entropies[:, :longest] * mask,
        cache=kept,
    )


def from_texts(policy: Policy, problems: list[Problem], completions: list[str]) -> Rollouts:
    """Rollouts made of given completions, one for each problem, as if the policy had written them.

    Args:
        policy: its tokenizer is used; the end-of-sequence token is appended to each completion.
        problems: N problems.
        completions: N texts.

    Returns:
        Rollouts with B = N rows, ``num_generations`` 1 and ``old_logprobs`` all zero.
    """
    prompt_ids, prompt_mask = encode_prompts(policy, problems)
    eos = int(policy.eos_ids[0])
    rows = [[*policy.tokenizer.encode(t, add_special_tokens=False), eos] for t in completions]
    return from_ids(policy, prompt_ids, prompt_mask, rows, 1)


def from_ids(
    policy: Policy,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    rows: list[list[int]],
    num_generations: int,
) -> Rollouts:
    """Rollouts made of token ids, with ``old_logprobs`` all zero.

    Args:
        policy: its tokenizer pads, its stop tokens tell which rows are ``finished``.
        prompt_ids, prompt_mask: (N, P) long and bool, a row for each prompt.
        rows: N * num_generations completions of at least one token, rows of one prompt adjacent.
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
    )
