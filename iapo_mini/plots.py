"""Figures that are readable in print and by colour-blind readers, with units on every axis.

Every function returns a ``matplotlib.figure.Figure`` and does not show or save it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from iapo_mini.intervals import expected_calibration_error, mean_interval, share_interval

# Any two methods, and any two roles, are at least 18 apart in CIELAB for every kind of colour
# blindness, and a role never has a method's colour. Line styles, markers or hatches repeat every
# distinction made by colour.
COLORS = {
    "start": "#7F7F7F", "grpo": "#0072B2", "iapo": "#D55E00",
    "dapo": "#56B4E9", "gfpo": "#674CD5", "gtpo_iapo": "#A10489", "sgrpo": "#1F1388",
    "gtpo": "#4A0D51", "gfpo_24": "#8C87FB", "grpo_kimi": "#4D444E", "grpo_efficient": "#B4AEC4",
    "iapo_sequence": "#962607",
    "iapo_ni": "#DEAC84", "iapo_ne": "#954B3D", "iapo_pmi": "#540507",
    "iapo_sentence": "#F99652",
    "compute": "#009E73", "restate": "#AAEE88", "plan": "#BBAA00", "check": "#CC22BB",
    "hedge": "#F0E442", "conclude": "#8811FF", "format": "#DDDDDD", "other": "#000000",
}  # fmt: skip
STYLES = {
    "start": ":", "grpo": "--", "iapo": "-", "dapo": "-.", "gfpo": ":", "gtpo_iapo": "--",
    "sgrpo": ":", "gtpo": "-", "gfpo_24": "--", "grpo_kimi": "-.", "grpo_efficient": "-",
    "iapo_sequence": "--", "iapo_ni": "--", "iapo_ne": "-.", "iapo_pmi": ":", "iapo_sentence": "-.",
}  # fmt: skip
MARKERS = {
    "start": "X", "grpo": "o", "dapo": "s", "gfpo": "^", "gtpo": "v", "sgrpo": "P", "iapo": "*",
    "iapo_ni": "<", "iapo_ne": ">", "iapo_pmi": "D", "gtpo_iapo": "d", "gfpo_24": "2",
    "grpo_kimi": "p", "grpo_efficient": "h", "iapo_sequence": "x", "iapo_sentence": "8",
}  # fmt: skip
LABELS = {
    "start": "start policy", "grpo": "GRPO", "dapo": "DAPO", "gfpo": "GFPO", "gtpo": "GTPO",
    "sgrpo": "S-GRPO", "iapo": "IAPO", "iapo_ni": "IAPO-NI", "iapo_ne": "IAPO-NE",
    "iapo_pmi": "IAPO-PMI", "iapo_sentence": "IAPO, by sentence",
    "iapo_sequence": "IAPO, sequence mean", "gfpo_24": "GFPO (8 of 24)",
    "gtpo_iapo": "GTPO (IAPO's form)", "grpo_kimi": "GRPO + length (Kimi)",
    "grpo_efficient": "GRPO + length (A&Z)",
}  # fmt: skip

POLICY_LOOKS = {
    "embedded": ("#56B4E9", "o"), "calibrated": ("#1F1388", "s"),
    "uncalibrated": ("#A10489", "D"), "recalibrated": ("#009E73", "^"),
}  # fmt: skip
"""Policy that the package ships, or repairs -> its colour and marker."""


def band(
    ax: Axes,
    x: ArrayLike,
    intervals: ArrayLike,
    style: str,
    *,
    color: str,
    label: str,
    alpha: float = 0.2,
    **line: Any,
) -> None:
    """Draw means as a line and their intervals as a band; a single seed has no band.

    Args:
        x: one number for each interval.
        intervals: one ``(mean, low, high)`` for each number of ``x``.
        style, color, label, line: properties of the line, as for ``Axes.plot``.
        alpha: opacity of the band.
    """
    mean, low, high = np.array(intervals).T
    ax.plot(x, mean, style, color=color, label=label, **line)
    if not np.isnan(low).any():
        ax.fill_between(x, low, high, color=color, alpha=alpha, lw=0)


def _by_step(ax: Axes, runs: Sequence[np.ndarray], method: str, beside: float) -> None:
    """Draw the mean over seeds by step, and every seed as a thin line.

    An interval would hide that the seeds of a method may fall into two groups. For figures with
    many methods, ``beside`` above 0 draws the 95% interval of the last step instead, as a bar
    ``beside`` steps to the right of it.
    """
    intervals = [mean_interval(values) for values in zip(*runs)]
    color, style = COLORS.get(method, "black"), STYLES.get(method, "-.")
    x, label = np.arange(1, len(intervals) + 1), LABELS.get(method, method)
    if not beside:
        for values in runs if len(runs) > 1 else ():
            ax.plot(x, values, style, color=color, lw=0.7, alpha=0.6)
        means = [mean for mean, _, _ in intervals]
        ax.plot(x, means, style, color=color, label=label, lw=2.4)
        return
    ax.plot(
        x, [mean for mean, _, _ in intervals], style, color=color, label=label, lw=1.8,
        marker=MARKERS.get(method, "o"), markevery=3, ms=5,
    )  # fmt: skip
    if len(runs) > 1:
        mean, low, high = intervals[-1]
        ax.errorbar(x[-1] + beside, mean, [[mean - low], [high - mean]], color=color, capsize=2)


def _smooth(values: Sequence[float], width: int = 5) -> np.ndarray:
    """Centred running mean, shorter at the ends."""
    series, half = np.asarray(values, dtype=float), width // 2
    return np.array([series[max(0, i - half) : i + half + 1].mean() for i in range(len(series))])


def training_curves(curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> Figure:
    """Plot length, accuracy and entropy of the training rollouts by step.

    Args:
        curves: method -> one mapping per seed, with ``"length"`` (tokens), ``"accuracy"`` (share)
            and ``"entropy"`` (nats per token), a value per step. If the seeds of a method have
            different numbers of steps, only the longest runs are drawn. With many methods a wide
            interval may leave its panel, so that it does not flatten the lines.
    """
    many = len(curves) > 4
    fig = Figure(figsize=(12 if many else 10, 3.6 if many else 3.2), layout="constrained")
    panels = (
        ("length", "mean completion length (tokens)"),
        ("accuracy", "accuracy (share of completions)"),
        ("entropy", "policy entropy (nats per token)"),
    )
    for ax, (name, label) in zip(fig.subplots(1, 3), panels):
        highest = 0.0
        for i, (method, runs) in enumerate(curves.items()):
            steps = max(len(run[name]) for run in runs)
            beside = 0.02 * steps * (i + 1) if many else 0.0
            whole = [_smooth(run[name]) for run in runs if len(run[name]) == steps]
            _by_step(ax, whole, method, beside)
            highest = max(highest, float(np.mean(whole, axis=0).max()))
        ax.set_xlabel("training step")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        ax.set_ylim(0, 1 if name == "accuracy" else 1.2 * highest if many else None)
    if curves:
        handles, names = fig.axes[0].get_legend_handles_labels()
        if many:
            fig.legend(handles, names, frameon=False, loc="outside right center")
        else:
            fig.axes[0].legend(frameon=False)
    return fig


def comparison(methods: Mapping[str, Mapping], k: int = 8) -> Figure:
    """Plot length, Pass@k and Ratio@k of each method as bars with 95% intervals, seeds as dots.

    Args:
        methods: method -> ``{"length": [per seed], "pass@k": [...], "ratio@k": [...]}``; with one
            seed the intervals come from ``"intervals"``.
    """
    many = len(methods) > 4
    fig = Figure(figsize=(13 if many else 10, 3.6 if many else 3.2), layout="constrained")
    panels = (
        ("length", "mean length (tokens)"),
        ("pass@1", "Pass@1"),
        (f"pass@{k}", f"Pass@{k}"),
        (f"ratio@{k}", f"Ratio@{k} (per token)"),
    )
    for ax, (name, label) in zip(fig.subplots(1, 4), panels):
        for x, (method, result) in enumerate(methods.items()):
            mean, low, high = interval_of(result, name)
            ax.bar(x, mean, color=COLORS.get(method, "black"), alpha=0.75, width=0.7)
            ax.errorbar(x, mean, [[mean - low], [high - mean]], color="black", capsize=4, lw=1.2)
            dots = result[name]
            if len(dots) > 1:
                spread = x + np.linspace(-0.2, 0.2, len(dots))
                ax.scatter(spread, dots, s=9, color="black", zorder=3)
        names = [LABELS.get(m, m) if many else LABELS.get(m, m).replace(" ", "\n") for m in methods]
        ax.set_xticks(range(len(methods)), names, rotation=90 if many else 0)
        ax.set_title(label, fontsize=10)
        ax.set_ylim(0)
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
    return fig


def interval_of(result: Mapping, name: str) -> tuple[float, float, float]:
    """``(mean, low, high)`` of a metric over seeds, or over problems if there is one seed."""
    values = result[name]
    mean, low, high = mean_interval(values)
    if len(values) == 1:
        low, high = result["intervals"][0][name]
    interval = mean, low, high
    return share_interval(interval) if name.startswith("pass") else interval


def role_composition(methods: Mapping[str, Mapping[str, float | Sequence[float]]]) -> Figure:
    """Plot tokens per completion by role, as one stacked bar for each method.

    Args:
        methods: method -> role -> mean tokens per completion, or one such mean per seed.
    """
    fig = Figure(figsize=(7, 0.7 * len(methods) + 1.4), layout="constrained")
    ax = fig.subplots()
    hatches = {"restate": "//", "plan": "..", "check": "xx", "hedge": "\\\\", "conclude": "oo"}
    for y, counts in enumerate(methods.values()):
        left = 0.0
        for role, values in counts.items():
            count = float(np.mean(values))
            ax.barh(
                y, count, left=left, color=COLORS[role], hatch=hatches.get(role), lw=0.4,
                edgecolor="white", height=0.65, label=role if y == 0 else None,
            )  # fmt: skip
            left += count
    ax.set_yticks(range(len(methods)), [LABELS.get(m, m) for m in methods])
    ax.invert_yaxis()
    ax.set_xlabel("tokens per completion")
    told = "; ".join(
        f"{LABELS.get(m, m)}: " + ", ".join(f"{r} {np.mean(v):.1f}" for r, v in counts.items())
        for m, counts in methods.items()
    )
    fig.set_label(f"Stacked bars of tokens per completion by role. {told}.")
    ax.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return fig


def _role_names(roles: Sequence[str], widths: Sequence[int]) -> list[tuple[int, int, str]]:
    """(first letter, letters, role) of every run of tokens of one role in a line of text."""
    runs: list[tuple[int, int, str]] = []
    x = 0
    for role, width in zip(roles, widths):
        if runs and runs[-1][2] == role:
            runs[-1] = (runs[-1][0], runs[-1][1] + width, role)
        else:
            runs.append((x, width, role))
        x += width
    return runs


def _broken(tokens: Sequence[str], columns: int) -> list[list[int]]:
    """Numbers of the tokens on each line of at most ``columns`` letters."""
    lines: list[list[int]] = [[]]
    used = 0
    for i, token in enumerate(tokens):
        if used + len(token) > columns and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append(i)
        used += len(token)
    return lines


def draw_tokens(
    ax: Axes,
    tokens: Sequence[str],
    values: Sequence[float],
    norm: Normalize,
    columns: int,
    half: float = 0.36,
) -> list[list[int]]:
    """Write tokens as lines of text, each token on its colour, and return their numbers by line.

    Args:
        ax: axes; a letter is one unit wide and a line one unit high.
        tokens: token texts, with their spaces; values: one for each.
        norm: colour scale of the values.
        columns: characters per line.
        half: half of the height of a coloured field.
    """
    cmap, lines = colormaps["RdBu"], _broken(tokens, columns)
    for row, line in enumerate(lines):
        x = 0
        for i in line:
            width = len(tokens[i])
            color = cmap(norm(values[i]))
            ax.fill_between([x, x + width], row - half, row + half, color=color, lw=0)
            dark = sum(color[:3]) < 1.6
            ax.text(x, row, tokens[i].replace("\n", " "), family="monospace", fontsize=8.2,
                    va="center", color="white" if dark else "black", parse_math=False)  # fmt: skip
            x += width
    ax.set_xlim(0, columns)
    ax.set_ylim(len(lines) - 0.3, -0.6)
    ax.axis("off")
    return lines


def token_heatmap(
    tokens: Sequence[str],
    values: Sequence[float],
    roles: Sequence[str] | None = None,
    title: str = "",
    columns: int = 84,
    unit: str = "informativeness s (nats): blue lowers the answer entropy, red raises it",
) -> Figure:
    """Plot a completion as text, with each token coloured by its value (paper, Fig. 14).

    The figure's label is its alt text, with the tokens that have the largest and smallest values.

    Args:
        tokens: token texts, with their spaces.
        values: one value per token.
        roles: one role per token, drawn as a coloured line below it, with its name where it fits;
            optional.
        title: figure title.
        columns: characters per line.
        unit: description of the values, below the colour bar.
    """
    # The largest value ends the scale: a clipped scale would show lesser tokens as deep as it.
    limit = max(0.1, float(np.abs(values).max()) if len(values) else 0.1)
    norm = Normalize(-limit, limit)
    pitch = 0.34 if roles is None else 0.44
    height = pitch * len(_broken(tokens, columns)) + 1.5
    fig = Figure(figsize=(10, height), layout="constrained")
    ax = fig.subplots()
    half = 0.36 * 0.34 / pitch
    for row, line in enumerate(draw_tokens(ax, tokens, values, norm, columns, half)):
        if roles is None:
            continue
        widths = [len(tokens[i]) for i in line]
        for x, width, role in _role_names([roles[i] for i in line], widths):
            below = row + half + 0.04
            ax.plot([x + 0.15, x + width - 0.15], [below] * 2, color=COLORS[role], lw=2)
            # Colours alone don't name a role, and the light one of hedging can hardly be seen.
            if width >= len(role):
                ax.text(x + width / 2, below + 0.04, role, fontsize=8, ha="center", va="top",
                        color="#444444")  # fmt: skip
    ax.set_title(title, fontsize=10, loc="left")
    bar = fig.colorbar(
        ScalarMappable(norm, "RdBu"), ax=ax, orientation="horizontal", fraction=0.06, aspect=50
    )
    bar.set_label(unit)
    if roles is not None:
        seen = [r for r in COLORS if r in set(roles)]
        handles = [ax.plot([], [], color=COLORS[r], lw=3, label=r)[0] for r in seen]
        fig.legend(handles=handles, loc="outside upper right", ncols=len(seen), frameon=False,
                   fontsize=8)  # fmt: skip
    fig.set_label(_heard(tokens, values, title, unit))
    return fig


def _heard(tokens: Sequence[str], values: Sequence[float], title: str, unit: str) -> str:
    """The alt text of a heat map: the text itself, and the tokens that stand out."""
    order = np.argsort(values)
    told = {
        name: ", ".join(f"'{tokens[i].strip()}' (token {i + 1}) {values[i]:+.2f}" for i in chosen)
        for name, chosen in (("Largest", order[::-1][:4]), ("smallest", order[:2]))
    }
    title = title.replace("$", "").replace("\\", "")
    start = f"{title}. " if title else ""
    return (
        f"{start}A completion of {len(tokens)} tokens as coloured text; {unit.partition(':')[0]}. "
        + "; ".join(f"{name}: {words}" for name, words in told.items())
        + f". The text: {''.join(tokens)}"
    )


def reliability(sets: Mapping[str, Mapping], bins: int = 10) -> Figure:
    """Plot reliability of forced answers, and calibration error and entropy along the chain.

    Args:
        sets: label -> ``confidence``, ``correct`` and ``entropy``, each (B, parts + 1), from
            ``calibration.exit_calibration``.
        bins: equal-width confidence bins.
    """
    fig = Figure(figsize=(10, 3.3), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    looks = zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7"), "osD^")
    for (label, exits), look in zip(sets.items(), looks):
        color, marker = POLICY_LOOKS.get(label, look)
        confidence, correct = exits["confidence"].flatten(), exits["correct"].flatten().float()
        index = (confidence * bins).long().clamp(max=bins - 1)
        inside = [index == b for b in range(bins) if (index == b).any()]
        x = [float(confidence[i].mean()) for i in inside]
        y = [float(correct[i].mean()) for i in inside]
        size = [15 + 300 * float(i.float().mean()) for i in inside]
        left.plot(x, y, color=color, lw=0.8)
        left.scatter(x, y, s=size, color=color, marker=marker, alpha=0.8, label=label)
        share = np.linspace(0, 100, exits["confidence"].shape[1])
        ece = [
            expected_calibration_error(exits["confidence"][:, t], exits["correct"][:, t])
            for t in range(len(share))
        ]
        middle.plot(share, ece, marker + "-", color=color, ms=4)
        right.plot(share, exits["entropy"].mean(0), marker + "-", color=color, ms=4, label=label)
    left.plot([0, 1], [0, 1], "k:", lw=1)
    left.set_xlabel("confidence of the forced answer")
    left.set_ylabel("share that is right")
    left.set_title("all prefixes (area: how many)", fontsize=10)
    middle.axhline(0.05, color="black", ls=":", lw=1)
    middle.set_ylim(bottom=0)
    middle.set_ylabel("expected calibration error")
    right.set_ylim(bottom=0)
    right.set_ylabel("answer entropy (nats)")
    if len(sets) > 1:
        right.legend(frameon=False, fontsize=8)
    for ax in (middle, right):
        ax.set_xlabel("share of the chain seen (%)")
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    return fig
