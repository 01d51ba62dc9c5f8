"""Figures of the experiments on all methods: Table 1, Fig. 5 to 7 of the paper, departures.

As in :mod:`iapo_mini.plots`, every function returns a figure and does not show or save it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from iapo_mini.chat import token_texts
from iapo_mini.intervals import mean_interval
from iapo_mini.plots import COLORS, LABELS, MARKERS, STYLES, interval_of
from iapo_mini.problems.stories import ROLES, token_roles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tradeoff(methods: Mapping[str, Mapping], ks: Sequence[int]) -> Figure:
    """Plot Pass@k against Length@k at the smallest and largest k, and Ratio@k over k.

    Points further up and left are better. Bars are 95% intervals. With many methods a wide one may
    leave its panel, so that the points stay apart.

    Args:
        methods: method -> metrics, as in the results of ``table1``.
        ks: values of k that were measured.
    """
    fig = Figure(figsize=(12, 4), layout="constrained")
    axes = fig.subplots(1, 3)
    for ax, k in zip(axes, (min(ks), max(ks))):
        for name, result in methods.items():
            x, x_low, x_high = interval_of(result, f"length@{k}")
            y, y_low, y_high = interval_of(result, f"pass@{k}")
            ax.errorbar(
                x, y, [[y - y_low], [y_high - y]], [[x - x_low], [x_high - x]],
                marker=MARKERS.get(name, "o"), color=COLORS.get(name, "black"), ms=8, lw=1,
                capsize=2, label=LABELS.get(name, name),
            )  # fmt: skip
        ax.set_xlabel(f"Length@{k} (tokens)")
        ax.set_ylabel(f"Pass@{k}")
        ax.grid(alpha=0.3)
        for metric, limit in (("length", ax.set_xlim), ("pass", ax.set_ylim)):
            points = [float(np.mean(result[f"{metric}@{k}"])) for result in methods.values()]
            margin = 0.2 * (max(points) - min(points))
            if len(methods) > 4 and margin > 0:
                limit(min(points) - margin, max(points) + margin)
    for name, result in methods.items():
        means = [1000 * float(np.mean(result[f"ratio@{k}"])) for k in ks]
        axes[2].plot(
            ks, means, STYLES.get(name, "-"), marker=MARKERS.get(name, "o"),
            color=COLORS.get(name, "black"), ms=6, lw=1.2,
        )  # fmt: skip
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(list(ks), [str(k) for k in ks])
    axes[2].set_xlabel("k")
    axes[2].set_ylabel("Ratio@k (right answers per 1,000 tokens)")
    axes[2].grid(alpha=0.3)
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, frameon=False, loc="outside right center")
    return fig


def by_steps(methods: Mapping[str, Mapping]) -> Figure:
    """Plot accuracy and length by the number of operations of the story.

    Args:
        methods: method -> ``{"by_steps": {operations: {"accuracy", "length": [per seed]}}}``.
    """
    fig = Figure(figsize=(10, 3.6), layout="constrained")
    labels = {"accuracy": "accuracy (share of completions)", "length": "mean length (tokens)"}
    for ax, (metric, label) in zip(fig.subplots(1, 2), labels.items()):
        for name, result in methods.items():
            steps = list(result["by_steps"])
            means = [float(np.mean(result["by_steps"][n][metric])) for n in steps]
            ax.plot(
                [int(n) for n in steps], means, STYLES.get(name, "-"), lw=1.4, ms=6,
                marker=MARKERS.get(name, "o"), color=COLORS.get(name, "black"),
                label=LABELS.get(name, name),
            )  # fmt: skip
        ax.set_xlabel("operations in the story")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    handles, names = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, names, frameon=False, loc="outside right center")
    return fig


COLUMNS = 110
"""Number of letters per line of a completion."""


def case_study(
    question: str, texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase
) -> Figure:
    """Plot the answers of several policies to one story, with tokens coloured by role (Fig. 7).

    Args:
        question: the story.
        texts: method -> completion.
        tokenizer: tokenizer that splits the completions into tokens.
    """
    blocks = {}
    for name, text in texts.items():
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = token_texts(tokenizer, ids)
        colors = [to_rgba(COLORS[role], 0.45) for role in token_roles(tokenizer, ids)]
        title = f"{LABELS.get(name, name)}: {len(ids)} tokens"
        blocks[title] = list(zip(pieces, colors))
    fig, ax = _stacked(question, blocks)
    handles = [Patch(color=to_rgba(COLORS[r], 0.45), label=r) for r in (*ROLES, "format", "other")]
    ax.legend(
        handles=handles, ncols=8, frameon=False, loc="lower left", fontsize=8, borderaxespad=0
    )
    told = (f"{title}: {''.join(text for text, _ in parts)}" for title, parts in blocks.items())
    fig.set_label("Completions of one story with tokens coloured by role. " + " ".join(told))
    return fig


def heat_maps(question: str, completions: Mapping[str, tuple], span: float = 2.0) -> Figure:
    """Plot the informativeness of every token in the answers of several policies (Fig. 14).

    Args:
        question: the story.
        completions: method -> ``(pieces, values)``, token texts and nats.
        span: nats at which the colour is full, in both directions.
    """
    scale = ScalarMappable(Normalize(-span, span), colormaps["PuOr_r"])
    blocks = {
        f"{LABELS.get(name, name)}: {len(pieces)} tokens, {sum(values):.2f} nats in all": [
            (piece, (*scale.to_rgba(value)[:3], 0.8)) for piece, value in zip(pieces, values)
        ]
        for name, (pieces, values) in completions.items()
    }
    fig, ax = _stacked(question, blocks)
    label = "informativeness (nats; negative: the answer becomes less sure)"
    height = fig.get_figheight()
    below = ax.inset_axes((0.0, 0.45 / height, 0.5, 0.1 / height))
    fig.colorbar(scale, cax=below, orientation="horizontal", extend="both").set_label(
        label, fontsize=8
    )
    below.tick_params(labelsize=8)
    return fig


def _stacked(question: str, blocks: Mapping[str, list[tuple[str, tuple]]]) -> tuple[Figure, Axes]:
    """Draw the story on top, then a titled block of text for each policy with coloured tokens."""
    wrapped = {}
    for title, pieces in blocks.items():
        lines: list[list[tuple[str, tuple]]] = [[]]
        used = 0
        for piece, color in pieces:
            if used + len(piece) > COLUMNS:
                lines.append([])
                used = 0
            lines[-1].append((piece.replace("\n", " "), color))
            used += len(piece)
        wrapped[title] = lines
    told = textwrap.wrap(question, COLUMNS - 10)  # shorter, as rounding to pixels widens letters
    rows = len(told) + sum(len(lines) + 1.5 for lines in wrapped.values()) + 4
    size = 8.2
    # The axis counts letters. A monospaced letter is 0.602 of the font size wide.
    fig = Figure(figsize=((COLUMNS + 2) * 0.602 * size / 72 / 0.98, 0.22 * rows + 0.2))
    ax = fig.add_axes((0.01, 0.01, 0.98, 0.98))
    ax.set_axis_off()
    ax.set_xlim(0, COLUMNS + 2)
    ax.set_ylim(rows, 0)
    text: dict[str, Any] = {"family": "monospace", "fontsize": size, "va": "center"}
    for i, sentence in enumerate(told):
        ax.text(0, i + 0.7, sentence, style="italic", **text)
    y = len(told) + 1.2
    for title, lines in wrapped.items():
        ax.text(0, y, title, weight="bold", **text)
        y += 1
        for line in lines:
            x = 0
            for piece, color in line:
                ax.add_patch(Rectangle((x, y - 0.45), len(piece), 0.9, color=color, lw=0))
                ax.text(x, y, piece, **text)
                x += len(piece)
            y += 1
        y += 0.5
    return fig, ax


def _seeds_and_mean(
    ax: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], style: str, **look: Any
) -> None:
    """Draw every seed as a thin line and their mean as a thick one.

    Three seeds are shown themselves: the interval of three numbers is wide, and they may form two
    groups.

    Args:
        ax: axes to draw on.
        x: one number for each value of a run.
        runs: the values of every seed.
        style, look: properties of the lines, as for ``Axes.plot``; only the mean has the label.
    """
    for values in runs:
        ax.plot(x, values, style[-1:], color=look["color"], lw=0.7, alpha=0.6)
    ax.plot(x, np.mean(runs, axis=0), style, lw=2.2, **look)


def sweeps(results: Mapping) -> Figure:
    """Plot length, Pass@k and entropy by each weight (Fig. 6): every seed, and their mean.

    Args:
        results: as written by ``sweeps.sweeps``.
    """
    k = results["k"]
    panels = {
        "length": "mean length (tokens)", "pass@1": "Pass@1", f"pass@{k}": f"Pass@{k}",
        "entropy": "policy entropy after training\n(nats per token)",
    }  # fmt: skip
    fig = Figure(figsize=(13, 5.6), layout="constrained")
    for row, weight in zip(fig.subplots(2, 4), ("alpha", "beta")):
        values = [point["value"] for point in results[weight]]
        for ax, (metric, label) in zip(row, panels.items()):
            seeds = list(zip(*(point[metric] for point in results[weight])))
            _seeds_and_mean(ax, values, seeds, "o-", color=COLORS["iapo"], label="IAPO", ms=4)
            ax.set_xscale("log")
            ax.set_xlabel(f"{weight} (log scale)")
            ax.set_ylabel(label)
            ax.set_ylim(0, 1.02 if metric.startswith("pass") else None)
            ax.grid(alpha=0.3)
    return fig


def _drawn(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% interval for drawing; the interval of a single value has width 0."""
    mean, low, high = mean_interval(values)
    return (mean, mean, mean) if len(values) == 1 else (mean, low, high)


def means(results: Mapping) -> Figure:
    """Plot length by training step and Pass@1 after training for two ways to average the loss.

    Every seed is a thin line, or a dot.

    Args:
        results: as written by ``sweeps.sweeps``.
    """
    fig = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    looks = {"sequence": ("-", ""), "token": (":", "//")}
    names, y = [], 0
    for method, ways in results["means"].items():
        for aggregation, found in ways.items():
            style, hatch = looks[aggregation]
            color, label = COLORS[method], f"{LABELS[method]}, {aggregation} mean"
            steps = range(1, len(found["length_by_step"][0]) + 1)
            _seeds_and_mean(left, steps, found["length_by_step"], style, color=color, label=label)
            mean = float(np.mean(found["pass@1"]))
            right.barh(y, mean, color=color, hatch=hatch, edgecolor="white", alpha=0.75, height=0.6)
            spread = y + np.linspace(-0.2, 0.2, len(found["pass@1"]))
            right.scatter(found["pass@1"], spread, s=9, color="black", zorder=3)
            names.append(label)
            y += 1
    left.set_xlabel("training step")
    left.set_ylabel("mean completion length (tokens)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    right.set_yticks(range(y), names, fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("Pass@1")
    right.set_xlim(0, 1)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return fig


def departures(results: Mapping) -> Figure:
    """Plot the effect of each departure on the advantages, and on length and Pass@1 after training.

    Args:
        results: as written by ``departures.departures``.
    """
    rows = {"iapo": "IAPO as in the paper"}
    rows |= {name: textwrap.fill(row["what"], 34) for name, row in results["rows"].items()}
    panels = {
        "correlation": "correlation with the\npaper's advantages",
        "terms": "correlation of the\ntoken terms",
        "sign_flips": "tokens whose advantage\nchanges sign (share)",
        "length": "mean length (tokens)",
        "pass@1": "Pass@1",
    }
    values = {"iapo": results["iapo"], **results["rows"]}
    rows = {name: label for name, label in rows.items() if panels.keys() & values[name].keys()}
    panels = {m: label for m, label in panels.items() if any(m in v for v in values.values())}
    fig = Figure(figsize=(12, 0.6 * len(rows) + 1.2), layout="constrained")
    axes = fig.subplots(1, len(panels), sharey=True)
    for ax, (metric, label) in zip(axes, panels.items()):
        for y, name in enumerate(rows):
            found = values[name]
            if metric not in found:
                continue
            mean, low, high = _drawn(found[metric])
            color = COLORS["iapo" if name == "iapo" else "grpo"]
            ax.barh(y, mean, color=color, alpha=0.75, height=0.6)
            ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], color="black", capsize=3, lw=1)
        ax.set_xlabel(label)
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    axes[0].set_yticks(range(len(rows)), list(rows.values()), fontsize=8)
    axes[0].invert_yaxis()
    return fig


def starts(results: Mapping) -> Figure:
    """Plot length, Pass@1 and right answers per token after training, by start policy and method.

    A bar is the mean over seeds, with its 95% interval; a dot is a seed.

    Args:
        results: as written by ``starts.starts``.
    """
    panels = {
        "length": ("mean length (tokens)", 1),
        "pass@1": ("Pass@1", 1),
        "ratio@1": ("right answers per 1,000 tokens", 1000),
    }
    rows = results["starts"]
    methods = list(next(iter(rows.values())))
    fig = Figure(figsize=(12, 3.6), layout="constrained")
    axes = fig.subplots(1, 3)
    width = 0.8 / len(methods)
    for ax, (metric, (label, factor)) in zip(axes, panels.items()):
        for i, method in enumerate(methods):
            x = np.arange(len(rows)) + (i - (len(methods) - 1) / 2) * width
            means, bars = [], []
            for row in rows.values():
                seeds = np.atleast_1d(row[method][metric]) * factor
                mean, low, high = _drawn(seeds.tolist())
                means.append(mean)
                bars.append((mean - low, high - mean))
                ax.plot(np.full(len(seeds), x[len(means) - 1]), seeds, "o", color="white",
                        mec="black", ms=3, mew=0.6, zorder=3)  # fmt: skip
            ax.bar(
                x, means, width, color=COLORS[method], alpha=0.75, edgecolor="white",
                hatch="//" if method == "iapo_sentence" else "",
                label="before training" if method == "start" else LABELS[method],
            )  # fmt: skip
            ax.errorbar(x, means, np.transpose(bars), fmt="none", color="black", capsize=2, lw=1)
        ax.set_xticks(range(len(rows)), list(rows))
        ax.set_xlabel("start policy")
        ax.set_ylabel(label)
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, frameon=False, loc="outside upper center", ncols=len(methods))
    return fig
