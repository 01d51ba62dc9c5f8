"""iapo-mini: information-aware policy optimization (IAPO), from the prompt to the gradient.

GRPO gives every token of a completion the same advantage. IAPO measures how much each token says
about the final answer, and gives token t of completion i the advantage

    A_{i,t} = norm(r_i) + alpha * norm(s_{i,t}) + beta * norm(c_{i,t}).

Read the method in this order (docs/reading.md is a guide): :mod:`tasks`, :mod:`policy`,
:mod:`rollouts`, :mod:`sampling`, :mod:`rewards`, :mod:`information` (which uses
:mod:`early_exit`), :mod:`calibration`, :mod:`advantages`, :mod:`objective`, :mod:`config`,
:mod:`trainer`, :mod:`evaluation`. The other packages are ``problems`` (stories and data sets),
``engines`` (vLLM, TRL), ``tools`` (memory planner, diagnosis, explorer), ``policies`` (the shipped
weights) and ``lab`` (the code behind the committed results).
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iapo_mini.advantages import iapo
    from iapo_mini.calibration import calibrate
    from iapo_mini.config import TrainConfig
    from iapo_mini.evaluation import evaluate
    from iapo_mini.information import answer_entropies, informativeness
    from iapo_mini.policy import load_policy
    from iapo_mini.problems.stories import stories
    from iapo_mini.sampling import sample
    from iapo_mini.trainer import train

__version__ = "0.1.0"

__all__ = [
    "TrainConfig",
    "answer_entropies",
    "calibrate",
    "evaluate",
    "iapo",
    "informativeness",
    "load_policy",
    "sample",
    "stories",
    "train",
]

_HOME = {
    "TrainConfig": "config",
    "answer_entropies": "information",
    "calibrate": "calibration",
    "evaluate": "evaluation",
    "iapo": "advantages",
    "informativeness": "information",
    "load_policy": "policy",
    "sample": "sampling",
    "stories": "problems.stories",
    "train": "trainer",
}

# When peft imports bitsandbytes, it logs a complaint about an optional kernel that is not needed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Load the public names when they are first used, so ``import iapo_mini`` takes no time."""
    if name not in _HOME:
        raise AttributeError(f"module 'iapo_mini' has no attribute {name!r}")
    return getattr(importlib.import_module(f"iapo_mini.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
