"""The hub of models and data: asked where it answers, else what is in its cache is taken.

The hub's libraries try again and again, one file after the other, for minutes. Whether there is
anybody to talk to is therefore found out first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

PATIENCE = 4.0
"""Seconds in which the hub must answer."""


def answers() -> bool:
    """Whether the hub (``HF_ENDPOINT``) answers within ``PATIENCE`` seconds; not if in trouble."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever the client may raise: there is no answer
            answer = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PATIENCE)
            if answer.status_code < 500:
                answered.set()

    # In a thread, since looking up a name knows no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return answered.is_set()


@contextlib.contextmanager
def reaching(source: str) -> Iterator[str]:
    """Where the hub does not answer, its libraries look into their cache alone, within.

    Args:
        source: what is to be loaded, a folder or a hub id. For a folder nobody is asked.

    Gives the reason why a hub id that is not whole in the cache can't be loaded; empty where the
    hub was there to ask, or was not to be asked (``HF_HUB_OFFLINE``).
    """
    if Path(source).is_dir() or constants.HF_HUB_OFFLINE or answers():
        yield ""
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield f"{constants.ENDPOINT} does not answer, and the cache does not hold it"
    finally:
        constants.HF_HUB_OFFLINE = False
