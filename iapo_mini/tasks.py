"""What is asked: a problem, its chat messages, and the text that forces an early answer."""

from __future__ import annotations

from dataclasses import dataclass

POSTFIX = "</think><answer>"
"""Text that forces an early answer (paper, section on estimating s)."""

_SYSTEM = (
    "A conversation between a user and an assistant. The user asks a question and the assistant "
    "solves it. The assistant first thinks about the reasoning process and then gives the answer. "
    "The reasoning is enclosed in <think>...</think> and the answer in <answer>...</answer>."
)
# The worked example is not a turn of its own: the chat templates of several reasoning models drop
# the thinking from earlier assistant turns, and with it half of the example.
_EXAMPLE = "\nExample: What is 2 + 2?\n<think>2 + 2 = 4.</think>\n<answer>4</answer>"

SYSTEM_PROMPT = _SYSTEM + _EXAMPLE
"""The paper's system prompt with its worked example."""

SYSTEM_PROMPT_INTEGER = _SYSTEM + " The answer must be a single integer." + _EXAMPLE
"""The same for stories, GSM8K and DAPO-Math-17k, whose answers are integers."""


@dataclass(frozen=True)
class Step:
    """One event: ``result = before op operand`` (integers), told in the story by ``text``."""

    before: int
    op: str
    operand: int
    result: int
    text: str


@dataclass(frozen=True)
class Problem:
    """A question and its reference answer; ``steps``, ``name`` and ``items`` only for stories.

    ``system`` is the system prompt, which depends on the data set (paper, Section 5).
    """

    question: str
    answer: str
    steps: tuple[Step, ...] = ()
    name: str = ""
    items: str = ""
    system: str = SYSTEM_PROMPT_INTEGER


def messages(problem: Problem) -> list[dict[str, str]]:
    """Chat messages for a problem: its system prompt with one worked example, the question.

    The embedded policy was trained without a system prompt and its chat template leaves it out.
    """
    return [
        {"role": "system", "content": problem.system},
        {"role": "user", "content": problem.question},
    ]
