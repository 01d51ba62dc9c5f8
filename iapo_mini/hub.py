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

from iapo_mini.policies import EMBEDDED, looks_local

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


def check_in_reach(model: str | None) -> None:
    """Ask for a model before anything heavy is imported, which alone takes seconds.

    Args:
        model: as for ``load_policy``; None and whatever is no hub id pass.

    Raises:
        ValueError: for a hub id of which the cache holds nothing, while the hub does not answer.
    """
    if model is None or looks_local(model):
        return
    kept = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    with reaching(model) as unreached:
        if unreached and not kept.is_dir():
            raise not_loaded(model, unreached)


def not_loaded(model: str, reason: str, within: str = "") -> ValueError:
    """What is said of a model, whatever a library says; ``within``: which one of a repository."""
    return ValueError(
        f"model must be '{EMBEDDED}', a folder written by save_pretrained, or a hub id that this "
        f"machine can reach, got '{model}'{within}, which can't be loaded ({reason})"
    )
