"""The values that an EarlyExit accepts, tested without a model."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
from helpers import PATIENCE

from iapo_mini.early_exit.question import EVERY_PREFIX, EarlyExit, check_stride
from iapo_mini.tasks import POSTFIX


def test_the_defaults_are_those_of_the_paper():
    assert EarlyExit() == EVERY_PREFIX
    assert (EVERY_PREFIX.postfix, EVERY_PREFIX.stride) == (POSTFIX, 1)


@pytest.mark.parametrize("stride", [1, 2, 400, "sentence"])
def test_strides_that_are_accepted(stride):
    assert EarlyExit(stride=stride).stride == stride


@pytest.mark.parametrize("stride", [0, -1, 2.5, True, "word", None])
def test_bad_strides_are_refused(stride):
    message = f"stride must be 1 to 1048576 or 'sentence', got {stride!r}"
    with pytest.raises(ValueError, match=message):
        EarlyExit(stride=stride)
    with pytest.raises(ValueError, match=f"my_{message}"):
        check_stride(stride, "my_stride")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("way", "exact", "one of packed, cached, naive"),
        ("way", "strided", "one of packed, cached, naive"),
        ("memory_mb", 0, "above 0"),
        ("memory_mb", -1.0, "above 0"),
        ("memory_mb", float("nan"), "above 0"),
        ("memory_mb", float("inf"), r"at most 1e\+09"),
        ("chunk_size", 0, "at least 1"),
        ("chunk_size", -3, "at least 1"),
    ],
)
def test_bad_values_are_refused(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} must be {allowed}, got {value!r}"):
        EarlyExit(**{field: value})
    with pytest.raises(ValueError, match=f"{field} must be {allowed}"):
        replace(EVERY_PREFIX, **{field: value})


def test_it_is_immutable():
    with pytest.raises(FrozenInstanceError):
        EVERY_PREFIX.stride = 4


def test_it_is_checked_without_torch():
    program = "import sys, iapo_mini.early_exit.question; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
