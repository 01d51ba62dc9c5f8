"""iapo-mini: information-aware policy optimization (IAPO), from the prompt to the gradient.

GRPO gives every token of a completion the same advantage. IAPO measures what each token tells about
the final answer and gives token t of completion i

    A_{i,t} = norm(r_i) + alpha * norm(s_{i,t}) + beta * norm(c_{i,t}).

Read the method in this order (docs/reading.md leads through it): :mod:`tasks`, :mod:`policy`,
:mod:`rollouts`, :mod:`sampling`, :mod:`rewards`, :mod:`information` (with :mod:`early_exit` behind
it), :mod:`calibration`, :mod:`advantages`, :mod:`objective`, :mod:`config`, :mod:`trainer`,
:mod:`evaluation`. Beside it: ``problems`` (where problems come from), ``engines`` (vLLM, TRL),
``tools`` (memory planner, diagnosis, explorer), ``policies`` (the shipped weights) and ``lab``
(what made the committed results).
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

# bitsandbytes, where peft finds it, complains at import about an optional kernel nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Ten names, loaded when they are asked for: ``import iapo_mini`` alone costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'iapo_mini' has no attribute {name!r}")
    return getattr(importlib.import_module(f"iapo_mini.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
