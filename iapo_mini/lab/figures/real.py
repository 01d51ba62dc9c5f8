"""Figures of the study of a pretrained model.

As in :mod:`iapo_mini.plots`, every function returns a figure and does not show or save it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from iapo_mini.plots import COLORS, MARKERS, STYLES, draw_tokens
from iapo_mini.plots import LABELS as LABELS_OF_METHODS

LABELS = {
    "entropy": "answer entropy\n(paper)", "pointwise": "pointwise\ninformation",
    "belief_shift": "belief\nshift", "next_token": "next-token\n(IAPO-NE)", "random": "random",
}  # fmt: skip
VARIANT_LABELS = {
    "paper": "as in the paper", "line_break": "after a line break",
    "natural": "after a sentence of words", "joined": "merged with the last token",
    "sentence": "at sentence ends only",
}  # fmt: skip


def estimator(results: Mapping) -> Figure:
    """Plot how well each estimator finds results, and its values by kind of token.

    Args:
        results: content of ``results/real_estimator.json``.
    """
    fig = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2)
    x = np.arange(len(LABELS))
    for part, side, look in (
        ("token", -0.2, dict(color="#56B4E9", label="tokens: digits of results against others")),
        ("sentence", 0.2, dict(color="#0072B2", hatch="//",
                               label="sentences: those that compute against others")),
    ):  # fmt: skip
        value, low, high = np.array([results[part][name]["auc"] for name in LABELS]).T
        left.bar(x + side, value - 0.5, 0.38, bottom=0.5, edgecolor="white", **look)
        left.errorbar(x + side, value, [value - low, high - value], fmt="none", color="black",
                      capsize=3, lw=1)  # fmt: skip
    left.axhline(0.5, color="black", lw=0.8)
    left.set_xticks(x, LABELS.values(), fontsize=8)
    left.set_ylabel("ROC AUC (0.5: chance)")
    left.legend(frameon=False, fontsize=8)
    kinds = results["token"]["entropy"]["kinds"]
    places = np.arange(len(kinds))
    means, deviations = (
        np.array([kind[part] for kind in kinds.values()]) for part in ("mean", "sd")
    )
    right.errorbar(places, means, deviations, fmt="o", color="#0072B2", capsize=5)
    right.axhline(0, color="black", lw=0.8)
    right.set_xticks(
        places, [f"{name}\n{kind['count']}" for name, kind in kinds.items()], fontsize=8
    )
    right.set_ylabel("drop of the answer entropy (nats)")
    right.set_title("mean and standard deviation over tokens", fontsize=9)
    for ax in (left, right):
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
    return fig


def exits(results: Mapping) -> Figure:
    """Plot confidence and accuracy of forced answers along the chain, and the ways to ask.

    Args:
        results: content of ``results/real_estimator.json``.
    """
    fig = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2)
    share = np.linspace(0, 1, len(results["accuracy_by_tenth"]))
    left.plot(share, results["confidence_by_tenth"], "o-", color="#D55E00", label="confidence")
    left.plot(share, results["accuracy_by_tenth"], "s--", color="#0072B2", label="accuracy")
    left.set_xlabel("share of the worked solution that was read")
    left.set_ylabel("forced answer")
    left.set_ylim(0, 1)
    left.set_title(f"calibration error {results['ece']:.2f}", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    names = [name for name in VARIANT_LABELS if name in results["postfix"]]
    y = np.arange(len(names))[::-1]
    for part, side, look in (
        ("auc", 0.12, dict(color="#56B4E9", fmt="o", label="tokens")),
        ("auc_sentence", -0.12, dict(color="#0072B2", fmt="s", label="sentences")),
    ):
        value, low, high = np.array([results["postfix"][name][part] for name in names]).T
        right.errorbar(value, y + side, xerr=[value - low, high - value], capsize=3, **look)
    labels = [
        f"{VARIANT_LABELS[name]}\n{results['postfix'][name]['cost']:.1f} x the tokens, "
        f"calibration error {results['postfix'][name]['ece']:.2f}"
        for name in names
    ]
    right.set_yticks(y, labels, fontsize=8)
    right.axvline(0.5, color="black", lw=0.8)
    right.set_xlabel("ROC AUC of the drop of the answer entropy")
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return fig


def heat_maps(maps: Sequence[Mapping], columns: int = 96) -> Figure:
    """Plot the same chain as several policies read it, all on one colour scale.

    Args:
        maps: each with ``title``, ``tokens`` (texts) and ``values`` (nats, one for each token).
        columns: characters per line.
    """
    norm = Normalize(-1, 1)
    lines = [len("".join(one["tokens"])) / columns + 1 for one in maps]
    fig = Figure(figsize=(10, 0.34 * sum(lines) + 0.5 * len(maps) + 0.8), layout="constrained")
    axes = fig.subplots(len(maps), 1, height_ratios=lines)
    for ax, one in zip(np.atleast_1d(axes), maps):
        draw_tokens(ax, one["tokens"], one["values"], norm, columns)
        ax.set_title(one["title"], fontsize=10, loc="left")
    bar = fig.colorbar(
        ScalarMappable(norm, "RdBu"), ax=axes, orientation="horizontal", fraction=0.03, aspect=60,
        extend="both",
    )  # fmt: skip
    bar.set_label("drop of the answer entropy at a token, or over a sentence (nats): blue lowers "
                  "it, red raises it")  # fmt: skip
    return fig


def progress(results: Mapping) -> Figure:
    """Plot the curves of an unfinished training study, less those of GRPO on the same prompts.

    Every curve is a trailing mean of five steps of one seed; odd seeds have hollow markers.

    Args:
        results: content of ``results/real_training_so_far_card.json``.
    """
    fig = Figure(figsize=(10, 3.8), layout="constrained")
    axes = fig.subplots(1, 2)
    base = {one["seed"]: one for one in results["runs"]["grpo"]}
    titles = ("length minus GRPO's (tokens)", "accuracy minus GRPO's")
    for ax, metric, title in zip(axes, ("length", "accuracy"), titles):
        for row, some in results["runs"].items():
            for number, one in enumerate(some):
                other = base.get(one["seed"])
                if row == "grpo" or other is None:
                    continue
                less = np.array([a - b for a, b in zip(one[metric], other[metric])])
                sums = np.cumsum(np.insert(less, 0, 0.0))
                ax.plot(
                    np.arange(5, len(less) + 1), (sums[5:] - sums[:-5]) / 5, STYLES.get(row, "-."),
                    color=COLORS.get(row, "black"), marker=MARKERS.get(row, "o"), markevery=4,
                    fillstyle="none" if one["seed"] % 2 else "full",
                    label=None if number else LABELS_OF_METHODS.get(row, row),
                )  # fmt: skip
        ax.axhline(0, color="black", lw=0.8)
        ax.set_xlabel("step (trailing mean of five)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel(title)
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    return fig
