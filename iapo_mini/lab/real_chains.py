"""Measure one chain of a real model: all estimators, token by token and sentence by sentence.

:func:`measure` returns a record of plain numbers, so that a study can keep one line per chain and
continue after a stop (:mod:`iapo_mini.lab.real`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from iapo_mini.chat import continuation_ids, token_texts
from iapo_mini.early_exit.answers import Prefix, top_answers, whole_answers
from iapo_mini.early_exit.branches import ask_branches, copies_of, postfix_branch, with_cache
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.early_exit.strides import sentence_ends, spread
from iapo_mini.information import (
    answer_entropies,
    answer_surprisals,
    belief_shift,
    informativeness,
    next_token_informativeness,
)
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policy import Policy
from iapo_mini.problems.stories import chain_of_thought, stories
from iapo_mini.problems.verify import equal_answers
from iapo_mini.problems.worked import token_kinds
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import encode_prompts, from_ids
from iapo_mini.tasks import POSTFIX, Problem

ESTIMATORS = ("entropy", "pointwise", "belief_shift", "next_token", "random")
CANDIDATES = 3
"""Number of answers over which the belief shift is computed: the answer and two other numbers."""
WIDTH = 6
"""Largest number of beginnings of an answer that are expanded at a level."""
LONGEST = 4
"""Number of tokens of an answer that are told apart."""
PARTS = 10
OPENING = "<think>"


class Variant(NamedTuple):
    """A way to force an answer: the text, and how it meets the chain.

    ``joined`` encodes it together with the last token of the prefix; ``sentence`` asks only at the
    ends of sentences.
    """

    postfix: str = POSTFIX
    joined: bool = False
    sentence: bool = False


VARIANTS: dict[str, Variant] = {
    "paper": Variant(),
    "line_break": Variant("\n</think>\n<answer>"),
    "natural": Variant("\nSo the final answer is:\n</think>\n<answer>"),
    "joined": Variant(joined=True),
    "sentence": Variant(sentence=True),
}
"""Ways to force an answer that the study compares."""


class Chain(NamedTuple):
    """A chain to measure.

    Attributes:
        problem: the problem.
        text: the thought, without tags.
        kinds: kind of each of its characters (:mod:`iapo_mini.problems.worked`).
        answer: the answer that the chain leads to: the reference, or the model's own.
        right: whether that is the right answer.
    """

    problem: Problem
    text: str
    kinds: list[str]
    answer: str
    right: bool


def candidates(chain: Chain) -> list[str]:
    """The chain's answer and ``CANDIDATES - 1`` other numbers, from its end or made up."""
    told = re.findall(r"\d[\d,]*(?:\.\d+)?", chain.problem.question + " " + chain.text)
    numbers = [number.replace(",", "").rstrip(".") for number in reversed(told)]
    numbers += [str(n) for n in range(1, 2 * CANDIDATES)]
    others = [n for n in dict.fromkeys(numbers) if not equal_answers(n, chain.answer)]
    return [chain.answer, *others[: CANDIDATES - 1]]


def _entropies(policy: Policy, rollouts: Rollouts, variant: Variant) -> tuple[torch.Tensor, int]:
    """Answer entropies (L + 1,) of the only row, and the number of tokens of all questions."""
    n = int(rollouts.lengths[0])
    asked = torch.ones(1, n + 1, dtype=torch.bool, device=policy.device)
    if variant.sentence:
        asked = sentence_ends(policy, rollouts)
    places = asked[0].nonzero()[:, 0].tolist()
    if not variant.joined:
        how = EarlyExit(variant.postfix, stride="sentence" if variant.sentence else 1)
        tokens = len(places) * len(continuation_ids(policy.tokenizer, variant.postfix))
        return answer_entropies(policy, rollouts, how)[0], tokens
    branches = [postfix_branch(policy, rollouts, 0, t, variant.postfix, True) for t in places]
    found = ask_branches(
        policy.for_inference(), rollouts, branches, lambda logits: logits_entropy(logits)[:, None]
    )
    values = torch.zeros(1, n + 1, device=policy.device)
    values[0, places] = found[:, 0]
    return spread(values, asked)[0], sum(len(branch.suffix) for branch in branches)


def _tenths(length: int) -> list[int]:
    return [round(length * part / PARTS) for part in range(PARTS + 1)]


def _forced(policy: Policy, rollouts: Rollouts, variant: Variant, reference: str) -> list[list]:
    """``[probability, right]`` of the forced answer after each tenth of the chain.

    It is the most probable answer of those that begin with the most probable tokens.
    """
    n = int(rollouts.lengths[0])
    asked = torch.zeros(1, n + 1, dtype=torch.bool)
    asked[0, _tenths(n)] = True
    found = whole_answers(
        policy, rollouts, asked, EarlyExit(variant.postfix), mass=0.9, width=1, longest=LONGEST,
        joined=variant.joined,
    )  # fmt: skip
    told = {prefix.tokens: (text, p) for prefix, text, p in top_answers(found)}
    return [
        [round(told[t][1], 5), bool(told[t][0]) and equal_answers(told[t][0], reference)]
        for t in _tenths(n)
    ]


def _whole(policy: Policy, rollouts: Rollouts, asked: torch.Tensor) -> dict[str, Any]:
    found = whole_answers(policy, rollouts, asked, width=WIDTH, longest=LONGEST)
    places = asked[0].nonzero()[:, 0].tolist()

    def of(values: Mapping[Prefix, float]) -> list[float]:
        return [round(values[Prefix(0, t)], 5) for t in places]

    return {
        "asked": places, "entropy": of(found.entropy), "most": of(found.most),
        "left": of(found.left), "tokens": found.asked,
    }  # fmt: skip


def as_rollouts(policy: Policy, chain: Chain) -> Rollouts:
    """The chain behind its prompt, as one row that has not ended, with its keys and values."""
    prompt_ids, prompt_mask = encode_prompts(policy, [chain.problem])
    ids = continuation_ids(policy.tokenizer, OPENING + chain.text)
    rollouts = from_ids(policy, prompt_ids, prompt_mask, [ids], 1)
    return with_cache(policy.for_inference(), rollouts)


def measure(
    policy: Policy, chain: Chain, variants: Sequence[str] = tuple(VARIANTS)
) -> dict[str, Any]:
    """Measure one chain with every estimator.

    Args:
        policy: the policy that is asked.
        chain: the chain.
        variants: names of the ways to force an answer.

    Returns:
        ``tokens`` (texts), ``kinds``, ``sentences`` (number of each token's sentence), ``scores``
        (estimator -> nats per token), ``whole`` (entropy of whole answers at sentence ends, and
        that of the first token there), ``variants`` (name -> ``entropy`` after each prefix,
        ``forced`` answers by tenth, ``tokens`` asked), ``right``.
    """
    rollouts = as_rollouts(policy, chain)
    mask, n = rollouts.completion_mask, int(rollouts.lengths[0])
    texts = token_texts(policy.tokenizer, rollouts.completion_ids[0].tolist())
    kinds = token_kinds(texts, ["tag"] * len(OPENING) + chain.kinds)
    ends = sentence_ends(policy, rollouts)
    answers = [f"{text}</" for text in candidates(chain)]  # the tag distinguishes 7 from 72
    surprisals = answer_surprisals(policy, copies_of(rollouts, [0] * len(answers)), answers)
    beliefs = torch.log_softmax(-surprisals.T[None], dim=-1)
    with torch.no_grad():
        _, following = token_logprobs(policy.for_inference(), rollouts)
    asked = {name: _entropies(policy, rollouts, VARIANTS[name]) for name in variants}
    paper = asked["paper"][0]
    noise = random.Random(chain.text)
    scores = {
        "entropy": informativeness(paper[None], mask)[0],
        "pointwise": informativeness(surprisals[:1], mask)[0],
        "belief_shift": belief_shift(beliefs, mask)[0],
        "next_token": next_token_informativeness(following, mask)[0],
        "random": torch.tensor([noise.gauss(0, 1) for _ in range(n)]),
    }
    whole = _whole(policy, rollouts, ends)
    forced: dict[tuple[str, bool], list[list]] = {}  # asking at fewer places changes no answer
    for name in variants:
        variant = VARIANTS[name]
        if variant[:2] not in forced:
            forced[variant[:2]] = _forced(policy, rollouts, variant, chain.problem.answer)
    return {
        "tokens": texts, "kinds": kinds, "right": chain.right,
        "sentences": (ends[0].long().cumsum(0) - 1)[:n].tolist(),
        "scores": {name: _rounded(values) for name, values in scores.items()},
        "whole": whole | {"first": _rounded(paper[whole["asked"]])},
        "variants": {
            name: {
                "entropy": _rounded(entropies), "tokens": tokens,
                "forced": forced[VARIANTS[name][:2]],
            }
            for name, (entropies, tokens) in asked.items()
        },
    }  # fmt: skip


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def heat_maps(policies: Mapping[str, Policy]) -> list[dict[str, Any]]:
    """The drops of the answer entropy along one story, by token and by sentence, by policy.

    The story is the first of the test stream with four operations, and the chain is the first that
    the world writes for it. Every policy reads the same text.

    Args:
        policies: name -> policy.

    Returns:
        For each policy two maps with ``title``, ``tokens`` and ``values`` (nats, one for each
        token): the drop at the token, and the drop over the sentence that the token is in.
    """
    story = next(problem for problem in stories("test") if len(problem.steps) == 4)
    segments = chain_of_thought(story, random.Random(0))
    text = "".join(part.text for part in segments if part.role != "format").strip()
    chain = Chain(story, text, ["word"] * len(text), story.answer, True)
    maps = []
    for name, policy in policies.items():
        rollouts = as_rollouts(policy, chain)
        texts = token_texts(policy.tokenizer, rollouts.completion_ids[0].tolist())
        entropies, _ = _entropies(policy, rollouts, VARIANTS["paper"])
        drops = entropies[:-1] - entropies[1:]
        number = sentence_ends(policy, rollouts)[0, :-1].long().cumsum(0)
        over = torch.zeros(len(texts) + 1, device=drops.device).index_add(0, number, drops)[number]
        for how, values in (("token by token", drops), ("sentence by sentence", over)):
            maps.append({"title": f"{name}, {how}", "tokens": texts, "values": _rounded(values)})
    return maps
