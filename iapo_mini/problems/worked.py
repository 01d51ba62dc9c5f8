"""Worked solutions of GSM8K, and the kinds of the characters in them.

A row's answer holds a solution with the results of a calculator in it,

    She makes 9 * 2 = $<<9*2=18>>18 every day.

so the digits that are results are known. The notes of the calculator are left out of the text. In
a solution that a model has written, the number after an equals sign is taken for a result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from iapo_mini.problems.datasets import ALL, load_problems, rows_of_file
from iapo_mini.tasks import Problem

KINDS = ("result", "operand", "operator", "word", "punctuation")
"""Kinds of characters: digits of a result, of other numbers, signs of arithmetic, letters, others
(also ``$``, and line breaks)."""

NOTE = re.compile(r"<<[^<>]*>>")
"""A note for the calculator, which is not part of the text."""
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
_AFTER_EQUALS = re.compile(r"=\s*[-$€£]?\s*(?=[\d.])")
_TIMES = re.compile(r"(?<=\d) ?([xX]) ?(?=[\d$])")
_SIGNS = frozenset("+-*/=\u00d7\u00f7^%")


class Solution(NamedTuple):
    """A problem, its worked solution without notes, and the kind of each character."""

    problem: Problem
    text: str
    kinds: list[str]


def read_solution(answer: str) -> tuple[str, list[str]]:
    """The text of a row's answer without its notes and last line, and the kind of each character.

    A number right behind a note is a result, and so is one behind an equals sign.
    """
    text, results = "", set()
    at = 0
    solution = answer.split("####")[0].rstrip()
    for note in NOTE.finditer(solution):
        text += solution[at : note.start()]
        results.add(len(text))
        at = note.end()
    text += solution[at:]
    return text, character_kinds(text, results)


def character_kinds(text: str, results: Sequence[int] | set[int] = ()) -> list[str]:
    """The kind of each character, one of :data:`KINDS`.

    Args:
        text: a solution.
        results: places where a result is known to begin. Numbers behind ``=`` are results anyway.
    """
    kinds = ["word" if c.isalpha() else "punctuation" for c in text]
    starts = set(results) | {match.end() for match in _AFTER_EQUALS.finditer(text)}
    for number in _NUMBER.finditer(text):
        kind = "result" if number.start() in starts else "operand"
        end = number.start() + len(number[0].rstrip(","))
        kinds[number.start() : end] = [kind] * (end - number.start())
    for i, c in enumerate(text):
        if c in _SIGNS and not any(x.isalpha() for x in text[max(0, i - 1) : i + 2]):
            kinds[i] = "operator"
    for times in _TIMES.finditer(text):
        kinds[times.start(1)] = "operator"
    return kinds


def token_kinds(tokens: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The kind of each token: that of its first character that is not a space.

    Args:
        tokens: texts that join to the text of the kinds (or begin with it).
        kinds: one for each character. Characters beyond them are punctuation.
    """
    out, at = [], 0
    for token in tokens:
        first = at + len(token) - len(token.lstrip(" "))
        inside = first < min(at + len(token), len(kinds))
        out.append(kinds[first] if inside else "punctuation")
        at += len(token)
    return out


def worked_rows(data_file: str) -> Iterator[tuple[Problem, str, str]]:
    """Problem, place for messages and whole answer of each row of a file in GSM8K's form.

    Raises the errors of :func:`worked_solutions`.
    """
    problems = load_problems("gsm8k", ALL, data_file)
    for problem, (place, row) in zip(problems, rows_of_file(Path(data_file).expanduser())):
        found: Any = json.loads(row) if isinstance(row, str) else row
        yield problem, place, str(found["answer"])


def worked_solutions(data_file: str) -> list[Solution]:
    """All problems of a file in GSM8K's form with their worked solutions.

    Raises:
        ValueError: when the file can't be read, or a row holds no question or answer.
    """
    return [
        Solution(problem, *read_solution(answer)) for problem, _, answer in worked_rows(data_file)
    ]
