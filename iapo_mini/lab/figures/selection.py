"""Figures of the bias of a number when a checkpoint is chosen by it.

As in :mod:`iapo_mini.plots`, every function returns a figure and does not show or save it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iapo_mini.plots import COLORS

NAMES = {
    "test": "the reported stories", "tune": "as many tune stories",
    "tune_pool": "all tune stories", "last": "nothing: the last checkpoint",
}  # fmt: skip
"""The stories by which each rule chooses, as named in figures and tables."""
_LOOKS = {
    "test": (COLORS["iapo"], "o", "-"), "tune": (COLORS["grpo"], "s", "--"),
    "tune_pool": (COLORS["gfpo"], "^", "-."), "last": (COLORS["start"], "X", ":"),
}  # fmt: skip


def _points(ax: Axes, x: Sequence[float], rows: Sequence[Sequence[float]], **look: Any) -> None:
    """Draw intervals ``(mean, low, high)`` in percent over x."""
    mean, low, high = 100 * np.array(rows).T
    ends = np.nan_to_num([mean - low, high - mean]).clip(min=0)  # a single run has no interval
    ax.errorbar(x, mean, yerr=ends, capsize=2, **look)


def _lines(ax: Axes, rows: Mapping[str, Mapping]) -> None:
    """Draw a line for each rule over the numbers that are the keys of ``rows``."""
    for i, (rule, (color, marker, style)) in enumerate(_LOOKS.items()):
        x = [place + 0.06 * (i - 1.5) for place in range(len(rows))]
        own = [row[rule] for row in rows.values()]
        _points(ax, x, own, color=color, marker=marker, ls=style, label=NAMES[rule])
    ax.set_xticks(range(len(rows)), list(rows))


def selection(results: Mapping) -> Figure:
    """Plot the bias of Ratio@k by reported stories and by candidates, and the untuned ablation.

    Args:
        results: as written by ``selection.selection``.
    """
    fig = Figure(figsize=(13, 4.4), layout="constrained")
    by_problems, by_candidates, gains = fig.subplots(1, 3)
    k, first = list(results["rules"])[-1], next(iter(results["problems"]))
    _lines(by_problems, results["problems"])
    by_problems.set_xlabel("reported stories")
    by_problems.set_ylabel(f"bias of Ratio@{k} (% of its value)")
    _lines(by_candidates, results["candidates"])
    by_candidates.set_xlabel(f"checkpoints to choose from ({first} reported stories)")
    by_candidates.set_ylabel(f"bias of Ratio@{k} (% of its value)")
    for shift, part, face in ((-0.08, "apparent", None), (0.08, "true", "white")):
        for i, rule in enumerate(("test", "tune_pool")):
            color, marker, _ = _LOOKS[rule]
            x = [place + shift + 0.3 * (i - 0.5) for place in range(len(results["ablation"]))]
            rows = [row[rule][part] for row in results["ablation"].values()]
            told = "on reported stories" if part == "apparent" else "on held-out stories"
            _points(
                gains, x, rows, color=color, marker=marker, ls="none", mfc=face or color,
                label=f"chosen on {NAMES[rule]}, {told}",
            )  # fmt: skip
    gains.set_xticks(range(len(results["ablation"])), list(results["ablation"]))
    gains.set_xlabel("runs of which the best is taken")
    gains.set_ylabel(f"gain in Ratio@{k} over the same method (%)")
    for ax in (by_problems, by_candidates, gains):
        ax.axhline(0, color="black", lw=0.8)
        ax.grid(axis="y", alpha=0.3)
    by_problems.legend(frameon=False, fontsize=8, title="chosen on")
    gains.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return fig
