"""Helpers of the notebooks: checks of exercises, wrapped printing, and committed results."""

from __future__ import annotations

import copy
import inspect
import linecache
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from iapo_mini.errors import first_line
from iapo_mini.files import read_json
from iapo_mini.rollouts import Rollouts

Case = tuple[tuple, object]
"""Arguments of a reader's function and what it must return for them."""


def check(attempt: Callable, *cases: Case, tolerance: float = 1e-5) -> None:
    """Print whether a reader's function solves an exercise, or which case fails and how.

    Never raises. Every case gets copies of its arguments, which the function must not change.

    Args:
        attempt: the function; while it raises ``NotImplementedError`` without a message, the
            exercise counts as still to be written.
        cases: pairs ``(arguments, expected)``; expected is a number, a bool, a list of numbers or a
            tensor. Where it is whole or bool, the function must return whole numbers or bools.
        tolerance: largest difference that counts as equal, absolute and relative.
    """
    fault = _first_fault(attempt, cases, tolerance)
    name = getattr(attempt, "__name__", "check")
    say(f"{name}: not yet, {fault}" if fault else f"{name}: right")


def passes(attempt: Callable, *cases: Case, tolerance: float = 1e-5) -> bool:
    """Whether :func:`check` would print *right*; prints nothing itself.

    A cell that trains or measures with the reader's function waits for it with this.
    """
    return not _first_fault(attempt, cases, tolerance)


def _first_fault(attempt: Callable, cases: Sequence[Case], tolerance: float) -> str:
    if not callable(attempt):
        return f"its first argument must be a function, got {_shown(attempt)}"
    if not cases:
        return "there is no case to try it on"
    for number, (arguments, expected) in enumerate(cases, 1):
        fault = _fault(attempt, arguments, expected, tolerance)
        if fault and fault != _UNWRITTEN:
            given = ", ".join(map(_shown, arguments))
            name = getattr(attempt, "__name__", "it")
            return f"case {number} of {len(cases)}: {name}({given}) {fault}"
        if fault:
            return fault
    return ""


_UNWRITTEN = "it is still to be written"


def _fault(attempt: Callable, arguments: tuple, expected: object, tolerance: float) -> str:
    """What is wrong with the function in one case, or nothing."""
    given = tuple(map(_copied, arguments))
    try:
        found = attempt(*given)
    except (Exception, SystemExit) as error:
        # PyTorch raises the same kind, with a message, for an operation that it does not have.
        if isinstance(error, NotImplementedError) and not str(error):
            return _UNWRITTEN
        return f"raised {type(error).__name__}: {first_line(error)}{_place(attempt, error)}"
    for new, old in zip(given, arguments):
        if not _same(new, old):
            return f"changed its argument {_shown(old)}; return a new value instead"
    if found is None:
        return "gave None; is a return missing?"
    wanted = _numbers(expected)
    try:
        got = _numbers(found)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return f"gave {_shown(found)}, wanted {_kind(wanted)}"
    if got.shape != wanted.shape:
        return f"gave {_form(got)}, wanted {_form(wanted)}"
    if not _fits(got, wanted):
        given_kind = f"{got.dtype} values" if got.ndim else _shown(got)
        return f"gave {given_kind}, wanted {_kind(wanted)}"
    one, other = got.double(), wanted.double()
    apart = ~torch.isclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not apart.any():
        return ""
    # The place of the first number that is wrong.
    place = [int(i) for i in apart.nonzero()[0]]
    where = f" at place {place[0] if len(place) == 1 else tuple(place)}" if place else ""
    more = f" ({int(apart.sum())} of {apart.numel()} are wrong)" if place else ""
    return f"gave {_pair(got[tuple(place)], wanted[tuple(place)])}{where}{more}"


def _copied(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, Rollouts):
        tensors: dict[str, Any] = {name: t.clone() for name, t in value.tensors().items()}
        known = {name: tensors.pop(name) for name in value.known}
        return replace(value, known=known, **tensors)
    # Models are large, and reading them does not change them.
    return copy.deepcopy(value) if type(value).__module__ in ("builtins", "numpy") else value


def _same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, Rollouts):
        return all(_same(one.tensors()[name], t) for name, t in other.tensors().items())
    if type(one).__module__ == "numpy":
        return _same(torch.as_tensor(one), torch.as_tensor(other))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or type(one).__module__ != "builtins" or bool(one == other)


def _numbers(value: Any) -> torch.Tensor:
    """A tensor of the value; Python's numbers keep their digits."""
    plain = _plain(value)
    found = torch.as_tensor(plain)
    if found.is_floating_point() and not torch.is_tensor(plain):
        return torch.as_tensor(plain, dtype=torch.float64)
    return found


def _plain(value: Any) -> Any:
    """A tensor without gradient and place, lists of tensors as lists of numbers."""
    if torch.is_tensor(value):
        return value.detach().cpu().to_dense()
    if isinstance(value, (list, tuple)):
        return [_plain(x).tolist() if torch.is_tensor(x) else _plain(x) for x in value]
    return value


def _fits(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether numbers are of the wanted kind; a whole number may stand for a real one."""
    if not got.numel():
        return True
    if wanted.dtype == torch.bool or got.dtype == torch.bool:
        return got.dtype == wanted.dtype
    if not wanted.is_floating_point():
        return not got.is_floating_point() and not got.is_complex()
    return not got.is_complex()


def _kind(values: torch.Tensor) -> str:
    """The wanted kind of numbers in words."""
    one = values.ndim == 0
    if values.dtype == torch.bool:
        return "True or False" if one else "a bool for each entry"
    if values.is_floating_point():
        return "a number" if one else "numbers"
    return "a whole number (int)" if one else "whole numbers (an integer dtype)"


def _form(values: torch.Tensor) -> str:
    return f"shape {tuple(values.shape)}" if values.ndim else "a single number"


def _pair(got: torch.Tensor, wanted: torch.Tensor) -> str:
    """Both numbers, with as many digits as tell them apart."""
    for digits in (4, 8, 16):
        texts = [
            str(x.item()) if not x.is_floating_point() else f"{x.item():.{digits}g}"
            for x in (got, wanted)
        ]
        if texts[0] != texts[1]:
            break
    return f"{texts[0]}, wanted {texts[1]}"


def _shown(value: Any) -> str:
    """A value in a few words."""
    if torch.is_tensor(value) or type(value).__module__ == "numpy":
        listed = value.tolist()
        if isinstance(listed, list) and len(str(listed)) > 60:
            return f"{type(value).__name__} of shape {tuple(value.shape)}"
        return _shown(listed)
    if isinstance(value, float):
        return repr(float(f"{value:.6g}"))
    if isinstance(value, (list, tuple)) and all(isinstance(x, float) for x in value) and value:
        value = [float(f"{x:.4g}") for x in value]
    text = repr(value)
    if isinstance(value, (bool, int, str, list, tuple, dict, set)) and len(text) <= 90:
        return text
    size = f" of {len(value)}" if isinstance(value, (str, list, tuple, dict, set)) else ""
    return f"{type(value).__name__}{size}"


def _place(attempt: Callable, error: BaseException) -> str:
    """The line of the reader's own function in which an error arose."""
    code = getattr(inspect.unwrap(attempt), "__code__", None)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if code is not None and frame.filename == code.co_filename:
            line = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f", in the line: {line}" if line else ""
    return ""


def say(text: str) -> None:
    """Print a text with long lines broken between words, because notebooks break them anywhere."""
    print("\n".join(textwrap.fill(line, 100) for line in text.split("\n")))


def committed_result(name: str) -> dict:
    """Read a file of ``figures/results``, which an installed package has as ``iapo_mini/results``.

    Args:
        name: file name, such as ``"estimator.json"``.

    Raises:
        ValueError: when there is no such file.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "results", package.parent / "figures" / "results"):
        if (folder / name).is_file():
            return read_json(folder / name)
    raise ValueError(f"name must be a file of figures/results, got '{name}'")
