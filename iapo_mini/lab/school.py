"""Problems with worked solutions for real models: stories with large numbers, and files of them.

The numbers of the story world have one token each in the embedded policy. A published model writes
a number digit by digit, and a story whose numbers go up to 999 has answers of several tokens. The
wording is the same, so the roles of tokens are known here, too.

A file of worked solutions is in GSM8K's format: ``{"question": ..., "answer": "... #### 72"}``.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from iapo_mini.files import replace_text
from iapo_mini.problems.stories import chain_of_thought, stories
from iapo_mini.problems.worked import NOTE, worked_rows
from iapo_mini.tasks import Problem

Level = tuple[int, int]
"""Number of operations of a problem, and the largest value that may occur."""

LEVELS: tuple[Level, ...] = (
    (1, 99), (2, 99), (3, 99), (2, 999), (3, 999), (4, 999), (3, 9999), (4, 9999),
)  # fmt: skip
"""Levels of difficulty, from easy to hard."""

SHORT_LEVELS: tuple[Level, ...] = (
    (1, 99), (2, 99), (1, 999), (2, 999),
)  # fmt: skip
"""Levels whose solutions take about half as many tokens, which a CPU needs."""


class Worked(NamedTuple):
    """A problem and the thought that solves it, without tags."""

    problem: Problem
    thought: str

    def text(self) -> str:
        """The solution in the format that earns the full reward.

        The answer follows the tag at once. With a space in between, the first token of a forced
        answer would be the space in many tokenizers, and its entropy would say nothing.
        """
        return f"<think>{self.thought}</think><answer>{self.problem.answer}</answer>"


def worked_stories(split: str, seed: int, levels: Sequence[Level]) -> Iterator[Worked]:
    """Endless, seeded stream of worked stories, of each level in turn.

    Streams of different splits never share arithmetic (:func:`iapo_mini.problems.stories.stories`).
    """
    streams = [
        # Levels with equal seeds would tell of the same persons and numbers.
        stories(split, 1000 * seed + 10 * steps + len(str(largest)), steps, steps, largest)
        for steps, largest in levels
    ]
    rng = random.Random(f"school/{split}/{seed}")
    for stream in itertools.cycle(streams):
        problem = next(stream)
        chain = "".join(s.text for s in chain_of_thought(problem, rng))
        thought = chain.removeprefix("<think>").partition("</think>")[0].strip()
        yield Worked(problem, thought)


def write_worked(path: Path, worked: Sequence[Worked]) -> None:
    """Write worked solutions to a .jsonl file in GSM8K's format, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": w.problem.question, "answer": f"{w.thought}\n#### {w.problem.answer}"}
        for w in worked
    ]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_worked(data_file: str) -> list[Worked]:
    """Worked solutions of a file in GSM8K's format (.jsonl, .json or .parquet), in its order.

    Raises:
        ValueError: for a file that can't be read, or one with answers but no solutions.
    """
    found = []
    for problem, place, answer in worked_rows(data_file):
        thought, marked, _ = NOTE.sub("", answer).rpartition("####")
        if not marked or not thought.strip():
            raise ValueError(
                f"data_file is '{data_file}', where {place} has no worked solution; every answer "
                "must be a solution that ends with '#### number'."
            )
        found.append(Worked(problem, thought.strip()))
    return found
