"""Observers of a run, which are called at three kinds of moments with the run's numbers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from iapo_mini.errors import first_line


class Watcher(Protocol):
    """The methods that :func:`iapo_mini.trainer.train` calls on any observer."""

    def on_step(self, metrics: dict[str, Any]) -> object:
        """Called after every step with its line of ``metrics.jsonl``."""

    def on_evaluate(self, found: dict[str, Any]) -> object:
        """Called after every evaluation during training with its line of ``evaluations.jsonl``."""

    def on_end(self) -> object:
        """Called once, when the run ends: finished, interrupted or failed."""


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Callback:
    """A :class:`Watcher` made of functions; functions that are not given do nothing.

    Attributes:
        on_step, on_evaluate, on_end: as in :class:`Watcher`.
    """

    on_step: Callable[[dict[str, Any]], object] = _nothing
    on_evaluate: Callable[[dict[str, Any]], object] = _nothing
    on_end: Callable[[], object] = _nothing


def together(watchers: Sequence[Watcher]) -> Callback:
    """One callback that calls all of them, in order."""
    return Callback(
        lambda metrics: [watcher.on_step(metrics) for watcher in watchers],
        lambda found: [watcher.on_evaluate(found) for watcher in watchers],
        lambda: [watcher.on_end() for watcher in watchers],
    )


@contextlib.contextmanager
def ending(watchers: Sequence[Watcher]) -> Iterator[Callback]:
    """Join all watchers; their ``on_end`` is called when the context ends, in whatever way."""
    watcher = together(watchers)
    try:
        yield watcher
    finally:
        watcher.on_end()


def harmless(watcher: Watcher, name: str) -> Callback:
    """The same watcher, but after an error it is no longer called, and the run continues.

    Args:
        watcher: for example a reporter that needs a network.
        name: its name in the warning.
    """
    alive = [True]

    def guarded(call: Callable) -> Callable:
        def attempt(*told: Any) -> None:
            if not alive[0]:
                return
            try:
                call(*told)
            except Exception as error:  # no error of a library may end the training
                alive[0] = False
                warnings.warn(
                    f"{name} failed ({first_line(error)}) and gets no more metrics; training "
                    "continues, and metrics.jsonl has every step.",
                    stacklevel=2,
                )

        return attempt

    return Callback(guarded(watcher.on_step), guarded(watcher.on_evaluate), guarded(watcher.on_end))
