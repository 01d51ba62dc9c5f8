"""What is wrong, told in one sentence: arguments out of range, and errors of other libraries.

Upper bounds stand here, too. They are far above what anybody needs: they are there so that a slip
of the finger ends in a sentence, not in a process that dies or never ends.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MOST_REAL = 1e9
"""Of weights and rates: beyond it nothing else is left of the seven digits of fp32."""

LEAST_TEMPERATURE = 1e-6
"""Of a temperature that is not 0: below it logits overflow."""

MOST_SEED = 2**32 - 1
"""Of a seed, as in NumPy: a seed of ours times a million still is one of torch's."""

MOST_STEPS = 10**9
"""Of steps and of what is counted in steps."""

MOST_ROWS = 65_536
"""Of problems and completions at a time."""

MOST_PROBLEMS = 10**6
"""Of problems that are judged one after the other."""

MOST_TOKENS = 2**20
"""Of tokens in a sequence: the longest contexts there are."""

MOST_RANK = 16_384
"""Of an adapter's rank, and of a hidden size: the widest models there are."""

MOST_THREADS = 1024
"""Of threads and processes: far more end the process, without a word of Python's."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough to be part of our own sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":. ")


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and not longer than one."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not write out a number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse what is not among the allowed words.

    Raises:
        ValueError: naming the argument, the words, the value, and the word that is nearest to it.
    """
    words = list(allowed)
    if value in words:
        return
    near = difflib.get_close_matches(str(value), words, 1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(words)}, got {shown(value)}{guess}")


def check_number(
    name: str,
    value: float,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
) -> None:
    """Refuse a number outside ``least`` to ``most``, or not above ``above``; NaN is outside.

    Raises:
        ValueError: naming the argument, the bound and the value.
    """
    for bound, kept, words in (
        (least, least is None or value >= least, "at least"),
        (above, above is None or value > above, "above"),
        (most, most is None or value <= most, "at most"),
    ):
        if not kept:
            told = bound if isinstance(bound, int) else f"{bound:g}"
            raise ValueError(f"{name} must be {words} {told}, got {shown(value)}")


AUTO = "auto"
"""The device of a model where none is named."""


def check_device(device: str) -> None:
    """Refuse what is no name of a device.

    Raises:
        ValueError: naming what is allowed and the value.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>, got {shown(device)}")


def check_temperature(value: float) -> None:
    """Refuse a temperature that is neither 0 (greedy) nor a number that logits can be divided by.

    Raises:
        ValueError: as :func:`check_number`.
    """
    if value != 0:
        check_number("temperature", value, 0, MOST_REAL)
        check_number("temperature", value, LEAST_TEMPERATURE)
