"""The entropy of whole answers, where an answer has several tokens.

The paper's H(y | q, o_<=t) is the entropy of the token after the postfix. Most tokenizers write
numbers digit by digit, so this is the entropy of the first digit: "18" is still open after "1". By
the chain rule the entropy of the whole answer is

    H(y) = sum over beginnings b of p(b) h(b),

where p(b) is the probability that the answer begins with the tokens b, and h(b) is the entropy of
what follows b: another token, or the end of the answer. :func:`whole_answers` expands the tree of
beginnings, the most probable ones first, until they hold a given share of the probability. The sum
over these is exact. What is left out can only add to it, and a bound says how much.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from iapo_mini.early_exit.branches import ask_branches, postfix_branch, with_cache
from iapo_mini.early_exit.question import EVERY_PREFIX, EarlyExit
from iapo_mini.errors import MOST_TOKENS, check_number
from iapo_mini.information import encode_postfix
from iapo_mini.logprobs import NEVER
from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts


class Prefix(NamedTuple):
    """A prefix of a completion: number of the row, and its number of tokens."""

    row: int
    tokens: int


@dataclass(frozen=True)
class WholeAnswers:
    """What a policy would answer after each prefix, as far as the tree was expanded.

    Attributes:
        entropy: prefix -> nats, of the expanded part: a lower bound of the entropy.
        most: prefix -> nats, an upper bound of the entropy.
        left: prefix -> probability of the beginnings that were not expanded.
        answers: prefix -> answer text without outer spaces -> probability, of the most probable
            answers. Those that are written with different tokens are added up.
        asked: number of tokens of all questions.
    """

    entropy: dict[Prefix, float]
    most: dict[Prefix, float]
    left: dict[Prefix, float]
    answers: dict[Prefix, dict[str, float]]
    asked: int


_OPENING: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
"""Tokenizer -> tokens that contain ``<``, because decoding a large vocabulary takes a second."""


def ends_of_answer(policy: Policy) -> torch.Tensor:
    """(V,) bool: the tokens that end an answer, which contain ``<`` or end the completion."""
    tokenizer, size = policy.tokenizer, policy.model.config.get_text_config().vocab_size
    if tokenizer not in _OPENING:
        texts = tokenizer.batch_decode([[i] for i in range(min(len(tokenizer), size))])
        _OPENING[tokenizer] = [i for i, text in enumerate(texts) if "<" in text]
    out = torch.zeros(size, dtype=torch.bool)
    out[_OPENING[tokenizer]] = True
    out[policy.eos_ids.cpu()] = True
    return out.to(policy.device)


class _Node(NamedTuple):
    """A beginning of an answer after a prefix: its tokens, and its probability."""

    prefix: Prefix
    tokens: tuple[int, ...]
    p: float


def whole_answers(
    policy: Policy,
    rollouts: Rollouts,
    asked: torch.Tensor,
    how: EarlyExit = EVERY_PREFIX,
    *,
    mass: float = 0.95,
    longest: int = 6,
    width: int = 32,
    joined: bool = False,
) -> WholeAnswers:
    """Expand the tree of answers after every chosen prefix.

    At each level the least probable beginnings are dropped while everything dropped so far stays
    within a share of ``1 - mass``: half of it at the first level, and half of the rest at each
    further one.

    Args:
        policy: the policy that is forced to answer.
        rollouts: B completions in whole groups.
        asked: (B, L + 1) bool, the prefixes to ask after.
        how: postfix, way and memory.
        mass: share of the probability to expand, in (0, 1].
        longest: number of tokens at which an answer is cut. Answers that share these tokens count
            as one.
        width: largest number of beginnings of one prefix that are expanded at a level. If more are
            needed for ``mass``, ``left`` is above ``1 - mass``. 1 follows the most probable token.
        joined: encode the postfix together with the last token of the prefix
            (:func:`~iapo_mini.early_exit.branches.postfix_branch`).

    Raises:
        ValueError: for an option out of range, or when no prefix is asked.
    """
    check_number("mass", mass, above=0, most=1)
    check_number("longest", longest, 1, MOST_TOKENS)
    check_number("width", width, 1, MOST_TOKENS)
    if not asked.any():
        raise ValueError("asked must hold at least one prefix, got none")
    model, ends = policy.for_inference(), ends_of_answer(policy)
    kept = (~ends).nonzero()[:, 0].tolist()
    read = partial(_what_follows, ends, min(width, len(kept)))
    encode_postfix(policy, how.postfix)  # refuses a text without tokens
    rollouts = with_cache(model, rollouts)
    prefixes = [Prefix(int(i), int(t)) for i, t in asked.nonzero()]
    start = {p: postfix_branch(policy, rollouts, *p, how.postfix, joined) for p in prefixes}
    zeros = dict.fromkeys(prefixes, 0.0)
    sums = WholeAnswers(zeros, dict(zeros), dict(zeros), {prefix: {} for prefix in prefixes}, 0)
    alive, tokens = [_Node(prefix, (), 1.0) for prefix in prefixes], 0
    for level in range(longest):
        if not alive:
            break
        origins = [start[node.prefix] for node in alive]
        branches = [at._replace(suffix=at.suffix + n.tokens) for at, n in zip(origins, alive)]
        tokens += sum(len(branch.suffix) for branch in branches)
        found = ask_branches(model, rollouts, branches, read, how).tolist()
        below = _count(policy, sums, alive, found, kept)
        alive = []
        last = level + 1 == longest
        further = (longest - level - 1) * math.log(len(kept) + 1)  # most entropy of what follows
        for prefix, (children, rest) in below.items():
            if last:
                for child in children:
                    _add(sums.answers[prefix], policy, child.tokens, child.p)
                continue
            allowed = (1 - mass) * (1 - 0.5 ** (level + 1)) - sums.left[prefix] - rest
            chosen, dropped = _split(children, allowed, width)
            sums.left[prefix] += rest + dropped
            sums.most[prefix] += (rest + dropped) * further
            alive += chosen
    most = {prefix: sums.entropy[prefix] + sums.most[prefix] for prefix in prefixes}
    return replace(sums, most=most, asked=tokens)


def _count(
    policy: Policy,
    sums: WholeAnswers,
    nodes: list[_Node],
    found: list[list[float]],
    kept: list[int],
) -> dict[Prefix, tuple[list[_Node], float]]:
    """Add the entropy and the ends of expanded nodes to the sums.

    Returns the nodes below those of each prefix, and the probability of tokens that are not among
    the most probable ones.
    """
    below: dict[Prefix, tuple[list[_Node], float]] = {}
    for node, (entropy, end, *values) in zip(nodes, found):
        sums.entropy[node.prefix] += node.p * entropy
        _add(sums.answers[node.prefix], policy, node.tokens, node.p * end)
        children, rest = below.get(node.prefix, ([], 0.0))
        wide = len(values) // 2
        for p, place in zip(values[:wide], values[wide:]):
            tokens = (*node.tokens, kept[int(place)])
            children.append(_Node(node.prefix, tokens, node.p * p))
        rest += node.p * max(0.0, 1 - end - sum(values[:wide]))
        below[node.prefix] = children, rest
    return below


def _what_follows(ends: torch.Tensor, wide: int, logits: torch.Tensor) -> torch.Tensor:
    """Entropy, probability of the end, and the ``wide`` most probable tokens that do not end.

    Returns (n, 2 + 2 * wide) fp32: after the first two, probabilities and then places in ``~ends``.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1).clamp_(min=NEVER)
    end = log_p[:, ends].logsumexp(1, keepdim=True)  # the ways to end are one event
    log_p = log_p[:, ~ends]
    entropy = -(log_p.exp() * log_p).sum(1, keepdim=True) - end.exp() * end
    top, at = log_p.topk(wide, dim=1)
    return torch.cat([entropy, end.exp(), top.exp(), at.float()], dim=1)


def _add(to: dict[str, float], policy: Policy, tokens: tuple[int, ...], p: float) -> None:
    text = str(policy.tokenizer.decode(list(tokens), skip_special_tokens=False)).strip()
    to[text] = to.get(text, 0.0) + p


def _split(children: list[_Node], allowed: float, width: int) -> tuple[list[_Node], float]:
    """The nodes to expand, most probable first, and the probability of all others."""
    ordered = sorted(children, key=lambda node: -node.p)
    chosen = ordered[:width]
    dropped = sum(node.p for node in ordered[width:])
    while chosen and dropped + chosen[-1].p <= allowed:
        dropped += chosen.pop().p
    return chosen, dropped


def top_answers(found: WholeAnswers) -> Iterator[tuple[Prefix, str, float]]:
    """The most probable answer after each prefix, and its probability."""
    for prefix, answers in found.answers.items():
        text = max(answers, key=lambda answer: answers[answer])
        yield prefix, text, answers[text]
