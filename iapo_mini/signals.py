"""Signals that ask a run to end: Ctrl-C, a cluster's time limit, a closed terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

_ASKING = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


@contextlib.contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """An event that the first such signal sets; a second one ends the process at once.

    A signal that other code handles, or that is ignored (as in a background job), is left alone.
    In threads other than the main one, all signals are left alone.
    """
    asked = threading.Event()
    defaults = {
        number: signal.getsignal(number)
        for number in map(signal.Signals.__getitem__, _ASKING)
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    }
    if threading.current_thread() is not threading.main_thread():
        defaults = {}

    def restore() -> None:
        for number, handler in defaults.items():
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        asked.set()
        restore()
        with contextlib.suppress(RuntimeError, OSError):  # during another write; no terminal
            print("\nThis step will be finished and saved; a second signal ends the run at once.",
                  file=sys.stderr, flush=True)  # fmt: skip

    for number in defaults:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()
