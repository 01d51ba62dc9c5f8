"""Figures that compare early exits with real continuations.

As in :mod:`iapo_mini.plots`, every function returns a figure and does not show or save it.
"""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from iapo_mini.lab.figures.controls import dots, outcome

ESTIMATE = "estimate, embedded policy"
"""The row of the paper's s, estimated with the embedded policy."""


def agreement(results: Mapping) -> Figure:
    """Plot estimated and real answer entropy by place for each policy, and results of training.

    Args:
        results: as written by ``oracle.oracle``.
    """
    fig = Figure(figsize=(12, 6.4), layout="constrained")
    above, below = fig.subfigures(2, 1, squeeze=False)[:, 0]
    axes = above.subplots(1, len(results["agreement"]), sharey=True)
    for ax, (name, row) in zip(axes, results["agreement"].items()):
        place, early, real = zip(*row["by_place"])
        ax.plot(place, early, "o-", color="#D55E00", label="early exit")
        ax.plot(place, real, "s--", color="#0072B2", label="continuations")
        ax.set_title(f"{name} (correlation of the drops {row['correlation'][0]:.2f})", fontsize=10)
        ax.set_xlabel("share of the completion written")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("answer entropy (nats)")
    axes[0].legend(frameon=False)
    for ax, (metric, label) in zip(
        below.subplots(1, 2), (("length", "mean length (tokens)"), ("pass@1", "Pass@1"))
    ):
        dots(ax, {name: row[metric] for name, row in results["training"].items()}, "iapo")
        ax.set_xlabel(label)
    return fig


def quality(rows: Mapping[str, Mapping]) -> Figure:
    """Plot length and Pass@1 after training with an s of rising quality.

    Args:
        rows: from ``oracle.by_quality``.
    """
    fig = Figure(figsize=(11, 4.2), layout="constrained")
    for ax, metric in zip(fig.subplots(1, 2, sharey=True), ("length", "pass@1")):
        outcome(ax, rows, metric, ESTIMATE)
    return fig
