"""Access to the hub of models and data, or to its cache when the hub does not answer.

The hub's libraries retry for minutes, one file after the other. So this module first finds out
whether the hub can be reached.
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
"""Seconds within which the hub must answer."""


def answers() -> bool:
    """Whether the hub (``HF_ENDPOINT``) answers within ``PATIENCE`` seconds, without an error."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # the client may raise anything; it means no answer
            answer = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PATIENCE)
            if answer.status_code < 500:
                answered.set()

    # In a thread, because looking up a host name has no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return answered.is_set()


@contextlib.contextmanager
def reaching(source: str) -> Iterator[str]:
    """Make the hub's libraries use only their cache inside this context if the hub is silent.

    Args:
        source: the folder or hub id to load. For a folder the hub is not asked.

    Yields the reason why a hub id that is not complete in the cache can't be loaded. It is empty if
    the hub answers or must not be asked (``HF_HUB_OFFLINE``).
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
    """Check that a model can be reached, before imports that take seconds.

    Args:
        model: as for ``load_policy``; None and names that are not hub ids always pass.

    Raises:
        ValueError: for a hub id that is not in the cache, when the hub does not answer.
    """
    if model is None or looks_local(model):
        return
    kept = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    with reaching(model) as unreached:
        if unreached and not kept.is_dir():
            raise not_loaded(model, unreached)


def not_loaded(model: str, reason: str, within: str = "") -> ValueError:
    """The error for a model that can't be loaded; ``within`` names a subfolder or revision."""
    return ValueError(
        f"model must be '{EMBEDDED}', a folder written by save_pretrained, or a hub id that this "
        f"machine can reach, got '{model}'{within}, which can't be loaded ({reason})"
    )
