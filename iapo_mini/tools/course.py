"""Helpers of the notebooks: checks of exercises, wrapped printing, and committed results."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

from iapo_mini.files import read_json


def check(attempt: Callable, *cases: tuple[tuple, object], tolerance: float = 1e-5) -> None:
    """Print whether a reader's function solves an exercise. Never raises.

    Args:
        attempt: the function; while it raises ``NotImplementedError`` or returns None, the exercise
            counts as not yet done.
        cases: pairs ``(arguments, expected)``; expected is a number, a bool, a list of numbers or a
            tensor.
        tolerance: largest difference that counts as equal, absolute and relative.
    """
    name = attempt.__name__
    for arguments, expected in cases:
        try:
            found = attempt(*arguments)
        except NotImplementedError:
            found = None
        except Exception as error:
            print(f"{name}: not yet, it raised {type(error).__name__}: {error}")
            return
        if found is None:
            print(f"{name}: not yet, it is still to be written")
            return
        try:
            one, other = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
        except (TypeError, ValueError, RuntimeError):
            print(f"{name}: not yet, it returned {type(found).__name__} instead of numbers")
            return
        if one.shape != other.shape:
            print(f"{name}: not yet, shape {tuple(one.shape)} instead of {tuple(other.shape)}")
            return
        if not torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True):
            worst = float((one - other).abs().max())
            print(f"{name}: not yet, off by up to {worst:.3g}")
            return
    print(f"{name}: right")


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
