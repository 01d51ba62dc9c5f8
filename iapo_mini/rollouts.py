"""Rollouts: batched sampling with a KV cache, and the log-probabilities of what was sampled.

Shapes: B = prompts x num_generations, P prompt length (left-padded), L completion length
(right-padded, the end-of-sequence token included), V vocabulary. Masks are bool.

Rows of one prompt stand next to each other, so every pass here runs the prompt once per *group* and
repeats its keys and values: with eight completions to a prompt that saves seven prompt passes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from iapo_mini.policy import Policy
from iapo_mini.tasks import Problem, render_prompt


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


CACHE_BLOCK = 128
"""Tokens by which the buffers of sampling grow beyond what is needed at once."""


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


def model_mask(model, mask: torch.Tensor) -> torch.Tensor:
    """A bool 4-D attention mask in the form this model's attention takes.

    ``sdpa`` takes bool. ``eager`` adds the mask to the scores, where True would silently count 1.
    """
    if model.config._attn_implementation == "sdpa":
        return mask
    lowest = torch.finfo(model.dtype).min
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, lowest)


def sliding_window(config) -> int | None:
    """Tokens the narrowest attention layer looks back; None when all look back to the start."""
    layers = DynamicCache(config=config).layers
    return min((x.sliding_window for x in layers if hasattr(x, "sliding_window")), default=None)


def _check_window(model, length: int) -> None:
    """Our 4-D masks look back to the start, so a shorter window would silently be ignored."""
    window = sliding_window(model.config)
    if window is not None and window < length:
        raise ValueError(
            f"the model's sliding window is {window} tokens, prompt and completion are up to "
            f"{length}; allowed are sequences within the window."
        )


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only, (rows, width)."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


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
    _check_window(model, width + max_completion_length)
    generator = torch.Generator(device).manual_seed(seed)

    cache = Cache(layer_class_to_replicate=_GrowingLayer)
    logits = model(
        prompt_ids,
        attention_mask=prompt_mask,
        position_ids=_positions(prompt_mask),
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


@dataclass
class Trunk:
    """A block of rows after prompt and completion have been run once.

    Attributes:
        rows: (b,) long, which rows of the rollouts these are.
        logits: (b, l + 1, V), entry t predicts completion token t (entry l follows the last one);
            None when not asked for. l is the longest completion of the block. On request hidden
            states (b, l + 1, d), ready for the vocabulary head, stand in their place.
        cache: keys and values of all P + l positions.
        mask: (b, P + l) bool; position_ids: (b, P + l) long.
    """

    rows: torch.Tensor
    logits: torch.Tensor | None
    cache: Cache
    mask: torch.Tensor
    position_ids: torch.Tensor


_HEAD_ALONE: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@torch.no_grad()
def head_alone(model) -> bool:
    """Whether the logits of this causal LM are its vocabulary head applied to its decoder's output.

    Gemma2 caps its logits, Granite and Cohere scale them, others scale what goes in. Rather than
    trusting a list of names this looks, once per model, at what enters and leaves the head.
    """
    if model not in _HEAD_ALONE:
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        seen = {}
        hooks = [
            decoder.register_forward_hook(lambda m, args, out: seen.update(decoder=out)),
            head.register_forward_hook(lambda m, args, out: seen.update(into=args[0], out=out)),
        ] if decoder is not model and head is not None else []  # fmt: skip
        ids = torch.tensor([[0, 1]], device=model.device)
        logits = model(ids, use_cache=False).logits if hooks else None
        for hook in hooks:
            hook.remove()
        hidden = getattr(seen.get("decoder"), "last_hidden_state", None)
        alone = hidden is not None and "out" in seen
        _HEAD_ALONE[model] = (
            alone and torch.equal(seen["into"], hidden) and torch.equal(seen["out"], logits)
        )
    return _HEAD_ALONE[model]


def _forward(model, hidden: bool) -> Callable[..., torch.Tensor]:
    """``f(ids, keep, **inputs)``: logits at the last ``keep`` positions (0: all), (b, keep, V).

    With ``hidden`` the states that :func:`head_alone` says lead to them, (b, keep, d).
    """
    if not hidden:
        return lambda ids, keep, **inputs: model(ids, logits_to_keep=keep, **inputs).logits
    decoder = plain_model(model).get_decoder()
    return lambda ids, keep, **inputs: decoder(ids, **inputs).last_hidden_state[:, -keep:]


def plain_model(model):
    """The causal LM itself, its adapter layers in place, out of peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_blocks(
    model,
    rollouts: Rollouts,
    rows_per_block: int,
    need_logits: bool = True,
    rows: list[int] | None = None,
    hidden: bool = False,
) -> Iterator[Trunk]:
    """Run every prompt once per group and every completion once, in blocks of similar length.

    Sorting rows by length keeps a long completion from padding all others. Gradients flow through
    everything, the shared prompts included.

    Args:
        model: any causal LM with a KV cache and 4-D attention masks.
        rollouts: whole groups.
        rows_per_block: completions per forward pass.
        need_logits: whether to make logits of all positions.
        rows: numbers of the rows to run; default all.
        hidden: give hidden states in place of the logits.

    Raises:
        ValueError: for a model whose sliding window is shorter than the sequences.
    """
    forward = _forward(model, hidden)
    group, width = rollouts.num_generations, rollouts.prompt_ids.shape[1]
    _check_window(model, width + rollouts.completion_ids.shape[1])
    chosen = torch.arange(len(rollouts.lengths)) if rows is None else torch.tensor(rows)
    chosen = chosen.to(rollouts.lengths.device)
    groups, owners = torch.unique(chosen // group, return_inverse=True)
    prompt_mask = rollouts.prompt_mask[groups * group]
    prompts = DynamicCache()
    first = forward(
        rollouts.prompt_ids[groups * group],
        keep=1,
        attention_mask=prompt_mask,
        position_ids=_positions(prompt_mask),
        past_key_values=prompts,
    )
    for order in rollouts.lengths[chosen].argsort(stable=True).split(rows_per_block):
        rows, owner = chosen[order], owners[order]
        length = max(1, int(rollouts.lengths[rows].max()))
        mask = torch.cat(
            [rollouts.prompt_mask[rows], rollouts.completion_mask[rows, :length]], dim=1
        )
        position_ids = _positions(mask)
        cache = DynamicCache(
            [
                (x.keys.index_select(0, owner), x.values.index_select(0, owner))
                for x in prompts.layers
            ]
        )
        future = torch.ones(length, width + length, dtype=torch.bool, device=mask.device)
        logits = forward(
            rollouts.completion_ids[rows, :length],
            keep=0 if need_logits else 1,
            attention_mask=model_mask(model, (mask[:, None] & future.tril(width))[:, None]),
            position_ids=position_ids[:, width:],
            past_key_values=cache,
        )
        logits = torch.cat([first.index_select(0, owner), logits], dim=1) if need_logits else None
        yield Trunk(rows, logits, cache, mask, position_ids)


def _predictions(
    model, rollouts: Rollouts, rows_per_block: int, hidden: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows (b,) and the logits or hidden states that predict their tokens, (b, l, V) or (b, l, d).

    A layer under gradient checkpointing is run again in the backward pass and can't read a cache
    that has grown since, so there every row has its prompt to itself.
    """
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if not (model.training and checkpointed):
        for block in trunk_blocks(model, rollouts, rows_per_block, hidden=hidden):
            yield block.rows, block.logits[:, :-1]
        return
    forward = _forward(model, hidden)
    for rows in rollouts.lengths.argsort(stable=True).split(rows_per_block):
        length = max(1, int(rollouts.lengths[rows].max()))
        start = int(rollouts.prompt_mask[rows].long().argmax(1).min())  # what is padding in all
        ids, mask = (
            torch.cat([prompt[rows, start:], completion[rows, :length]], dim=1)
            for prompt, completion in (
                (rollouts.prompt_ids, rollouts.completion_ids),
                (rollouts.prompt_mask, rollouts.completion_mask),
            )
        )
        yield rows, forward(
            ids, keep=length + 1, attention_mask=mask, position_ids=_positions(mask),
            use_cache=False,
        )[:, :-1]  # fmt: skip


LOGIT_BYTES = 14
"""Peak bytes that reading one logit takes, gradient included, as measured: the logit as the model
makes it, in fp32, tempered, log-softmax."""

LOGITS_MB = 512.0
"""MiB that logits and what is made of them may take; above it the head runs in chunks."""


def _read(logits: torch.Tensor, ids: torch.Tensor, temperature: float):
    """Log-probability of the tokens ``ids`` (...) under ``logits`` (..., V), and the entropy."""
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, ids[..., None])[..., 0], entropy


def _read_in_chunks(head, hidden, ids, mask, temperature: float, size: int):
    """As :func:`_read` after the head, for ``size`` real tokens at a time; padding 0.

    The logits of a chunk are dropped once read and made again for its gradients.
    """

    def read(hidden, ids):
        return _read(head(hidden), ids, temperature)

    parts = [
        checkpoint(read, h, i, use_reentrant=False, preserve_rng_state=False)
        for h, i in zip(hidden[mask].split(size), ids[mask].split(size))
    ]
    nothing = torch.zeros(mask.shape, device=mask.device)
    return (nothing.masked_scatter(mask, torch.cat(values)) for values in zip(*parts))


def token_logprobs(
    model,
    rollouts: Rollouts,
    temperature: float = 1.0,
    rows_per_block: int = 16,
    memory_mb: float = LOGITS_MB,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every completion token and entropy of its distribution.

    Where the logits of a block of rows would take more than ``memory_mb``, the vocabulary head is
    run on a few hundred tokens at a time, with the same results and gradients; no tensor of shape
    (B, L, V) ever exists then. Not so for models whose logits are more than their head
    (:func:`head_alone`).

    Args:
        model: any causal LM with a KV cache; gradients flow through it when enabled.
        rollouts: whole groups; any rows where the model is under gradient checkpointing.
        temperature: the sampling temperature, so that both are those of the sampled distribution.
        rows_per_block: completions per forward pass.
        memory_mb: memory for logits and what is made of them, gradients included, in MiB.

    Returns:
        ``(logprobs, entropies)``, each (B, L) fp32 nats, 0 at padding; entropies carry no gradient.
    """
    order, logprobs, entropies = [], [], []
    rows, length = rollouts.completion_ids.shape
    plain = plain_model(model)
    vocabulary = plain.config.get_text_config().vocab_size
    size = max(1, int(memory_mb * 2**20 / (LOGIT_BYTES * vocabulary)))
    chunked = min(rows, rows_per_block) * length > size and head_alone(plain)
    head = plain.get_output_embeddings() if chunked else None
    for block, states in _predictions(model, rollouts, rows_per_block, hidden=chunked):
        width = states.shape[1]
        mask = rollouts.completion_mask[block, :width]
        ids = rollouts.completion_ids[block, :width]
        if chunked:
            log_p, entropy = _read_in_chunks(head, states, ids, mask, temperature, size)
        else:
            log_p, entropy = (x * mask for x in _read(states, ids, temperature))
        pad = (0, length - width)
        order.append(block)
        logprobs.append(torch.nn.functional.pad(log_p, pad))
        entropies.append(torch.nn.functional.pad(entropy, pad))
    back = torch.cat(order).argsort()
    return torch.cat(logprobs)[back], torch.cat(entropies)[back]
