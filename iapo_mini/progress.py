"""Progress within a batch, shown behind a progress bar, since a batch may take half an hour."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

EVERY = 1.0
"""Seconds between two updates of the bar."""


@contextlib.contextmanager
def tokens_shown(bar: Any) -> Iterator[Callable[[int, int], None]]:
    """Show the number of tokens behind a tqdm bar while a batch is sampled, then restore the bar.

    Yields a function that :func:`iapo_mini.sampling.sample` calls after every token.
    """
    before, last = getattr(bar, "postfix", None) or "", time.monotonic()

    def show(tokens: int, running: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            now = f"token {tokens} of {running} running completions"
            bar.set_postfix_str(f"{before}, {now}" if before else now)

    try:
        yield show
    finally:
        bar.set_postfix_str(before, refresh=False)
