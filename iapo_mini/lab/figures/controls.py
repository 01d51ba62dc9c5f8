"""Figures of the controls. Every seed is a dot, since seeds form two groups in many rows.

As in :mod:`iapo_mini.plots`, every function returns a figure and does not show or save it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iapo_mini.intervals import mean_interval
from iapo_mini.plots import COLORS, LABELS

NAMES = {
    "constant": "a constant on every token", "shuffled": "IAPO, s shuffled",
    "random": "IAPO, s random", "numeric": "IAPO, s on numbers", "roles": "IAPO, s from roles",
    "reference": "IAPO, s of the reference", "grpo": "no token term",
    "token": "estimate, at its token", "spread": "estimate, spread over its sentence",
    "first": "estimate, at the sentence's first token", "to_go": "estimate, reward to go",
    "oracle": "IAPO, s from continuations", "vine": "gain in value (VinePPO)",
    "roles_token": "roles, at the token", "roles_spread": "roles, spread over the sentence",
    "roles_first": "roles, at the sentence's first token", "roles_to_go": "roles, reward to go",
}  # fmt: skip
"""Labels of rows that :data:`iapo_mini.plots.LABELS` does not have."""


def label(name: str) -> str:
    """The label of a row in figures and tables."""
    return NAMES.get(name, LABELS.get(name, name))


def dots(ax: Axes, rows: Mapping[str, Sequence[float]], highlight: str = "") -> None:
    """Draw a line of dots for each row, with the mean and its 95% interval as a bar above them.

    Args:
        ax: axes to draw on.
        rows: name -> one value per seed; the first row is on top.
        highlight: the row that is drawn in IAPO's colour.
    """
    for y, (name, values) in enumerate(rows.items()):
        color = COLORS["iapo"] if name == highlight else COLORS["grpo"]
        mean, low, high = mean_interval(values)
        ax.plot(values, [y] * len(values), "o", color=color, alpha=0.45, ms=5, mew=0)
        ax.plot([low, high], [y - 0.28] * 2, "-", color=color, lw=1.5)
        ax.plot([mean], [y - 0.28], "|", color=color, ms=9, mew=2)
    ax.set_yticks(range(len(rows)), [label(name) for name in rows])
    ax.set_ylim(len(rows) - 0.5, -0.7)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)


def outcome(ax: Axes, rows: Mapping[str, Mapping], metric: str, highlight: str) -> None:
    """Draw the :func:`dots` of ``"length"`` or ``"pass@1"``, on a scale that shows every run.

    Args:
        ax: axes to draw on.
        rows: name -> metric -> one value per seed.
        metric: the metric to draw.
        highlight: the row that is drawn in IAPO's colour.
    """
    dots(ax, {name: values[metric] for name, values in rows.items()}, highlight)
    if metric == "length":  # between 30 and 224 tokens, and intervals can reach below 0
        ax.set_xlabel("mean length (tokens)")
        ax.set_xscale("log")
        ax.set_xlim(20, 300)
        ax.set_xticks((20, 30, 50, 100, 200), ("20", "30", "50", "100", "200"))
        ax.minorticks_off()
    else:
        ax.set_xlabel("Pass@1")
        ax.set_xlim(-0.03, 1.03)


def controls(results: Mapping) -> Figure:
    """Plot length and Pass@1 of every control with both means, and of every kind of payment.

    Args:
        results: as written by ``controls.controls``.
    """
    fig = Figure(figsize=(13, 8.5), layout="constrained")
    axes = fig.subplots(2, 3, height_ratios=(1, 1))
    blocks = [
        (f"{how} mean", {name: row[how] for name, row in results["rows"].items()})
        for how in ("token", "sequence")
    ]
    blocks.append(("when to pay, token mean", results["payment"]))
    for column, (title, rows) in zip(axes.T, blocks):
        for ax, metric in zip(column, ("length", "pass@1")):
            outcome(ax, rows, metric, "token" if "token" in rows else "iapo")
        column[0].set_title(title, fontsize=11)
    fig.suptitle(
        "Dots are seeds; bars above them are means with 95% intervals, cut at the edges", fontsize=9
    )
    return fig


def choices(results: Mapping) -> Figure:
    """Plot how much each term favours computing over talk at choices, with both means of the loss.

    Args:
        results: as written by ``choices.choices``.
    """
    fig = Figure(figsize=(9, 4.2), layout="constrained")
    ax = fig.subplots()
    names = list(results["terms"])
    for how, offset, color, marker in (
        ("token", -0.15, "black", "o"), ("sequence", 0.15, "#8a8a8a", "s"),
    ):  # fmt: skip
        shown = [(y, results["terms"][name][how]) for y, name in enumerate(names)]
        y = [place + offset for place, _ in shown]
        mean, low, high = zip(*(interval for _, interval in shown))
        ax.errorbar(
            mean, y, xerr=[[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]],
            fmt=marker, color=color, capsize=2, label=f"{how} mean",
        )  # fmt: skip
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(names)), [label(name) for name in names])
    ax.invert_yaxis()
    ax.set_xlabel("paid to computing minus paid to talk, where a sentence is opened (std)")
    ax.grid(axis="x", alpha=0.3)
    ax.legend(frameon=False)
    return fig
