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
# No dot here matches a line break, so a thought of two lines has a bad format.
_PLAIN = r"(?:(?!<think>|<answer>).)*"
_RELEASED_FORMAT = re.compile(rf"{_PLAIN}<think>{_PLAIN}</think>\n<answer>{_PLAIN}</answer>\n?")


def parse_answer(completion: str) -> str | None:
    """The answer of a well-formed completion, else None.

    Well-formed: exactly one ``<think>...</think>`` followed by exactly one ``<answer>...</answer>``
    and nothing else; a tag inside either of them makes it ill-formed.
    """
    # Counted first: on a text of many tags the pattern would try every pair of them.
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return None
    match = _FORMAT.fullmatch(completion)
    return None if match is None else match[2].strip()


def reward(completion: str, reference: str) -> tuple[float, bool]:
    """Reward of one completion and whether its answer is right.

    Args:
        completion: text with its tags.
        reference: reference answer.

    Returns:
        ``(format + correctness, correct)``: 1.5 right, -0.5 well-formed but wrong, -1.5 ill-formed
        (an answer is only read from a well-formed completion).
    """
    answer = parse_answer(completion)
    if answer is None:
        return -1.5, False
    correct = equal_answers(answer, reference)
    return (1.5 if correct else -0.5), correct


def released_reward(completion: str, reference: str) -> tuple[float, bool]:
    """Reward of one completion by the paper's released code, and whether its answer is right.

    Format (+0.5 or -0.5) and correctness (+1 or -1) are judged apart (``compute_reward.py``, lines
    31 to 46), so a right answer in a bad format earns +0.5 where :func:`reward` has -1.5. The
    answer is what follows the last ``<answer>``, all of the text where there is no tag; a
    ``\\boxed{}`` in it is opened. The format wants a line break between ``</think>`` and
    ``<answer>`` and none within the thought: a pay for writing one line. Answers are compared by
    our verifier; the released code compares normalised strings.

    Args:
        completion: text with its tags; reference: reference answer.
    """
    answer = completion.split("<answer>")[-1].split("</answer>")[0].strip()
    formed = _RELEASED_FORMAT.fullmatch(completion) is not None
    correct = equal_answers(answer, reference)
    return (0.5 if formed else -0.5) + (1.0 if correct else -1.0), correct


def lenient_answer(completion: str) -> str | None:
    """The answer that a completion gives in whatever format.

    It is the content of the last ``<answer>`` tag, else that of the last ``\\boxed{}``, else the
    last number of the text. None where there is none of them.
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
"""Rewards by the name that ``TrainConfig.reward`` gives."""


def check_completion(policy: Policy, problem: Problem) -> None:
    """Make sure that this policy can earn the full reward, before any long work.

    A perfect completion is written as its tokenizer writes it, and read back as rollouts are.
    Model families differ in what ends a turn, and in what their tokenizers leave out.

    Raises:
        ValueError: when the perfect completion scores less than 1.5, or does not end its row.
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
            f"written: {told}, and is read as {read!r}; look at its special and stop tokens "
            "(generation_config.json, tokenizer_config.json)."
        )


def score(
    rollouts: Rollouts,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    how: str = "strict",
) -> Rollouts:
    """Rollouts with ``rewards`` (B,) fp32, ``correct`` (B,) bool and ``references`` filled in.

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
