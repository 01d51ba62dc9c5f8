"""The recipe of each method: everything that defines it.

A method is more than its advantages: DAPO without its token mean and its clip range is not DAPO.
A field of :class:`iapo_mini.config.TrainConfig` that is left at None is taken from here. Nothing
heavy is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from iapo_mini.errors import first_line


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a method.

    Attributes:
        rule: function from rollouts to advantages: a key of ``advantages.ADVANTAGES``, or your own
            function ``(rollouts, alpha, beta) -> (B, L)``.
        information: the informativeness s that the rule uses: a key of
            ``information.INFORMATION``, your own function of the same form, or None. With None
            there is no estimate, and no time is spent on one.
        label: name in tables.
        what: the advantage of token t of completion i, in one line.
        source: the publication that the method comes from.
        alpha, beta: weights of its token terms; ``what`` says what they weigh.
        aggregation: mean of the loss, ``"sequence"`` or ``"token"``.
        epsilon, epsilon_high: clip range of the importance ratio below and above 1.
        kl_coef: weight of KL(pi || pi_ref).
        counted: the tokens that are in the loss: a key of ``advantages.COUNTED``, your own function
            ``(rollouts, alpha) -> (B, L) bool``, or None for all tokens.
        sampling_rounds: largest number of batches to sample until ``prompts_per_step`` groups hold
            both right and wrong completions (dynamic sampling); 1 takes every group.
        absent: what the method's source does and this library does not.
    """

    rule: str | Callable
    information: str | Callable | None = None
    label: str = ""
    what: str = ""
    source: str = ""
    alpha: float = 0.2
    beta: float = 0.05
    aggregation: str = "sequence"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    kl_coef: float = 0.001
    counted: str | Callable | None = None
    sampling_rounds: int = 1
    absent: str = ""


FROM_RECIPE = ("alpha", "beta", "aggregation", "epsilon", "epsilon_high", "kl_coef")
"""Fields of ``TrainConfig`` that the method's recipe sets if they are not given."""

_IAPO = "IAPO, arXiv 2602.19049"
_RELEASED: dict[str, Any] = {"aggregation": "token", "epsilon_high": 0.28}
"""Loss and clip range of the released code for IAPO and its ablations (``main.py``). They differ
from the GRPO equation in the paper."""

RECIPES: dict[str, Recipe] = {
    "grpo": Recipe(
        "grpo", label="GRPO", what="A_i = norm(r_i) over the group",
        source="DeepSeekMath, arXiv 2402.03300", alpha=0.0, beta=0.0,
    ),
    "dapo": Recipe(
        "dapo", label="DAPO",
        what="A_i of the reward with a soft punishment of over-long completions; groups that are "
        "all right or all wrong are replaced by new ones, at most twice",
        source="DAPO, arXiv 2503.14476", alpha=0.0, beta=0.0,
        aggregation="token", epsilon_high=0.28, kl_coef=0.0, sampling_rounds=3,
    ),
    "gfpo": Recipe(
        "gfpo", label="GFPO",
        what="A_i among the shortest of each group, without the others; alpha is the share kept",
        source="GFPO, arXiv 2508.09726", alpha=0.75, beta=0.0, aggregation="token", counted="gfpo",
    ),
    "gtpo": Recipe(
        "gtpo", label="GTPO",
        what="the reward shaped by alpha times the share of entropy at t (of inverse entropy if "
        "wrong); tokens of right and wrong completions are normalised separately",
        source="GTPO, arXiv 2508.04349", alpha=0.1, beta=0.0, aggregation="token",
        epsilon_high=0.28, kl_coef=0.0,
    ),
    "gtpo_iapo": Recipe(
        "gtpo_iapo", label="GTPO (IAPO's)",
        what="A_i, plus alpha times the share of entropy at t if right, minus alpha times the "
        "share of inverse entropy if wrong",
        source=f"baseline of {_IAPO}", alpha=0.1, beta=0.0, aggregation="token",
    ),
    "sgrpo": Recipe(
        "sgrpo", label="S-GRPO",
        what="A_i at the first 150 tokens, and at a random half of the next ones up to 341 if the "
        "completion is shorter than that; alpha scales both thresholds",
        source="S-GRPO of Lee and Tong, arXiv 2504.20834", alpha=1.0, beta=0.0, counted="sgrpo",
    ),
    "iapo": Recipe(
        "iapo", "answer_entropy", label="IAPO",
        what="A_i + alpha norm(s_it) + beta norm(c_it), where s is the drop of the answer entropy",
        source=_IAPO, **_RELEASED,
    ),
    "iapo_ni": Recipe(
        "iapo_ni", label="IAPO-NI", what="IAPO without s", source=f"{_IAPO}, Fig. 5", alpha=0.0,
        **_RELEASED,
    ),
    "iapo_ne": Recipe(
        "iapo", "next_token_entropy", label="IAPO-NE",
        what="IAPO, where s is the drop of the next-token entropy", source=f"{_IAPO}, Fig. 5",
        **_RELEASED,
    ),
    "iapo_pmi": Recipe(
        "iapo", "answer_surprisal", label="IAPO-PMI",
        what="IAPO, where s is the pointwise information on the completion's own answer",
        source="a variant of this library", **_RELEASED,
    ),
    "grpo_kimi": Recipe(
        "grpo_kimi", label="GRPO + length (Kimi)",
        what="A_i of the reward plus alpha times a term from 0.5 for the shortest of the group to "
        "-0.5 for the longest, at most 0 if wrong",
        source="length reward of Kimi k1.5, arXiv 2501.12599", alpha=0.5, beta=0.0,
    ),
    "grpo_efficient": Recipe(
        "grpo_efficient", label="GRPO + length (A&Z)",
        what="A_i of the reward minus alpha times the sigmoid of the normalised length if right",
        source="Arora and Zanette, arXiv 2502.04463", alpha=0.4, beta=0.0,
    ),
}  # fmt: skip
"""Method -> recipe. :func:`use_methods` adds the methods of your own module."""


LENGTH_PENALTIES = {
    name.removeprefix("grpo_"): RECIPES[name].alpha for name in ("grpo_kimi", "grpo_efficient")
}
"""Forms of the length penalty (:data:`iapo_mini.advantages.LENGTH_PENALTIES`) -> default weight."""

NO_LENGTH_PENALTY = {
    "gtpo": "does not use the rewards but only which completions are right",
    "grpo_kimi": "has a length penalty already, whose weight is alpha",
    "grpo_efficient": "has a length penalty already, whose weight is alpha",
}
"""Rules that can't have a length penalty -> the reason."""


def use_methods(module: str) -> None:
    """Add the methods of your own module to those of the library.

    Args:
        module: name of an importable module with a dictionary ``RECIPES`` (docs/methods.md shows
            an example).

    Raises:
        ValueError: when there is no such module, it has no ``RECIPES``, or a name is taken.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            "methods must be the name of a Python module in this folder or on the Python path, got "
            f"'{module}', which can't be imported ({first_line(error)})"
        ) from error
    theirs = getattr(found, "RECIPES", None)
    if not isinstance(theirs, dict) or not all(isinstance(x, Recipe) for x in theirs.values()):
        raise ValueError(
            f"methods is '{module}', which has no dictionary RECIPES with values of recipes.Recipe."
        )
    for name, recipe in theirs.items():
        if RECIPES.setdefault(name, recipe) is not recipe:
            raise ValueError(f"methods is '{module}', whose method '{name}' exists already.")
