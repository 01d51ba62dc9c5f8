"""Figure of early exit at inference: accuracy against tokens.

As in :mod:`iapo_mini.plots`, the function returns a figure and does not show or save it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iapo_mini.plots import COLORS, POLICY_LOOKS

LABELS = {
    "uncalibrated": "uncalibrated",
    "embedded": "embedded",
    "calibrated": "calibrated",
    "iapo": "embedded, trained by IAPO",
}
_LOOKS = POLICY_LOOKS | {"iapo": (COLORS["iapo"], "^")}


def _draw(ax: Axes, name: str, rows: Sequence[Mapping], asking: bool) -> None:
    """Draw one policy's curve, its control, its agreement rule, and the chains left whole."""
    color, marker = _LOOKS.get(name, ("black", "P"))

    def points(part: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.array([row["length"][0] + asking * row["asking"][0] for row in part])
        return tokens, np.array([row["pass@1"] for row in part])

    numbers = [row for row in rows if not isinstance(row["rule"], str)]
    x, y = points(numbers)
    error = np.abs(y[:, 1:] - y[:, :1]).T
    ax.errorbar(x, y[:, 0], error, ls="-", ms=5, lw=1.5, elinewidth=0.8, capsize=2,
                color=color, marker=marker, label=LABELS.get(name, name))  # fmt: skip
    for i in (0, len(numbers) - 1):
        ax.annotate(f"{numbers[i]['rule']:g}", (x[i], y[i, 0]), (4, -11),
                    textcoords="offset points", fontsize=8, color=color)  # fmt: skip
    for rule, size, filled in (("never", 12, True), ("agree", 9, False)):
        x, y = points([row for row in rows if row["rule"] == rule])
        face = color if filled else "none"
        ax.plot(x, y[:, 0], "*" if filled else "P", ms=size, color=color, mfc=face, ls="")
    if all(row["random"] for row in numbers):
        random = [row["random"] | {"asking": [0.0]} for row in numbers]
        x, y = points(random)
        ax.plot(x, y[:, 0], ls=":", lw=1.5, color=color)


def early_exit(results: Mapping) -> Figure:
    """Plot accuracy against tokens as the threshold varies, without and with the cost of asking.

    Args:
        results: as written by ``lab.early_exit.early_exit``.
    """
    fig = Figure(figsize=(13, 4.4), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    real = {results["model"]: results["real"]} if results["real"] else {}
    for ax, asking in zip(axes, (False, True)):
        for name, rows in {**results["policies"], **real}.items():
            _draw(ax, name, rows, asking)
        ax.set_xlabel("tokens written" + (" and forwarded to ask" if asking else ""))
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("Pass@1")
    other = {"color": "black", "ls": ""}
    axes[0].plot([], [], "*", ms=12, label="whole chains", **other)
    axes[0].plot([], [], "P", ms=9, mfc="none", label="the answer agrees twice", **other)
    axes[0].plot([], [], ls=":", lw=1.5, color="black", label="as many cut at random")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    fig.suptitle(
        "Markers on a line: thresholds in nats; bars: 95% intervals over stories", fontsize=9
    )
    return fig
