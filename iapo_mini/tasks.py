"""A problem, its chat messages, and the text that forces an early answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

POSTFIX = "</think><answer>"
"""Text that makes the policy answer early (paper, section on estimating s)."""

_SYSTEM = (
    "A conversation between a user and an assistant. The user asks a question and the assistant "
    "solves it. The assistant first thinks about the reasoning process and then gives the answer. "
    "The reasoning is enclosed in <think>...</think> and the answer in <answer>...</answer>."
)
# The worked example is part of the system prompt and not a separate turn. The chat templates of
# several reasoning models drop the thinking from earlier assistant turns, which would remove half
# of the example.
_EXAMPLE = "\nExample: What is 2 + 2?\n<think>2 + 2 = 4.</think>\n<answer>4</answer>"

SYSTEM_PROMPT = _SYSTEM + _EXAMPLE
"""The paper's system prompt, with its worked example."""

SYSTEM_PROMPT_INTEGER = _SYSTEM + " The answer must be a single integer." + _EXAMPLE
"""The system prompt for stories, GSM8K and DAPO-Math-17k, whose answers are integers."""


@dataclass(frozen=True)
class Step:
    """One event of a story: ``result = before op operand`` (integers); ``text`` is its wording."""

    before: int
    op: str
    operand: int
    result: int
    text: str


@dataclass(frozen=True)
class Problem:
    """A question and its reference answer.

    Only stories have ``steps``, ``name`` and ``items``. ``system`` is the system prompt, which
    depends on the data set (paper, Section 5).
    """

    question: str
    answer: str
    steps: tuple[Step, ...] = ()
    name: str = ""
    items: str = ""
    system: str = SYSTEM_PROMPT_INTEGER


def messages(problem: Problem) -> list[dict[str, str]]:
    """Chat messages for a problem: its system prompt with one worked example, then the question.

    The embedded policy was trained without a system prompt, so its chat template leaves it out.
    """
    return [
        {"role": "system", "content": problem.system},
        {"role": "user", "content": problem.question},
    ]


def fingerprint_of_problems(problems: Sequence[Problem]) -> str:
    """Sixteen characters of the hash of these prompts and reference answers, in their order."""
    told = json.dumps([[messages(problem), problem.answer] for problem in problems])
    return hashlib.sha256(told.encode()).hexdigest()[:16]
