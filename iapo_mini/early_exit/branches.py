"""Questions whose suffix differs from prefix to prefix.

:func:`iapo_mini.early_exit.prefixes.ask` puts the same suffix after all prefixes of a row. Some
questions need more: the answer that is written so far (:mod:`iapo_mini.early_exit.answers`), or a
postfix whose first token merges with the last token of the prefix. Here each branch has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from iapo_mini.chat import continuation_ids, token_texts
from iapo_mini.early_exit import flat
from iapo_mini.early_exit.prefixes import ask
from iapo_mini.early_exit.question import EVERY_PREFIX, EarlyExit, Question
from iapo_mini.logprobs import plain_model, trunk_blocks
from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts

_COPIES = 256
"""Largest number of rows that are asked together."""


class Branch(NamedTuple):
    """A suffix after a prefix: number of the row, tokens of the prefix, tokens to append."""

    row: int
    prefix: int
    suffix: tuple[int, ...]


def postfix_branch(
    policy: Policy, rollouts: Rollouts, row: int, prefix: int, postfix: str, joined: bool = False
) -> Branch:
    """The branch that forces an answer after a prefix.

    Args:
        policy: its tokenizer is used.
        rollouts: B rows.
        row, prefix: number of the row, and number of tokens of its prefix.
        postfix: text that forces an answer.
        joined: encode the postfix together with the last token of the prefix. The tokenizer may
            merge the two (``.`` and ``</`` to ``.</``), and then the branch begins one token
            earlier. Otherwise the postfix always has the same tokens, as in the paper.
    """
    plain = tuple(continuation_ids(policy.tokenizer, postfix))
    if not joined or prefix == 0:
        return Branch(row, prefix, plain)
    last = int(rollouts.completion_ids[row, prefix - 1])
    text = token_texts(policy.tokenizer, [last])[0]
    alone = tuple(continuation_ids(policy.tokenizer, text))
    together = tuple(continuation_ids(policy.tokenizer, text + postfix))
    # A token that holds a part of a character has no text that could be encoded with the postfix.
    if alone != (last,) or together == (last, *plain):
        return Branch(row, prefix, plain)
    return Branch(row, prefix - 1, together)


@torch.no_grad()
def with_cache(model: Any, rollouts: Rollouts) -> Rollouts:
    """The rollouts with the keys and values of every row, so later questions skip the trunk.

    Models that flat packing can't serve get none, because the other ways do not use it.
    """
    model = plain_model(model)
    if rollouts.cache is not None or not flat.walkable(model):
        return rollouts
    kept: list[Any] = [None] * len(rollouts.lengths)
    for trunk in trunk_blocks(model, rollouts, 8, need_logits=False):
        for block, row in enumerate(trunk.rows.tolist()):
            real = trunk.mask[block]
            kept[row] = [
                tuple(x[block][:, real].transpose(0, 1).contiguous() for x in (y.keys, y.values))
                for y in trunk.cache.layers
            ]
    return replace(rollouts, cache=kept)


def copies_of(rollouts: Rollouts, rows: list[int]) -> Rollouts:
    """These rows, in this order and each as often as it is named; every row is its own group."""
    at = torch.tensor(rows, device=rollouts.lengths.device)
    width = max(1, int(rollouts.lengths[at].max()))
    return replace(
        rollouts,
        prompt_ids=rollouts.prompt_ids[at], prompt_mask=rollouts.prompt_mask[at],
        completion_ids=rollouts.completion_ids[at, :width],
        completion_mask=rollouts.completion_mask[at, :width],
        old_logprobs=rollouts.old_logprobs[at, :width], finished=rollouts.finished[at],
        num_generations=1, known={}, references=(),
        cache=None if rollouts.cache is None else [rollouts.cache[i] for i in rows],
    )  # fmt: skip


def ask_branches(
    model: Any,
    rollouts: Rollouts,
    branches: Sequence[Branch],
    read: Callable[[torch.Tensor], torch.Tensor],
    how: EarlyExit = EVERY_PREFIX,
) -> torch.Tensor:
    """Read the prediction after each branch.

    Args:
        model: any causal LM, as for :func:`ask`.
        rollouts: B rows; with a cache (:func:`with_cache`) their tokens are not run again.
        branches: N suffixes of at least one token, each after a prefix of a row.
        read: logits (n, V) -> values to keep, (n, r) fp32.
        how: way and memory.

    Returns:
        (N, r) fp32, in the order of the branches.

    Raises:
        ValueError: for no branches, a suffix without tokens, or a prefix longer than its row.
    """
    lengths = rollouts.lengths.tolist()
    for branch in branches:
        if not branch.suffix or not 0 <= branch.prefix <= lengths[branch.row]:
            raise ValueError(
                "branches must have a suffix of at least one token and a prefix within the "
                f"{lengths[branch.row]} tokens of their row, got {branch}"
            )
    if not branches:
        raise ValueError("branches must hold at least one branch, got none")

    def of_last(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return read(logits[:, -1])

    out: list[torch.Tensor] = [torch.empty(0)] * len(branches)
    for size in sorted({len(branch.suffix) for branch in branches}):
        # A row is asked once for each of its suffixes, after all prefixes that this suffix follows.
        asked: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for number, branch in enumerate(branches):
            if len(branch.suffix) == size:
                asked.setdefault((branch.row, branch.suffix), []).append(number)
        keys = sorted(asked)
        for start in range(0, len(keys), _COPIES):
            part = keys[start : start + _COPIES]
            copies = copies_of(rollouts, [row for row, _ in part])
            suffixes = torch.tensor([s for _, s in part], device=copies.completion_ids.device)
            places = torch.zeros(
                len(part), copies.completion_ids.shape[1] + 1, dtype=torch.bool,
                device=suffixes.device,
            )  # fmt: skip
            for copy, key in enumerate(part):
                places[copy, [branches[n].prefix for n in asked[key]]] = True
            found = ask(model, copies, Question(suffixes, of_last, by_row=True), how, places)
            for copy, key in enumerate(part):
                for n in asked[key]:
                    out[n] = found[copy, branches[n].prefix]
    return torch.stack(out)
