"""Figures of the study of the estimators: AUC, growth and speed.

As in :mod:`iapo_mini.plots`, every function returns a figure and does not show or save it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from iapo_mini.plots import POLICY_LOOKS

ESTIMATOR_LABELS = {
    "entropy": "answer entropy\n(paper)", "pmi": "pointwise\ninformation",
    "candidates": "entropy over\ncandidates", "belief_shift": "belief\nshift",
    "next_token": "next-token\n(IAPO-NE)",
}  # fmt: skip
_HATCHES = {"calibrated": "", "embedded": "xx", "uncalibrated": "//", "recalibrated": ".."}


def estimator_auc(results: Mapping) -> Figure:
    """Plot how well the sums of sentences separate computing from talk and follow the true drop.

    Args:
        results: content of ``results/estimator.json``.
    """
    fig = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    panels = (
        (left, "auc", "ROC AUC per sentence", 0.5),
        (right, "spearman", "rank correlation with the true drop", 0.0),
    )
    for ax, section, label, chance in panels:
        for side, (policy, hatch) in zip((-0.3, -0.1, 0.1, 0.3), _HATCHES.items()):
            color, _ = POLICY_LOOKS[policy]
            stats = np.array([results[section][policy][n] for n in ESTIMATOR_LABELS])
            x = np.arange(len(stats)) + side
            height = stats[:, 0] - chance
            ax.bar(x, height, 0.19, bottom=chance, color=color, alpha=0.75, hatch=hatch,
                   edgecolor="white", label=policy)  # fmt: skip
            error = [stats[:, 0] - stats[:, 1], stats[:, 2] - stats[:, 0]]
            ax.errorbar(x, stats[:, 0], error, fmt="none", color="black", capsize=3, lw=1)
        ax.axhline(chance, color="black", lw=0.8)
        ax.set_xticks(range(len(ESTIMATOR_LABELS)), ESTIMATOR_LABELS.values(), fontsize=8)
        ax.set_ylabel(label)
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
    best = results["ceiling"]["auc"][0]
    left.axhline(best, color="black", ls="--", lw=1, label="exact posterior's entropy drop")
    fig.legend(
        *left.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=5,
        loc="outside upper center",
    )  # fmt: skip
    return fig


def estimator_steps(results: Mapping) -> Figure:
    """Plot AUC per sentence by operations, for the calibrated policy and the exact posterior."""
    fig = Figure(figsize=(6, 3.6), layout="constrained")
    ax = fig.subplots()
    by_steps = results["auc_by_steps"]["calibrated"]
    x = [int(k) for k in by_steps]
    looks = zip(ESTIMATOR_LABELS, ("#674CD5", "#540507", "#8C87FB", "#CC79A7", "#7f7f7f"), "osD^v")
    for name, color, marker in looks:
        y = [values[name] for values in by_steps.values()]
        label = ESTIMATOR_LABELS[name].replace("\n", " ")
        ax.plot(x, y, marker + "-", color=color, ms=5, label=label)
    best = [results["ceiling"]["by_steps"][str(k)] for k in x]
    ax.plot(x, best, "k--", lw=1.2, label="exact posterior's entropy drop")
    ax.axhline(0.5, color="black", lw=0.8)
    ax.set_xticks(x)
    ax.set_xlabel("operations in the story")
    ax.set_ylabel("ROC AUC per sentence")
    ax.grid(alpha=0.3)
    fig.legend(frameon=False, fontsize=8, loc="outside right center")
    return fig


def estimator_growth(growth: Mapping) -> Figure:
    """Plot seconds by completion length for each way of asking, on logarithmic axes.

    Args:
        growth: ``lengths`` (tokens), ``seconds`` and fitted ``slopes`` by method.
    """
    fig = Figure(figsize=(6, 3.8), layout="constrained")
    ax = fig.subplots()
    looks = {"naive": ("#7f7f7f", "v:"), "cached": ("#D55E00", "s--"), "packed": ("#0072B2", "o-")}
    for method, values in growth["seconds"].items():
        color, style = looks[method]
        label = f"{method}: slope {growth['slopes'][method]:.2f}"
        ax.plot(growth["lengths"], values, style, color=color, ms=5, label=label)
    x = np.array(growth["lengths"], dtype=float)
    top = growth["seconds"]["naive"][-1]
    for order in (2, 3):
        ax.plot(x, 3 * top * (x / x[-1]) ** order, color="black", lw=0.6, alpha=0.6)
        ax.annotate(f"$L^{order}$", (x[2], 3 * top * (x[2] / x[-1]) ** order), fontsize=9,
                    xytext=(-2, 4), textcoords="offset points", ha="right")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(growth["lengths"], [str(n) for n in growth["lengths"]])
    ax.set_xlabel("completion length L (tokens)")
    ax.set_ylabel("seconds for one completion")
    ax.legend(frameon=False, fontsize=8)
    ax.grid(alpha=0.3)
    return fig


def estimator_speed(results: Mapping) -> Figure:
    """Plot time and extra memory of packing as ratios to other ways, by setting."""
    fig = Figure(figsize=(8, 3.4), layout="constrained")
    ax = fig.subplots()
    ratios = {
        "packed_over_cached_time": "time over\nauthors' way",
        "packed_over_cached_memory": "memory over\nauthors' way",
        "packed_over_forward_time": "time over one\npadded forward",
        "iapo_step_over_grpo_step": "IAPO step over\nGRPO step",
    }
    settings = (
        ("tiny", "embedded policy", "#0072B2", ""),
        ("qwen05b", "Qwen2.5-0.5B shape", "#E69F00", "//"),
    )
    for side, (setting, label, color, hatch) in zip((-0.2, 0.2), settings):
        values = [results[setting][name] for name in ratios]
        bars = ax.bar(np.arange(len(values)) + side, values, 0.38, color=color, hatch=hatch,
                      edgecolor="white", alpha=0.8, label=label)  # fmt: skip
        ax.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    ax.axhline(1, color="black", lw=0.8)
    ax.margins(y=0.1)
    ax.set_xticks(range(len(ratios)), ratios.values(), fontsize=8)
    ax.set_ylabel("ratio")
    ax.legend(frameon=False, fontsize=8)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    return fig
