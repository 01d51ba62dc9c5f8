"""Compare two answers: numbers exactly, LaTeX with math-verify in a second process.

The way the reference is written decides how the two are compared:

* A **number** (integer, decimal, fraction, mixed number or power of ten, without regard to units
  and currency): the answer must be a number in one of these forms and exactly equal. No arithmetic
  is done, so 2+3 is not 5, 50% is not 50, and "71 72" is not a number.
* A **word or a letter** (Evelyn, even, (C)): the texts must be the same. Capitals do not matter in
  words, and a choice may be given as its letter alone or with its text ("B. bank").
* **LaTeX** (roots, sets, intervals, matrices, expressions): math-verify compares the values.

math-verify hands LaTeX to sympy, which can run for minutes and hold the interpreter lock all that
time. Its own time limits work only on the main thread of a POSIX process. So it runs in a second
process, which starts when first needed, and a comparison that exceeds ``TIME_LIMIT`` is ended. This
file is also the program of that process, so it imports nothing from the package.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from typing import IO, Any

MAX_LENGTH = 400
"""Characters. A longer answer counts as wrong; the longest reference of MATH-500 has 53."""

TIME_LIMIT = 0.9
"""Seconds of processor time that math-verify may take for one comparison. After that the answer
counts as wrong. It is not wall-clock time, because a busy machine must not change a reward. An
ordinary comparison takes milliseconds, the first of its kind up to 0.4 seconds."""

WALL_LIMIT = 60.0
"""Seconds of wall-clock time after which every comparison is ended."""

_WRAPPED = (
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}"),
    ("**", "**"), ("__", "__"), ("`", "`"),
)  # fmt: skip
_SPACING = re.compile(r"(?<=,)\\!\s*|\\[!,;:]|\\left(?![a-z])|\\right(?![a-z])|~")
_INTEGER = r"[0-9]+"
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_LATEX_FRACTION = (
    rf"\\[dt]?frac\s*(?:\{{\s*(-?{_INTEGER})\s*\}}|([0-9]))\s*(?:\{{\s*({_INTEGER})\s*\}}|([0-9]))"
)
_TEN = r"(?:[eE]|\s*(?:\\times|\\cdot|\*|x|\u00d7)\s*10\s*\^)\s*(?:\{\s*)?([-+]?[0-9]{1,3})\s*\}?"
_NUMBER = re.compile(
    rf"([-+]?)\s*(?:({_DECIMAL})(?:{_TEN})?|(?:({_INTEGER})\s+)?({_INTEGER})\s*/\s*({_INTEGER})"
    rf"|({_INTEGER})?\s*{_LATEX_FRACTION})"
)
# A word or two after a number, unless they join, doubt or scale it: "5 or 6", "3 million".
_NO_UNIT = (
    r"(?i:(?!(?:[^{}]*[^A-Za-z])?(?:or|and|but|nor|not|n?either|if|unless|except|(?:or)?else|than|"
    r"otherwise|to|by|at|is|was|are|i|we|any|less|more|fewer|maybe|perhaps|possibly|probably|about|"
    r"around|roughly|approximately|nearly|almost|vs|versus|plus|minus|negative|over|squared|cubed|"
    r"root|factorial|mod|modulo|base|per\s*cent|percentage|hundreds?|thousands?|[a-z]*illions?|half|"
    r"halves|thirds|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths|dozens?|tens|score|"
    r"gross|times)(?:[^A-Za-z]|$|\})))"
)
_SI = (
    r"(?:[kcmu]?m|[mk]?g|[kM]?W|k?J|[mkM]?Hz|k?N|[cm]?L|min|s|h|ft|in|yd|mi|lb|oz|cal|mph|km/h|m/s)"
)
_UNIT = re.compile(
    r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degrees?|°|"
    rf"\\(?:text|mbox)\{{{_NO_UNIT}\s*[A-Za-z.°/]+(?:\s[A-Za-z./]+){{0,2}}\s*\}}"
    rf"(?:\^\{{?[23]\}}?)?|"
    rf"\\mathrm\{{\s*{_SI}\s*\}}(?:\^\{{?[23]\}}?)?)$"
)
_CURRENCY = r"(?:\\?\$|€|£|¥)"
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\{([^{}]*)\}")
# Two letters are a product (ab = ba), unless they are one of these words.
_SHORT = "on|no|of|in|is|it|or|up|at|to|by|he|we|us|an|as|if|my|me|so|go|do|be|am|ok"
_WORDS = re.compile(rf"[A-Z]|(?:{_SHORT})|[a-z]{{3,}}(?:[ '-][a-z]+)*", re.IGNORECASE)
_CHOICE = re.compile(r"\(?([A-Z])(?:\)|[.:])\s+\S.*", re.DOTALL)
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)\b")
_DEGREES = re.compile(r"([0-9.]+)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)")
_BASE = re.compile(r"[0-9]_\{?([0-9]+)\}?")
# A power of a power of a number, or an exponent of five digits, which sympy would write out.
_TOWER = re.compile(r"\^[\s({]*-?[0-9.]+[\s)}]*\^|\^[\s({]*-?[0-9]{5}")


def equal_answers(given: str, reference: str) -> bool:
    """Whether an answer equals the reference answer, by the rules at the head of this module.

    Args:
        given: the text between the answer tags; any text.
        reference: the right answer: a number, words or LaTeX; ``$`` and ``\\boxed`` are allowed.

    Returns:
        Also False when the answer is empty, longer than ``MAX_LENGTH`` characters, a tower of
        powers, or when the comparison exceeds ``TIME_LIMIT`` or ``WALL_LIMIT``.

    Raises:
        RuntimeError: when LaTeX must be compared and math-verify can't be started.
    """
    if given.strip() == reference.strip() != "":
        return True  # for texts of every kind and length
    if len(given.strip()) > MAX_LENGTH:
        return False
    given, reference = _tidy(given), _tidy(reference)
    if not given or not reference:
        return False
    if given == reference:
        return True
    wanted = as_number(reference)
    if wanted is not None:
        return as_number(given) == wanted
    words = _as_words(reference)
    if words is not None:
        return _as_words(given) == words
    if len(given) == 1 or len(reference) == 1:
        return False  # a variable equals only its own letter; math-verify takes c for C
    if _told(given) != _told(reference):
        return False
    # math-verify takes 50% for 50 and ignores the base of a numeral: it takes 52_8 for 52_9.
    if ("%" in given) != ("%" in reference) or _BASE.findall(given) != _BASE.findall(reference):
        return False
    return not _TOWER.search(given) and _ask(_plain_latex(given), _plain_latex(reference))


def as_number(text: str) -> Fraction | None:
    """Exact value of a number in any of the usual notations.

    Examples: 1,234, 1{,}234, -3/4, 1 1/2, 1\\frac{4}{5}, \\$18.90, €5, 30^\\circ, 1.5e3,
    3\\times10^{-19}, (5).
    None for every other text: sums, products, powers, percentages, several numbers, words.
    """
    if len(text) > MAX_LENGTH:
        return None
    text = re.sub(r"^[A-Za-z]\s*=\s*", "", _tidy(text))
    text = _UNIT.sub("", text)
    text = re.sub(rf"^([-+]?)\s*{_CURRENCY}\s*", r"\1", text)
    text = re.sub(rf"\s*{_CURRENCY}$", "", text) if text[-1:] in "€£¥" else text
    text = _bare(text)
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, decimal, ten, whole, over, under, mixed, *latex = match.groups()
    if decimal is not None:
        value = Fraction(decimal.replace(",", "")) * Fraction(10) ** int(ten or 0)
    else:
        if over is None:
            whole, over, under = mixed, latex[0] or latex[1], latex[2] or latex[3]
        if int(under) == 0:
            return None
        value = int(whole or 0) + Fraction(int(over), int(under))
    return -value if sign == "-" else value


def _bare(text: str) -> str:
    """A number without brackets or a text command around it, as in (5) or \\text{13}."""
    for start, end in (("(", ")"), (r"\text{", "}"), (r"\mathrm{", "}"), (r"\mathbf{", "}")):
        if text.startswith(start) and text.endswith(end):
            inner = text[len(start) : -len(end)].strip()
            if re.fullmatch(rf"[-+]?\s*(?:{_DECIMAL})", inner):
                return inner
    return text


def _tidy(text: str) -> str:
    """The text without marks that have no meaning: delimiters, spacing commands, a full stop."""
    text = text.strip()
    for start, end in _WRAPPED[5:]:  # first, because ** is replaced as a power below
        inner = text[len(start) : -len(end)]
        if len(text) > len(start + end) and text == start + inner + end and start not in inner:
            return _tidy(inner)
    text = _SPACING.sub("", text.replace("\N{MINUS SIGN}", "-").replace("**", "^"))
    text = text.replace("{,}", ",").replace(r"\%", "%").strip().removesuffix(".").strip()
    for start, end in _WRAPPED[:5]:
        inner = text[len(start) : -len(end)]
        if text == start + inner + end and start not in inner.replace(r"\$", ""):
            return _tidy(inner)
    return text


def _as_words(text: str) -> str | None:
    """The text without LaTeX and brackets if it is words or a single letter, else None.

    Words are returned in lower case. A single letter stays as it is, since it may be a variable.
    """
    text = _TEXT.sub(r"\1", text).strip().removesuffix(".")
    choice = _CHOICE.fullmatch(text)
    if choice:
        return choice[1]
    if len(text) <= 3:
        text = text.strip("() ")
    if len(text) == 1 and not text.isupper():
        return None
    return (text if len(text) == 1 else text.lower()) if _WORDS.fullmatch(text) else None


def _told(text: str) -> list[str]:
    """The words inside \\text{...}, which math-verify ignores although 3 million is not 3."""
    found = " ".join(_TEXT.findall(text)).lower()
    return re.findall(r"[a-z]{2,}", found)


def _plain_latex(text: str) -> str:
    """LaTeX that math-verify reads rightly: \\pi for pi, and radians for degrees in functions."""
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    if _FUNCTION.search(text):
        text = _DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    return text


_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None


def _ask(given: str, reference: str) -> bool:
    """Whether math-verify finds two answers equal. Threads wait for each other."""
    with _lock:
        questions, answers = _pipes(_started())
        try:
            questions.write(json.dumps([given, reference]) + "\n")
            questions.flush()
            line = answers.readline()
        except OSError:  # the process ended before it had read the question
            line = ""
        except BaseException:  # after an interrupt the next call must not read this answer
            _stop()
            raise
        if not line:
            _stop()
        return line.strip() == "true"


def _started() -> subprocess.Popen[str]:
    """The process that compares, started if it is not running."""
    global _process
    if _process is None or _process.poll() is not None:
        # Without -P the folder of this file would join the path, and our modules would hide others.
        _process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # else Ctrl-C in a terminal would reach it as well
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # so on Windows
        )
        _, answers = _pipes(_process)
        if answers.readline().strip() != "ready":
            _stop()
            raise RuntimeError(
                "math-verify can't be started; pip install 'math-verify>=0.9', or "
                f"run '{sys.executable} {__file__}' to see its error."
            )
    return _process


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    """The pipe that the process reads from, and the pipe that it writes to."""
    assert process.stdin is not None and process.stdout is not None  # Popen made both
    return process.stdin, process.stdout


@atexit.register
def _stop() -> None:
    global _process
    process, _process = _process, None
    if process is not None:
        process.kill()
        process.wait()
        for pipe in _pipes(process):
            with contextlib.suppress(OSError):
                pipe.close()


def _serve() -> None:
    """Run the second process: read lines ``[given, reference]``, write ``true`` or ``false``.

    The process forks for every comparison, and the system ends the fork at the limit. Nothing that
    sympy does can delay that, and the process itself stays ready for the next question.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list:
        how: Any = {"fallback_mode": "no_fallback", "parsing_timeout": None}
        return parse(f"${text}$", extraction_config=[LatexExtractionConfig()], **how)

    def equal(given: str, reference: str) -> bool:
        try:
            one, other = read(reference), read(given)
            # The order matters: math-verify takes a set for an inequality, but not the reverse.
            said = any(verify(a, b, timeout_seconds=None) for a, b in ((one, other), (other, one)))
            near = _same_size(one[0], other[0]) if one and other else None
            return bool(said and near is not False) or _equal_by_algebra(one, other)
        except Exception:  # sympy may raise anything on text that only looks like LaTeX
            return False

    def within_limits(given: str, reference: str) -> bool:
        if sys.platform == "win32":  # for mypy, which then knows that there is a fork below
            raise OSError("no fork here")
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
            signal.setitimer(signal.ITIMER_REAL, WALL_LIMIT)
            os._exit(not equal(given, reference))
        _, status, used = os.wait4(child, 0)
        # The first answer of a kind takes long, until caches are full. Repeating it here saves
        # later forks that time. It is safe: the fork ended within a quarter of the limit.
        if os.WIFEXITED(status) and _NEW < used.ru_utime < TIME_LIMIT / 4:
            equal(given, reference)
        return status == 0

    for kind in _KINDS:
        equal(kind, kind)
    judge = within_limits if hasattr(os, "fork") else _watched(equal)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(judge(*json.loads(line))), flush=True)


def _same_size(one: Any, other: Any) -> bool | None:
    """Whether two numbers agree to nine significant digits; None if one is not a number.

    math-verify rounds to a number of decimal places, so all tiny numbers are equal to it.
    """
    import sympy

    if one == other:
        return True
    if isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr):
        if one.free_symbols or other.free_symbols:
            return None
        a, b = (x.evalf(30) for x in (one, other))
        if not (a.is_number and b.is_number):
            return None
        return bool(abs(a - b) <= 1e-9 * max(abs(a), abs(b)))
    parts = [getattr(x, "args", ()) for x in (one, other)]
    if type(one) is type(other) and isinstance(one, sympy.Tuple | sympy.Interval):
        return all(_same_size(a, b) is not False for a, b in zip(*parts))
    return None


def _equal_by_algebra(one: list, other: list) -> bool:
    """Whether two expressions are equal after they are multiplied out."""
    import sympy

    if not (one and other and all(isinstance(x[0], sympy.Expr) for x in (one, other))):
        return False
    # The same letter may carry different assumptions in the two expressions.
    a, b = (
        x[0].xreplace({s: sympy.Symbol(s.name) for s in x[0].free_symbols}) for x in (one, other)
    )
    return bool(sympy.expand(a.doit() - b.doit()) == 0)


_NEW = 0.05  # seconds of processor time

_KINDS = (
    r"\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right)", r"\left( \frac{3}{2}, -13 \right)",
    r"3\sqrt{13} - x^5 + \frac{11+9a}{20}", r"y = -2x + 1", r"x \in [-2,7]", r"x < 2",
    r"\begin{pmatrix} 1/2 \\ -3 \end{pmatrix}", r"\{1, 2\} \cup (3, \infty)", r"\sin x + 2^{n}",
)  # fmt: skip
"""Common kinds of answers. Each is compared once at the start, to fill the caches of all forks."""


def _watched(equal: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    """Enforce the limits where a process can't fork (Windows) by ending the whole process.

    A thread watches the processor time. One huge multiplication can keep that thread from running,
    so the watchdog of faulthandler, which needs no interpreter lock, enforces the wall-clock limit.
    """
    began: float | None = None

    def watch() -> None:
        while True:
            time.sleep(0.05)
            start = began  # read once, since the main thread may set it to None in between
            if start is not None and time.process_time() - start > TIME_LIMIT:
                os._exit(1)

    def judge(given: str, reference: str) -> bool:
        nonlocal began
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            faulthandler.dump_traceback_later(WALL_LIMIT, exit=True, file=nowhere)
            began = time.process_time()
            found = equal(given, reference)
            began = None
            faulthandler.cancel_dump_traceback_later()
        return found

    threading.Thread(target=watch, daemon=True).start()
    return judge


if __name__ == "__main__":
    _serve()
