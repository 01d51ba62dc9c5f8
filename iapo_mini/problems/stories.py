"""The arithmetic story world: problems and labelled chains of thought.

A story follows one quantity through two to six events ("Mia has 12 apples. She buys 5 more. ...")
and asks for its last value. The world also writes the chain of thought, so it knows the role of
every token. This is the ground truth against which token informativeness is judged. No benchmark of
real text has it.

Three choices matter for the science:

* **Streams are split by arithmetic, not by wording.** A hash of the numbers and operations alone
  decides between train, tune and test, so a test story is never a renamed training story.
* **Wordiness is drawn once per chain** (:func:`chain_of_thought`), so completions of one prompt
  differ widely in length although they compute the same thing.
* **A step can be an equation, prose, or a bare result.** The bare result ("35 apples.") is the
  shortest, but the policy must then do the arithmetic without writing it down, and a small policy
  often gets that wrong. So shorter completions are not always better ones.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iapo_mini.chat import token_texts
from iapo_mini.errors import MOST_STEPS, check_choice, check_number
from iapo_mini.tasks import Problem, Step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("compute", "restate", "plan", "check", "hedge", "conclude")
"""Roles of chain-of-thought tokens. Tags and the final answer have the role ``"format"``, and text
that a policy wrote outside the world's grammar has the role ``"other"``."""

SPLITS = ("train", "tune", "test")
MAX_VALUE = 60
"""Largest value a quantity takes in a story (inclusive)."""

_SHE = "Mia Anna Lena Sara Nora Ella Ruth Vera Rosa Ines Amy Kate".split()
_HE = "Tom Ben Max Leo Paul Omar Ivan Hugo Sam Jack Noah Emil".split()
_ITEMS = (
    "apples pears coins books stamps cards shells beads pens marbles cakes eggs "
    "plums stones toys keys tickets buttons flowers lemons cups boxes nuts rings"
).split()
_PLACES = "shop market school park library station museum garden".split()

_EVENTS = {
    "+": (
        "{S} buys {n} more",
        "{friend} gives {o} {n} more",
        "{S} finds {n} on the way home",
        "{n} more arrive by mail",
        "{S} wins {n} in a game",
    ),
    "-": (
        "{S} gives {n} to {friend}",
        "{S} loses {n} on the bus",
        "{n} of them break",
        "{S} sells {n} at the market",
        "{friend} borrows {n} of them",
    ),
    "*": (
        "{S} makes it {n} times as many",
        "the pile grows to {n} times its size",
        "{friend} trades {o} {n} for each one",
    ),
    "/": (
        "{S} keeps one of {n} equal parts",
        "{S} shares them evenly among {n} and keeps one share",
        "they are packed {n} to a bag and now only bags count",
    ),
}
_DOUBLE = ("{S} doubles the pile", "{friend} gives {o} as many again")
_HALVE = ("{S} sells half of them", "{S} gives half of them to {friend}")
_DISTRACTORS = (
    "{friend} has {k} {other}",
    "it rains for {k} hours",
    "the {place} opens at {k}",
    "{S} is {k} years old",
    "the {place} is far away",
    "{friend} likes {other}",
)

_PLAN = (
    "Let me go one step at a time.",
    "Next I look at what happens to the {items}.",
    "Now I need to find the next number.",
    "First I see where {name} stands.",
)
_RESTATE = (
    "The story says that {event}.",
    "We are told that {event}.",
    "The question asks how many {items} {name} has.",
)
_HEDGE = (
    "Hmm, this part needs some care.",
    "Wait, let me think about that again.",
    "Maybe I should read it once more.",
    "I hope that is right so far.",
)
_CHECK = ("Check: {inverse}, good.", "Going back, {inverse}, as before.")
_CONCLUDE = ("So {name} has {r} {items} now.", "In the end that leaves {r} {items}.")

# The first words of a sentence determine its role; `_COMPUTE` matches compute sentences.
_OPENERS = {
    "plan": ("Let me go", "Next I", "Now I", "First I"),
    "restate": ("The", "We"),
    "hedge": ("Hmm", "Wait", "Maybe", "I hope"),
    "check": ("Check", "Going"),
    "conclude": ("So", "In"),
}
_COMPUTE = re.compile(r"\s*(\d+\b|That makes\b|This gives\b)")
_TAGS = re.compile(r"(</?think>|</?answer>|<\|[a-z_]+\|>)")


@dataclass(frozen=True)
class Segment:
    """A stretch of completion text, and the role of all its tokens."""

    text: str
    role: str


def apply(value: int, op: str, operand: int) -> int:
    """Compute ``value op operand`` for the four operations of the story world."""
    return {
        "+": value + operand,
        "-": value - operand,
        "*": value * operand,
        "/": value // operand,
    }[op]


def operands(value: int, largest: int = MAX_VALUE) -> dict[str, list[int]]:
    """Each operation and the operands that keep the result of ``value`` in 1..largest.

    At most a tenth of ``largest`` is added or taken away, or 9 if that is more.
    """
    most = max(9, largest // 10)
    allowed = {
        "+": [n for n in range(2, most + 1) if value + n <= largest],
        "-": [n for n in range(2, most + 1) if value - n >= 1],
        "*": [n for n in (2, 3, 4) if value * n <= largest],
        "/": [n for n in (2, 3, 4, 5) if value % n == 0 and value > n],
    }
    return {op: numbers for op, numbers in allowed.items() if numbers}


def _draw_skeleton(
    rng: random.Random, n_steps: int, largest: int
) -> tuple[int, list[tuple[str, int]]]:
    """Draw a start value and ``n_steps`` (op, operand) pairs; all values lie in 1..largest."""
    value = start = rng.randint(3, 2 * largest // 3)
    operations = []
    for _ in range(n_steps):
        choices = operands(value, largest)
        op = rng.choice(list(choices))
        operand = rng.choice(choices[op])
        operations.append((op, operand))
        value = apply(value, op, operand)
    return start, operations


def split_of(start: int, operations: list[tuple[str, int]]) -> str:
    """The split of all stories with this arithmetic: 90% train, 5% tune, 5% test."""
    key = f"{start}" + "".join(f"{op}{n}" for op, n in operations)
    bucket = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % 100
    return "train" if bucket < 90 else "tune" if bucket < 95 else "test"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _tell(rng: random.Random, start: int, operations: list[tuple[str, int]]) -> Problem:
    """Write the story of a start value and its operations."""
    female = rng.random() < 0.5
    name = rng.choice(_SHE if female else _HE)
    friend = rng.choice([n for n in _SHE + _HE if n != name])
    items, other = rng.sample(_ITEMS, 2)
    words = {"S": "she" if female else "he", "o": "her" if female else "him", "friend": friend}
    steps, value = [], start
    for op, n in operations:
        templates = _EVENTS[op]
        if n == 2 and op in "*/" and rng.random() < 0.6:
            templates = _DOUBLE if op == "*" else _HALVE
        text = rng.choice(templates).format(n=n, **words)
        result = apply(value, op, n)
        steps.append(Step(value, op, n, result, text))
        value = result
    told = [f"{name} has {start} {items}."] + [_sentence(step.text) for step in steps]
    for _ in range(rng.choice((0, 1, 1, 2))):
        distractor = rng.choice(_DISTRACTORS).format(
            k=rng.randint(2, 40), other=other, place=rng.choice(_PLACES), **words
        )
        told.insert(rng.randint(1, len(told)), _sentence(distractor))
    told.append(f"How many {items} does {name} have now?")
    return Problem(" ".join(told), str(value), tuple(steps), name, items)


def stories(
    split: str,
    seed: int = 0,
    min_steps: int = 2,
    max_steps: int = 6,
    largest: int = MAX_VALUE,
) -> Iterator[Problem]:
    """Endless, seeded stream of stories. Different splits never share arithmetic.

    Args:
        split: ``"train"``, ``"tune"`` or ``"test"``.
        seed: equal seeds give equal streams.
        min_steps, max_steps: least and largest number of events (drawn uniformly, inclusive).
        largest: largest value of the quantity. The embedded policy knows numbers up to MAX_VALUE;
            larger ones have several tokens, and are harder.

    Raises:
        ValueError: for an unknown split, an empty range of steps, or a ``largest`` below 20.
    """
    check_choice("split", split, SPLITS)
    check_number("largest", largest, 20, MOST_STEPS)
    if not 1 <= min_steps <= max_steps:
        raise ValueError(
            f"min_steps must be 1 to max_steps, got {min_steps} with a max_steps of {max_steps}"
        )

    def generate() -> Iterator[Problem]:
        rng = random.Random(f"{split}/{seed}")
        while True:
            start, operations = _draw_skeleton(rng, rng.randint(min_steps, max_steps), largest)
            if split_of(start, operations) == split:
                yield _tell(rng, start, operations)

    return generate()


_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


def chain_of_thought(
    problem: Problem, rng: random.Random, wordiness: float | None = None
) -> list[Segment]:
    """Write a correct, labelled completion for a story.

    Args:
        problem: a story (``problem.steps`` is not empty).
        rng: source of the phrasing.
        wordiness: 0 (terse) to 1 (rambling); drawn uniformly when None.

    Returns:
        Segments whose texts join to ``<think> ... </think><answer> N</answer>``. Every sentence
        begins with a space, so a word is the same token wherever it stands.
    """
    w = rng.random() if wordiness is None else wordiness
    fill = {"name": problem.name, "items": problem.items}
    out = [Segment("<think>", "format")]

    def say(role: str, templates: tuple[str, ...], **extra: object) -> None:
        out.append(Segment(" " + rng.choice(templates).format(**fill, **extra), role))

    if rng.random() < w:
        say("restate", _RESTATE[2:])
    if rng.random() < 0.6 * w:
        say("plan", _PLAN)
    for step in problem.steps:
        before = rng.random()
        if before < 0.35 * w:
            say("plan", _PLAN)
        elif before < 0.75 * w:
            say("restate", _RESTATE[:2], event=step.text)
        elif before < 0.9 * w:
            say("hedge", _HEDGE)
        equation = f"{step.before} {step.op} {step.operand} = {step.result}"
        form = rng.random()
        if form < 0.16 - 0.12 * w:
            out.append(Segment(f" {step.result} {problem.items}.", "compute"))
        elif form < 0.78 - 0.30 * w:
            out.append(Segment(f" {equation}.", "compute"))
        elif form < 0.89 - 0.17 * w:
            opener = rng.choice(("That makes", "This gives"))
            out.append(Segment(f" {opener} {equation} {problem.items}.", "compute"))
        else:
            out.append(Segment(f" After {step.text},", "restate"))
            out.append(Segment(f" {equation}.", "compute"))
        after = rng.random()
        if after < 0.3 * w:
            inverse = f"{step.result} {_INVERSE[step.op]} {step.operand} = {step.before}"
            say("check", _CHECK, inverse=inverse)
        elif after < 0.45 * w:
            say("hedge", _HEDGE)
    if rng.random() < 0.8 * w:
        say("conclude", _CONCLUDE, r=problem.answer)
    out.append(Segment(f"</think><answer> {problem.answer}</answer>", "format"))
    return out


def label_roles(completion: str) -> list[Segment]:
    """Cut any completion, written by the world or by a policy, into segments with roles.

    Only the text is used: the first words of each sentence determine its role. The texts of the
    segments join to ``completion`` exactly. On the world's own chains the labels are those of
    :func:`chain_of_thought`.
    """
    out: list[Segment] = []
    in_answer = False
    for part in _TAGS.split(completion):
        if not part:
            continue
        if _TAGS.fullmatch(part) or in_answer:
            out.append(Segment(part, "format"))
            in_answer = part == "<answer>" or (in_answer and part != "</answer>")
            continue
        for sentence in re.split(r"(?<=\.)(?= )", part):
            out.extend(_label_sentence(sentence))
    return out


def _label_sentence(sentence: str) -> list[Segment]:
    if _COMPUTE.match(sentence):
        return [Segment(sentence, "compute")]
    if sentence.startswith(" After ") and "," in sentence:
        lead, rest = sentence.split(",", 1)
        return [Segment(lead + ",", "restate"), Segment(rest, "compute")]
    for role, openers in _OPENERS.items():
        if sentence.lstrip().startswith(openers):
            return [Segment(sentence, role)]
    return [Segment(sentence, "other")]


def token_roles(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Role of each token of a completion. A token belongs to the segment in which it begins.

    Args:
        tokenizer: the policy's tokenizer.
        ids: token ids of one completion, without padding.
    """
    pieces = token_texts(tokenizer, ids)
    ends: list[tuple[int, str]] = []
    position = 0
    for segment in label_roles("".join(pieces)):
        position += len(segment.text)
        ends.append((position, segment.role))
    roles, position, cursor = [], 0, 0
    for piece in pieces:
        while cursor < len(ends) - 1 and position >= ends[cursor][0]:
            cursor += 1
        roles.append(ends[cursor][1] if ends else "other")
        position += len(piece)
    return roles
