"""What all diagrams are drawn with: boxes, rows of tokens, arrows and braces, in one style.

Positions and sizes are in inches from the lower left corner, sizes of text in points. Every
distinction made by colour is also made by a hatch, a word or a place, for print in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, QUIET, PAPER = "#1a1a1a", "#5f5f5f", "#f1f1f1"
BLUE, ORANGE, GREEN, YELLOW = "#cfe3f3", "#f9d9bf", "#cdeadf", "#fdf3c4"
"""Fills, light enough for black text: blue is what the policy writes or gains, orange what is
wrong or removed, green what is right, yellow what is added to ask for an answer."""
DEEP_BLUE, DEEP_ORANGE, DEEP_GREEN = "#0072B2", "#C04E00", "#00664B"
"""The same for lines and bars."""
SIZE, SMALL = 10, 9


def canvas(width: float, height: float, alt: str) -> tuple[Figure, Axes]:
    """An empty figure whose data coordinates are inches, with its alt text as its label."""
    fig = Figure(figsize=(width, height))
    fig.set_label(alt)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    ax.axis("off")
    return fig, ax


def panels(width: float, height: float, count: int, alt: str, **options: Any) -> tuple:
    """A figure with ``count`` plots side by side and its alt text; ``(figure, plots)``."""
    fig = Figure(figsize=(width, height), layout="constrained")
    fig.set_label(alt)
    axes = fig.subplots(1, count, squeeze=False, **options)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=SMALL)
    return fig, axes


def write(ax: Axes, x: float, y: float, text: str, size: float = SIZE, **style: Any) -> None:
    """Text with its centre at a point, unless ``ha`` or ``va`` say otherwise."""
    usual: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "fontsize": size}
    ax.text(x, y, text, **(usual | style))


def box(
    ax: Axes, place: tuple[float, float, float, float], text: str = "", color: str = PAPER,
    size: float = SIZE, **style: Any,
) -> None:  # fmt: skip
    """A rounded box at ``place`` (left, bottom, width, height) with text in its middle."""
    x, y, width, height = place
    look: dict[str, Any] = {"ec": INK, "lw": 1.0, "fc": color} | style
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.06", **look)
    ax.add_patch(shape)
    if text:
        write(ax, x + width / 2, y + height / 2, text, size)


def cell(
    ax: Axes, place: tuple[float, float, float, float], text: str = "", color: str = PAPER,
    size: float = SMALL, **style: Any,
) -> None:  # fmt: skip
    """A sharp rectangle, the sign of a token or of a number in a matrix."""
    x, y, width, height = place
    ink = style.pop("ink", INK)
    look: dict[str, Any] = {"ec": INK, "lw": 0.8, "fc": color} | style
    ax.add_patch(Rectangle((x, y), width, height, **look))
    if text:
        write(ax, x + width / 2, y + height / 2, text, size, color=ink)


def row(
    ax: Axes, x: float, y: float, words: Sequence[str], colors: Sequence[str] | str = BLUE,
    **style: Any,
) -> list[tuple[float, float]]:  # fmt: skip
    """Tokens in a row from ``x`` on, each as wide as its text; returns their left and right ends.

    Args:
        style: ``height`` and ``size`` of a token, ``width`` to make all equally wide, and the
            properties of :func:`cell`.
    """
    height, size = style.pop("height", 0.3), style.pop("size", SMALL)
    width = style.pop("width", None)
    fills = [colors] * len(words) if isinstance(colors, str) else list(colors)
    ends = []
    for word, color in zip(words, fills):
        wide = width or 0.0092 * size * max(len(word), 1) + 0.12
        cell(ax, (x, y, wide, height), word, color, size, **style)
        ends.append((x, x + wide))
        x += wide
    return ends


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, **style: Any
) -> None:
    """An arrow; ``bend`` above 0 curves it to the right of its way."""
    usual: dict[str, Any] = {"color": INK, "lw": 1.2, "arrowstyle": "-|>", "mutation_scale": 11}
    shape = FancyArrowPatch(
        start, end, connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0, **(usual | style)
    )
    ax.add_patch(shape)


def brace(
    ax: Axes, ends: tuple[float, float], y: float, text: str, below: bool = True, **style: Any
) -> None:
    """A square bracket over or under a span, with its name."""
    left, right = ends[0] + 0.03, ends[1] - 0.03
    tip = 0.08 if below else -0.08
    ax.plot([left, left, right, right], [y + tip, y, y, y + tip], color=INK, lw=1)
    va = "top" if below else "bottom"
    write(ax, (left + right) / 2, y - 0.06 if below else y + 0.06, text, va=va, **style)


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, the minus as it is printed."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
