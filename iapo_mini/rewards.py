"""Rewards of the paper's released code: format (+0.5 / -0.5) plus correctness (+1 / -1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from iapo_mini.policy import Policy
from iapo_mini.problems.verify import equal_answers
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import from_texts
from iapo_mini.tasks import Problem

_FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# The dots here do not match line breaks, so a thought of two lines has a bad format.
_PLAIN = r"(?:(?!<think>|<answer>).)*"
_RELEASED_FORMAT = re.compile(rf"{_PLAIN}<think>{_PLAIN}</think>\n<answer>{_PLAIN}</answer>\n?")


def parse_answer(completion: str) -> str | None:
    """The answer of a well-formed completion, or None.

    A well-formed completion is exactly one ``<think>...</think>``, followed by exactly one
    ``<answer>...</answer>``, and nothing else. Neither may contain another tag.
    """
    # The tags are counted first, because the pattern would try every pair of many tags.
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return None
    match = _FORMAT.fullmatch(completion)
    return None if match is None else match[2].strip()


def reward(completion: str, reference: str) -> tuple[float, bool]:
    """Reward of one completion, and whether its answer is right.

    Args:
        completion: text with its tags.
        reference: reference answer.

    Returns:
        ``(format + correctness, correct)``: 1.5 if right, -0.5 if well-formed but wrong, -1.5 if
        ill-formed (the answer is read only from a well-formed completion).
    """
    answer = parse_answer(completion)
    if answer is None:
        return -1.5, False
    correct = equal_answers(answer, reference)
    return (1.5 if correct else -0.5), correct


def released_reward(completion: str, reference: str) -> tuple[float, bool]:
    """Reward of one completion as in the paper's released code, and whether its answer is right.

    Format (+0.5 or -0.5) and correctness (+1 or -1) are judged separately (``compute_reward.py``,
    lines 31 to 46). So a right answer in a bad format earns +0.5, where :func:`reward` gives -1.5.
    The answer is the text after the last ``<answer>``, or the whole text if there is no tag; a
    ``\\boxed{}`` around it is removed. The format needs a line break between ``</think>`` and
    ``<answer>`` and none within the thought, so it rewards thoughts of a single line. Answers are
    compared by our verifier; the released code compares normalised strings.

    Args:
        completion: text with its tags; reference: reference answer.
    """
    answer = completion.split("<answer>")[-1].split("</answer>")[0].strip()
    formed = _RELEASED_FORMAT.fullmatch(completion) is not None
    correct = equal_answers(answer, reference)
    return (0.5 if formed else -0.5) + (1.0 if correct else -1.0), correct


def lenient_answer(completion: str) -> str | None:
    """The answer of a completion in any format.

    It is the content of the last ``<answer>`` tag, else that of the last ``\\boxed{}``, else the
    last number of the text. None if there is none of these.
    """
    _, opened, rest = completion.rpartition("<answer>")
    if opened and (tagged := rest.split("</answer>")[0].strip()):
        return tagged
    if boxed := _BOXED.findall(completion):
        return boxed[-1].strip()
    numbers = _NUMBER.findall(completion)
    return numbers[-1] if numbers else None


def lenient_correct(completion: str, reference: str) -> bool:
    """Whether :func:`lenient_answer` is right: the skill of a policy apart from its format."""
    answer = lenient_answer(completion)
    return answer is not None and equal_answers(answer, reference)


JUDGES: dict[str, Callable[[str, str], tuple[float, bool]]] = {
    "strict": reward,
    "released": released_reward,
}
"""Reward functions by their names in ``TrainConfig.reward``."""


def check_completion(policy: Policy, problem: Problem) -> None:
    """Check, before any long work, that this policy can earn the full reward.

    A perfect completion is encoded with the policy's tokenizer and read back as rollouts are.
    Model families differ in the token that ends a turn and in the text that their tokenizers drop.

    Raises:
        ValueError: when the perfect completion scores less than 1.5, or ends too early.
    """
    text = f"<think>\nThe answer is {problem.answer}.\n</think>\n<answer>{problem.answer}</answer>"
    rollouts = score(from_texts(policy, [problem], [text]), policy.tokenizer, [problem])
    ids, stops = rollouts.completion_ids[0], policy.eos_ids
    early = int(torch.isin(ids[:-1], stops).sum())
    reward = float(rollouts.rewards[0])
    if reward < 1.5 or early:
        told = "a token in its middle ends the row" if early else f"it scores {reward:g}"
        read = rollouts.texts(policy.tokenizer)[0]
        raise ValueError(
            f"model is '{policy.tokenizer.name_or_path}', with which a perfect completion can't be "
            f"written: {told}, and it is read as {read!r}; check its special and stop tokens "
            "(generation_config.json, tokenizer_config.json)."
        )


def score(
    rollouts: Rollouts,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    how: str = "strict",
) -> Rollouts:
    """Fill in ``rewards`` (B,) fp32, ``correct`` (B,) bool and ``references``.

    Args:
        rollouts: B completions; problem j owns rows j*G to (j+1)*G.
        tokenizer: the policy's tokenizer.
        problems: B / G problems.
        how: a key of ``JUDGES``.
    """
    references = tuple(p.answer for p in problems for _ in range(rollouts.num_generations))
    results = [
        JUDGES[how](text, reference)
        for text, reference in zip(rollouts.texts(tokenizer), references)
    ]
    device = rollouts.completion_ids.device
    return replace(rollouts, references=references).filled(
        rewards=torch.tensor([r for r, _ in results], dtype=torch.float32, device=device),
        correct=torch.tensor([c for _, c in results], dtype=torch.bool, device=device),
    )
