"""Log-probabilities of sampled tokens, and the pass over prompts and completions that gives them.

The rows of one prompt are adjacent, so every pass here runs the prompt once per *group* and repeats
its keys and values. With eight completions per prompt that saves seven prompt passes. The estimator
appends its early answers to the same pass (:mod:`iapo_mini.early_exit.prefixes`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from iapo_mini.attention import check_window, model_mask, positions_of
from iapo_mini.memory import LOGIT_BYTES, LOGITS_MB

if TYPE_CHECKING:
    from iapo_mini.rollouts import Rollouts


NEVER = -1e30
"""Replaces -inf as the logit of a token that can't be drawn (a padded row of the head, a banned
token). Its probability is 0 as well, and 0 times NEVER is 0, whereas 0 times -inf is NaN."""


@dataclass
class Trunk:
    """A block of rows after the model has run prompt and completion once.

    Attributes:
        rows: (b,) long, the numbers of these rows in the rollouts.
        logits: (b, l + 1, V), where l is the longest completion of the block; entry t predicts
            completion token t, and entry l comes after the last one. None when not requested. On
            request they are the inputs of the vocabulary head instead, (b, l + 1, d).
        cache: keys and values of all P + l positions.
        mask: (b, P + l) bool; position_ids: (b, P + l) long.
    """

    rows: torch.Tensor
    logits: torch.Tensor | None
    cache: Any
    mask: torch.Tensor
    position_ids: torch.Tensor


_HEAD_ALONE: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def head_alone(model: Any) -> bool:
    """Whether the logits of this causal LM are its vocabulary head applied to its decoder's output.

    Gemma2 caps its logits, Granite and Cohere scale them, and others scale the head's input. So
    the input and output of the head are compared once per model; a list of names could be wrong.
    """
    if model not in _HEAD_ALONE:
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        seen: dict[str, Any] = {}
        hooks = [
            decoder.register_forward_hook(lambda m, args, out: seen.update(decoder=out)),
            head.register_forward_hook(lambda m, args, out: seen.update(into=args[0], out=out)),
        ] if decoder is not model and head is not None else []  # fmt: skip
        ids = torch.tensor([[0, 1]], device=model.device)
        if hooks:
            seen["logits"] = model(ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        hidden = getattr(seen.get("decoder"), "last_hidden_state", None)
        _HEAD_ALONE[model] = (
            hidden is not None
            and "out" in seen
            and torch.equal(seen["into"], hidden)
            and torch.equal(seen["out"], seen["logits"])
        )
    return _HEAD_ALONE[model]


def _forward(model: Any, hidden: bool) -> Callable[..., torch.Tensor]:
    """A function ``f(ids, keep, **inputs)`` for the logits at the last ``keep`` positions (0: all).

    They have shape (b, keep, V). With ``hidden`` it returns the inputs of the vocabulary head
    instead, (b, keep, d); that needs a model for which :func:`head_alone` is True.
    """
    if not hidden:
        return lambda ids, keep, **inputs: model(ids, logits_to_keep=keep, **inputs).logits
    decoder = plain_model(model).get_decoder()
    return lambda ids, keep, **inputs: decoder(ids, **inputs).last_hidden_state[:, -keep:]


def plain_model(model: Any) -> Any:
    """The causal LM without peft's wrapper, but with its adapter layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_blocks(
    model: Any,
    rollouts: Rollouts,
    rows_per_block: int,
    need_logits: bool = True,
    rows: list[int] | None = None,
    hidden: bool = False,
) -> Iterator[Trunk]:
    """Run every prompt once per group and every completion once, in blocks of similar length.

    Rows are sorted by length, so a long completion does not cause padding in all others. Gradients
    flow through everything, including the shared prompts.

    Args:
        model: any causal LM with a KV cache and 4-D attention masks.
        rollouts: whole groups.
        rows_per_block: completions per forward pass.
        need_logits: whether to compute logits at all positions.
        rows: numbers of the rows to run; default all.
        hidden: return hidden states instead of logits.

    Raises:
        ValueError: for a model whose sliding window is shorter than the sequences.
    """
    forward = _forward(model, hidden)
    group, width = rollouts.num_generations, rollouts.prompt_ids.shape[1]
    check_window(model, width + rollouts.completion_ids.shape[1])
    chosen = torch.arange(len(rollouts.lengths)) if rows is None else torch.tensor(rows)
    chosen = chosen.to(rollouts.lengths.device)
    groups, owners = torch.unique(chosen // group, return_inverse=True)
    prompt_mask = rollouts.prompt_mask[groups * group]
    prompts: Any = DynamicCache()
    first = forward(
        rollouts.prompt_ids[groups * group],
        keep=1,
        attention_mask=prompt_mask,
        position_ids=positions_of(prompt_mask),
        past_key_values=prompts,
    )
    for order in rollouts.lengths[chosen].argsort(stable=True).split(rows_per_block):
        block, owner = chosen[order], owners[order]
        length = max(1, int(rollouts.lengths[block].max()))
        mask = torch.cat(
            [rollouts.prompt_mask[block], rollouts.completion_mask[block, :length]], dim=1
        )
        position_ids = positions_of(mask)
        cache = DynamicCache(
            [
                (x.keys.index_select(0, owner), x.values.index_select(0, owner))
                for x in prompts.layers
            ]
        )
        future = torch.ones(length, width + length, dtype=torch.bool, device=mask.device)
        logits = forward(
            rollouts.completion_ids[block, :length],
            keep=0 if need_logits else 1,
            attention_mask=model_mask(model, (mask[:, None] & future.tril(width))[:, None]),
            position_ids=position_ids[:, width:],
            past_key_values=cache,
        )
        if need_logits:
            logits = torch.cat([first.index_select(0, owner), logits], dim=1)
        yield Trunk(block, logits if need_logits else None, cache, mask, position_ids)


def _predictions(
    model: Any, rollouts: Rollouts, rows_per_block: int, hidden: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows (b,) and the logits or hidden states that predict their tokens, (b, l, V) or (b, l, d).

    Under gradient checkpointing a layer is run again in the backward pass. It can't use a cache
    that has grown in between, so in that case the prompt is run once for every row.
    """
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if not (model.training and checkpointed):
        for block in trunk_blocks(model, rollouts, rows_per_block, hidden=hidden):
            assert block.logits is not None  # requested above
            yield block.rows, block.logits[:, :-1]
        return
    forward = _forward(model, hidden)
    for rows in rollouts.lengths.argsort(stable=True).split(rows_per_block):
        length = max(1, int(rollouts.lengths[rows].max()))
        start = int(rollouts.prompt_mask[rows].long().argmax(1).min())  # padding in all rows
        ids, mask = (
            torch.cat([prompt[rows, start:], completion[rows, :length]], dim=1)
            for prompt, completion in (
                (rollouts.prompt_ids, rollouts.completion_ids),
                (rollouts.prompt_mask, rollouts.completion_mask),
            )
        )
        yield rows, forward(
            ids, keep=length + 1, attention_mask=mask, position_ids=positions_of(mask),
            use_cache=False,
        )[:, :-1]  # fmt: skip


def _read(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float, entropies: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of tokens ``ids`` (...) under ``logits`` (..., V), and the entropies."""
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    if not entropies:
        return log_p.gather(-1, ids[..., None])[..., 0], torch.zeros(())
    with torch.no_grad():
        drawn = log_p.clamp(min=NEVER)
        entropy = -drawn.exp().mul_(drawn).sum(-1)  # in place, because memory peaks here
    return log_p.gather(-1, ids[..., None])[..., 0], entropy


def _read_in_chunks(
    head: torch.nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    size: int,
) -> Iterator[torch.Tensor]:
    """Apply the head and :func:`_read` to ``size`` real tokens at a time; padding gets 0.

    The logits of a chunk are dropped after use and computed again for its gradients. Entropies have
    no gradients and are not computed again.
    """

    def reader() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        again = False

        def read(hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal again
            values = _read(head(hidden), ids, temperature, entropies=not again)
            again = True
            return values

        return read

    parts = [
        checkpoint(reader(), h, i, use_reentrant=False, preserve_rng_state=False)
        for h, i in zip(hidden[mask].split(size), ids[mask].split(size))
    ]
    nothing = torch.zeros(mask.shape, device=mask.device)
    return (nothing.masked_scatter(mask, torch.cat(values)) for values in zip(*parts))


def token_logprobs(
    model: Any,
    rollouts: Rollouts,
    temperature: float = 1.0,
    rows_per_block: int = 16,
    memory_mb: float = LOGITS_MB,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every completion token, and entropy of its distribution.

    If the logits of a block of rows would take more than ``memory_mb``, the vocabulary head is run
    on a few hundred tokens at a time, with the same results and gradients. Then no tensor of shape
    (B, L, V) ever exists. This is not possible for models that change the output of their head
    (:func:`head_alone`).

    Args:
        model: any causal LM with a KV cache; gradients flow through it when enabled.
        rollouts: whole groups; with gradient checkpointing any rows.
        temperature: the sampling temperature, to get values of the sampled distribution.
        rows_per_block: completions per forward pass.
        memory_mb: memory in MiB for logits and tensors of their size, including gradients.

    Returns:
        ``(logprobs, entropies)``, each (B, L) fp32 nats, 0 at padding; entropies carry no gradient.
    """
    order, logprobs, entropies = [], [], []
    rows, length = rollouts.completion_ids.shape
    plain = plain_model(model)
    vocabulary = plain.config.get_text_config().vocab_size
    size = max(1, int(memory_mb * 2**20 / (LOGIT_BYTES * vocabulary)))
    chunked = min(rows, rows_per_block) * length > size and head_alone(plain)
    head: Any = plain.get_output_embeddings() if chunked else None
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
