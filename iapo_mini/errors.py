"""Checks of arguments, with errors of one sentence, and the limits of numbers.

The upper limits are far above anything that is needed. They turn a typing error into a clear
message instead of a process that crashes or never ends.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MOST_REAL = 1e9
"""Largest weight or rate; beyond it fp32, with its seven digits, would lose all other terms."""

LEAST_TEMPERATURE = 1e-6
"""Smallest temperature besides 0; below it logits overflow."""

MOST_SEED = 2**32 - 1
"""Largest seed, as in NumPy; a million times this is still a valid seed for torch."""

MOST_STEPS = 10**9
"""Largest number of steps."""

MOST_ROWS = 65_536
"""Largest number of problems or completions at a time."""

MOST_PROBLEMS = 10**6
"""Largest number of problems that are judged one after the other."""

MOST_TOKENS = 2**20
"""Largest number of tokens in a sequence, as in the models with the longest contexts."""

MOST_RANK = 16_384
"""Largest rank of an adapter and largest hidden size, as in the widest models."""

MOST_THREADS = 1024
"""Largest number of threads or processes; with far more, the process ends without a message."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, for use in our own message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":. ")


def shown(value: object) -> str:
    """A value as shown in messages: on one line, and shortened if it is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not write out a number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a value that is not one of the allowed words.

    Raises:
        ValueError: naming the argument, the allowed words, the value, and the most similar word.
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
    """Refuse NaN and numbers outside ``least`` to ``most`` or not above ``above``.

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
"""The default device: the first CUDA device, or the CPU if there is none."""


def check_device(device: str) -> None:
    """Refuse a value that is not the name of a device.

    Raises:
        ValueError: naming what is allowed and the value.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>, got {shown(device)}")


def check_temperature(value: float) -> None:
    """Refuse a temperature that is neither 0 (greedy) nor a number that logits can be divided by.

    Raises:
        ValueError: the same errors as :func:`check_number`.
    """
    if value != 0:
        check_number("temperature", value, 0, MOST_REAL)
        check_number("temperature", value, LEAST_TEMPERATURE)
