"""The losses that train forced early answers, for vocabularies of any size.

A model with 150,000 tokens in its vocabulary needs 600 kB for the logits of one token in fp32, and
a loss needs several tensors of that size. So the model is cut before its vocabulary head
(:class:`Halves`), and the head runs on as many tokens at a time as memory allows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from iapo_mini.attention import model_mask, positions_of
from iapo_mini.early_exit.prefixes import branch_inputs
from iapo_mini.logprobs import NEVER, head_alone, plain_model
from iapo_mini.memory import LOGITS_MB
from iapo_mini.rollouts import Rollouts

_LOSS_BYTES = 32
"""Peak of bytes per logit in a loss here: logits, targets, two distributions and gradients."""


class Halves:
    """A causal LM cut before its vocabulary head, so the head can run on a few tokens at a time.

    Some models change the output of their head (:func:`iapo_mini.logprobs.head_alone`). They can't
    be cut: their first half is the whole model, and the second half does nothing.

    Args:
        model: causal LM, with or without adapter.
        weights: name -> value to use instead of the parameter with this name.
    """

    def __init__(self, model: Any, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        plain = plain_model(model)
        self.cut = head_alone(plain)
        self._body: torch.nn.Module = plain.get_decoder() if self.cut else plain
        self._head: torch.nn.Module = (
            plain.get_output_embeddings() if self.cut else torch.nn.Identity()
        )
        given = weights or {}
        # By identity, because a parameter has another name within a half.
        values = {id(p): given[name] for name, p in model.named_parameters() if name in given}
        self._of_body, self._of_head = (
            {name: values[id(p)] for name, p in half.named_parameters() if id(p) in values}
            for half in (self._body, self._head)
        )

    def states(self, keep: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, Any]:
        """Run the first half.

        Args:
            keep: (N,) long, positions to return.
            inputs: of the model's forward.

        Returns:
            Inputs of the head, (B, N, d), or logits (B, N, V) if the model can't be cut; and the
            cache.
        """
        if not self.cut:
            inputs["logits_to_keep"] = keep
        out: Any = torch.func.functional_call(self._body, self._of_body, kwargs=inputs)
        if not self.cut:
            return out.logits, out.past_key_values
        return out.last_hidden_state[:, keep], out.past_key_values

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Run the second half: (..., d) -> (..., V) fp32, where no logit is below ``NEVER``."""
        logits: Any = torch.func.functional_call(self._head, self._of_head, (states,))
        return logits.float().clamp(min=NEVER)  # a target of probability 0 costs nothing


def _summed(
    loss: Callable[..., torch.Tensor], rows: torch.Tensor, logits: int, *more: torch.Tensor
) -> torch.Tensor:
    """Sum of ``loss(rows, *more)`` over chunks of rows whose logits fit into ``LOGITS_MB``.

    If there are several chunks, the logits of each are dropped after use and computed again for
    its gradients.

    Args:
        loss: a function of some rows that returns a sum over them.
        rows: (N, ...); logits: number of logits of each row; more: further tensors (N, ...).
    """
    size = max(1, int(LOGITS_MB * 2**20 / (_LOSS_BYTES * logits)))
    if len(rows) <= size:
        return loss(rows, *more)
    parts = zip(rows.split(size), *(x.split(size) for x in more))
    sums = [
        checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]
    return torch.stack(sums).sum()


def forecast_targets(logits: torch.Tensor, answers: torch.Tensor, td_lambda: float) -> torch.Tensor:
    """TD(lambda) targets for the forecasts of the answer along a chain (Sutton, 1988).

    The forecasts p_1 ... p_C of a calibrated policy are a martingale: its present belief is the
    mean of its later beliefs. So a forecast can learn from the next one instead of from the true
    answer alone: G_j = (1 - lambda) p_{j+1} + lambda G_{j+1}, where G_C is the true answer. The
    true answer is a single, noisy draw; the next forecast is not. Unlike training on the true
    answer alone, this also penalises forecasts that change although the chain says nothing new.

    Args:
        logits: (B, C, V), forecasts in the order of the chain.
        answers: (B,) long, true answers.
        td_lambda: 1 uses the true answer alone; near 0 it is mostly the next forecast.

    Returns:
        (B, C, V) fp32 probabilities, without gradient.
    """
    p = torch.softmax(logits.detach().float(), dim=-1)
    targets = torch.empty_like(p)
    target = torch.nn.functional.one_hot(answers, p.shape[-1]).to(p.dtype)
    for j in reversed(range(p.shape[1])):
        targets[:, j] = target
        target = torch.lerp(p[:, j], target, td_lambda)
    return targets


@dataclass(frozen=True)
class Trunk:
    """Sequences that a model has processed, with their cache, to which branches are appended.

    Attributes:
        cache: keys and values of T positions in each of B rows.
        mask: (B, T) bool, real tokens.
        position_ids: (B, T) long.
    """

    cache: DynamicCache
    mask: torch.Tensor
    position_ids: torch.Tensor


def exit_loss(
    model: Any,
    trunk: Trunk,
    ends: torch.Tensor,
    postfix: torch.Tensor,
    answers: torch.Tensor,
    *,
    td_lambda: float = 1.0,
    into_trunk: bool = False,
) -> torch.Tensor:
    """Cross-entropy of the true answer's first token when it is forced after given trunk tokens.

    By default the trunk's keys and values are detached, so exits learn to use what the chain has
    computed so far. With gradients into the trunk, a policy that is still learning to reason would
    instead learn to solve problems internally, before the chain says anything.

    Args:
        model: causal LM.
        trunk: B rows that the model has processed.
        ends: (B, C) long, index of the trunk token that each exit follows, in rising order.
        postfix: (K,) long.
        answers: (B,) long, first token of each row's answer.
        td_lambda: below 1, an exit also learns from the next one (:func:`forecast_targets`).
        into_trunk: let gradients flow into the trunk's keys and values.

    Returns:
        Scalar, nats per exit, fp32.
    """
    branch = branch_inputs(trunk.mask, trunk.position_ids, ends, postfix)
    branch["attention_mask"] = model_mask(model, branch["attention_mask"])
    k, exits = len(postfix), ends.shape[1]
    kept: Any = trunk.cache.layers  # its type also allows layers without keys and values
    layers = [(x.keys, x.values) for x in kept]
    if not into_trunk:
        layers = [(keys.detach(), values.detach()) for keys, values in layers]
    last = torch.arange(k - 1, exits * k, k, device=ends.device)
    halves = Halves(model)
    states, _ = halves.states(last, past_key_values=DynamicCache(layers), **branch)

    def loss(states: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        logits = halves.logits(states)
        if td_lambda == 1:
            targets = answers[:, None].expand(logits.shape[:2]).flatten()
        else:
            targets = forecast_targets(logits, answers, td_lambda).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")

    return _summed(loss, states, exits * _vocabulary(model), answers) / ends.numel()


def _vocabulary(model: Any) -> int:
    return int(plain_model(model).config.get_text_config().vocab_size)


def anchor_loss(
    model: Any, before: Mapping[str, torch.Tensor], rollouts: Rollouts
) -> tuple[torch.Tensor, Trunk]:
    """KL(before || now) of the next token, which keeps a policy's way of reasoning, and the trunk.

    Args:
        model: causal LM, with gradients.
        before: name -> value before training, of every trained parameter.
        rollouts: B completions; prompts are run once per row.

    Returns:
        Scalar fp32, nats per completion token, and the trunk of :func:`exit_loss`.
    """
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device)
    inputs = {
        "input_ids": torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1),
        "attention_mask": model_mask(model, (mask[:, None] & causal.tril())[:, None]),
        "position_ids": positions_of(mask),
    }
    written = torch.arange(rollouts.prompt_ids.shape[1] - 1, mask.shape[1] - 1, device=mask.device)
    now, was = Halves(model), Halves(model, before)
    states, cache = now.states(written, use_cache=True, **inputs)
    with torch.no_grad():
        old_states, _ = was.states(written, use_cache=False, **inputs)
    real = rollouts.completion_mask

    def divergence(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            log_p = torch.log_softmax(was.logits(old), dim=-1).clamp(min=NEVER)
        log_q = torch.log_softmax(now.logits(new), dim=-1).clamp(min=NEVER)
        return (log_p.exp() * (log_p - log_q)).sum()

    total = _summed(divergence, old_states[real], _vocabulary(model), states[real])
    return total / real.sum(), Trunk(cache, mask, inputs["position_ids"])


def draw_exits(rollouts: Rollouts, exits: int, rng: random.Random) -> torch.Tensor:
    """(B, exits) long: random trunk tokens to force an answer after, from the prompt's last on."""
    last = rollouts.prompt_ids.shape[1] - 1
    return torch.tensor(
        [sorted(last + rng.randint(0, int(n)) for _ in range(exits)) for n in rollouts.lengths],
        device=rollouts.prompt_ids.device,
    )
