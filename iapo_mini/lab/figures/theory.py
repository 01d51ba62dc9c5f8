"""Figures of the theory: Theorem 4.1, Corollary 4.2, exploration.

As in :mod:`iapo_mini.plots`, every function returns a figure and does not show or save it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from iapo_mini.plots import COLORS, LABELS, band

WORLDS = {"random": "#7f7f7f", "filler": "#CC79A7", "clue": "#674CD5"}
"""Colours of the kinds of worlds. Colours of methods are those of :mod:`iapo_mini.plots`."""


def _curve(
    ax: Axes, x: ArrayLike, intervals: ArrayLike, label: str, color: str, style: str
) -> None:
    band(ax, x, intervals, style, color=color, label=label, ms=4, lw=1.5)


def _predicted_measured(ax: Axes, looks: Mapping[str, tuple], unit: str) -> None:
    """Plot measured against predicted change per unit of step, and the line where they are equal.

    Args:
        looks: label -> ``(points, eta, color, marker)``, points ``[predicted, measured]``.
    """
    for label, (points, eta, color, marker) in looks.items():
        x, y = np.array(points) / eta
        ax.scatter(x, y, s=12, color=color, marker=marker, alpha=0.6, lw=0.8, label=label)
    low, high = ax.get_xlim()
    ax.plot([low, high], [low, high], "k-", lw=0.8, zorder=0)
    ax.set_xlim(low, high)
    ax.locator_params(nbins=5)
    ax.set_xlabel(f"predicted change per unit step ({unit})")
    ax.set_ylabel(f"measured change per unit step ({unit})")
    ax.legend(frameon=False, fontsize=8)


def _error_by_step(ax: Axes, etas: Sequence[float], curves: Mapping[str, tuple]) -> None:
    """Plot the relative error of the prediction by step size.

    Args:
        curves: label -> ``(intervals, color, style)``.
    """
    for label, (intervals, color, style) in curves.items():
        _curve(ax, etas, np.maximum(intervals, 1e-9), label, color, style)
    first = min(intervals[0][0] for intervals, _, _ in curves.values())
    ax.plot(etas, 0.5 * first * np.array(etas) / etas[0], "k:", lw=1, label="proportional to step")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.2 * first)
    ax.set_xlabel("step size")
    ax.set_ylabel("|measured - predicted| / |predicted|")
    ax.legend(frameon=False, fontsize=8)


def theory_theorem(theorem: Mapping) -> Figure:
    """Plot Theorem 4.1: the change of expected length against the covariance.

    Args:
        theorem: section ``theorem`` of ``results/theory.json``.
    """
    fig = Figure(figsize=(10, 3.5), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    etas, points = theorem["etas"], theorem["informativeness"]["points"]
    _predicted_measured(
        left,
        {
            "step 10": (points["10.0"], 10, "#7f7f7f", "x"),
            "step 0.1": (points["0.1"], 0.1, "black", "o"),
        },
        "tokens",
    )
    left.set_title("each point a world; on the line: exact", fontsize=10)
    looks = {
        "informativeness": (COLORS["iapo"], "o-"), "random direction": ("#7f7f7f", "s--"),
    }  # fmt: skip
    sections = dict(zip(looks, (theorem["informativeness"], theorem["control"])))
    for label, (color, style) in looks.items():
        _curve(middle, etas, sections[label]["slope"], label, color, style)
    middle.axhline(1, color="black", lw=0.8)
    middle.set_xscale("log")
    middle.set_xlabel("step size")
    middle.set_ylabel("slope of measured on predicted")
    middle.set_title("slope: 1 for small steps", fontsize=10)
    middle.legend(frameon=False, fontsize=8)
    _error_by_step(right, etas, {k: (sections[k]["error"], *look) for k, look in looks.items()})
    right.set_title("the error shrinks with the step", fontsize=10)
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    return fig


def theory_corollary(corollary: Mapping) -> Figure:
    """Plot Corollary 4.2: informativeness per token by length, and the change of length.

    Args:
        corollary: section ``corollary`` of ``results/theory.json``.
    """
    fig = Figure(figsize=(10, 3.5), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    for world, line in (("filler", "-"), ("clue", "--")):
        by_length = corollary["tables"][world]["by_length"]
        x = [int(n) for n in by_length]
        _curve(left, x, list(by_length.values()), f"{world} worlds", WORLDS[world], f"o{line}")
        for method in ("grpo", "iapo"):
            path = corollary["paths"][world][method]
            label = f"{world}, {LABELS[method]}"
            _curve(middle, range(len(path)), path, label, COLORS[method], line)
    left.set_xlabel("completion length (tokens)")
    left.set_title("the premise holds (filler), fails (clue)", fontsize=10)
    middle.set_xlabel("updates")
    middle.set_ylabel("expected length (tokens)")
    middle.set_title("length follows", fontsize=10)
    by_length = corollary["stories"]["by_length"]
    relative = [float(r) for r in by_length]
    _curve(right, relative, list(by_length.values()), "sampled", "black", "D-")
    if "1" in by_length:
        mean = by_length["1"][0]
        even = mean / np.array(relative)
        right.plot(relative, even, "k:", lw=1, label="equal information in all")
    right.set_xlabel("length / mean length of the story")
    right.set_title("embedded policy on test stories", fontsize=10)
    left.axhline(0, color="black", lw=0.8)
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_ylabel("informativeness (nats per token)")
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
        loc = "lower right" if ax is left else "best"  # further up it would touch a curve
        ax.legend(frameon=False, fontsize=8, loc=loc)
    return fig


def theory_exploration(exploration: Mapping) -> Figure:
    """Plot the change of entropy by a step with A = +pi or A = -pi, and its sign.

    Args:
        exploration: section ``exploration`` of ``results/theory.json``.
    """
    fig = Figure(figsize=(10, 3.5), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    looks = {
        "plus": ("A = +pi (correct)", "#0072B2", "o"),
        "minus": ("A = -pi (incorrect)", "#D55E00", "s"),
    }
    _predicted_measured(
        left,
        {
            label: (exploration[name]["points"]["0.1"], 0.1, color, marker)
            for name, (label, color, marker) in looks.items()
        },
        "nats",
    )
    left.set_title("entropy, step 0.1; each point a policy", fontsize=10)
    _error_by_step(
        middle,
        exploration["etas"],
        {
            label: (exploration[name]["error"], color, marker + ("-" if name == "plus" else "--"))
            for name, (label, color, marker) in looks.items()
        },
    )
    middle.set_title("the error shrinks with the step", fontsize=10)
    for side, (name, (label, color, _)) in zip((-0.2, 0.2), looks.items()):
        shares = [
            exploration[name]["right_sign"],
            exploration[name]["right_sign_plain"],
            exploration["strings"][name],
        ]
        mean, low, high = np.array(shares).T
        x = np.arange(len(mean)) + side
        right.bar(x, mean, 0.38, color=color, alpha=0.75, hatch="" if name == "plus" else "//",
                  edgecolor="white", label=label)  # fmt: skip
        right.errorbar(x, mean, [mean - low, high - mean], fmt="none", color="black", capsize=3)
    right.set_xticks(range(3), ["natural\ngradient", "plain\ngradient", "completions,\nnormalised"])
    right.set_ylabel("share with the paper's sign")
    right.set_title("+pi lowers, -pi raises entropy?", fontsize=10)
    right.set_ylim(0, 1.05)
    right.set_axisbelow(True)
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    return fig
