"""Figures with an alt text, for readers who listen to a notebook or read it as text.

``show_alt_texts()`` in the first cell of a notebook is enough. From then on every matplotlib figure
is shown as an HTML image with an ``alt`` attribute, which JupyterLab, Colab, nbconvert and Sphinx
keep, and as a PNG for all others. The text is the figure's label (``figure.set_label(...)``) or, if
it has none, is written by :func:`alt_text` from what is drawn.
"""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

DPI = 150
"""Dots per inch of the images."""


def _number(value: float) -> str:
    return f"{value:.3g}"


def _plain(text: str) -> str:
    """A label without line breaks and signs of mathematics."""
    return " ".join(text.replace("$", "").replace("\\", "").split())


def _series(x: np.ndarray, y: np.ndarray) -> str:
    """Ends and range of a curve: from where to where, lowest and highest."""
    if len(y) == 1:
        return f"{_number(y[0])} at {_number(x[0])}"
    told = f"from {_number(y[0])} at {_number(x[0])} to {_number(y[-1])} at {_number(x[-1])}"
    if y.min() < min(y[0], y[-1]):
        told += f", lowest {_number(y.min())} at {_number(x[y.argmin()])}"
    if y.max() > max(y[0], y[-1]):
        told += f", highest {_number(y.max())} at {_number(x[y.argmax()])}"
    return told


def _name(artist: Any, kind: str) -> str:
    label = str(artist.get_label() or "")
    return kind if not label or label.startswith("_") else f"{kind} '{_plain(label)}'"


def _lines(ax: Axes) -> list[str]:
    found = []
    for line in ax.lines:
        try:
            x, y = (np.ma.filled(np.asarray(d, dtype=float), np.nan) for d in line.get_data())
        except (TypeError, ValueError):  # names or dates instead of numbers
            continue
        real = np.isfinite(x) & np.isfinite(y)
        # Straight lines across the plot, caps of error bars and the like say nothing by themselves.
        named = not str(line.get_label() or "_").startswith("_")
        if real.any() and (named or real.sum() > 4):
            found.append(f"{_name(line, 'line')} {_series(x[real], y[real])}")
    return found


def _bars(ax: Axes) -> list[str]:
    found: list[str] = []
    single: list[float] = []  # bars that were drawn one by one, without names
    for bars in ax.containers:
        if not isinstance(bars, BarContainer) or not len(bars):
            continue
        across = bars.orientation == "horizontal"
        sizes = np.array([b.get_width() if across else b.get_height() for b in bars], dtype=float)
        if len(sizes) == 1 and str(bars.get_label()).startswith("_"):
            single.append(float(sizes[0]))
            continue
        if np.isnan(sizes).all():
            told = f"{len(sizes)} without a value"
        elif len(sizes) > 12:
            places = np.array([b.get_y() if across else b.get_x() for b in bars], dtype=float)
            top = int(np.nanargmax(sizes))
            told = (
                f"{len(sizes)} from {_number(np.nanmin(sizes))} to {_number(sizes[top])}, "
                f"largest at {_number(places[top])}"
            )
        else:
            told = ", ".join(map(_number, sizes))
        found.append(f"{_name(bars, 'bars')}: {told}")
    return found + ([f"bars: {', '.join(map(_number, single))}"] if single else [])


def _intervals(ax: Axes) -> list[str]:
    """Points with error bars; a bare error bar on something else is not told."""
    found = []
    for group in ax.containers:
        if isinstance(group, ErrorbarContainer) and group[0] is not None:
            x, y = (np.asarray(d, dtype=float) for d in group[0].get_data())
            real = np.isfinite(x) & np.isfinite(y)
            x, y = x[real], y[real]
            if len(x):
                found.append(f"{_name(group, 'points with intervals')} {_series(x, y)}")
    return found


def _points(ax: Axes) -> list[str]:
    found = []
    for cloud in ax.collections:
        if not isinstance(cloud, PathCollection):
            continue
        at: np.ndarray = np.asarray(np.ma.filled(np.ma.asarray(cloud.get_offsets(), float), np.nan))
        at = at[np.isfinite(at).all(1)]
        if len(at):
            (x0, y0), (x1, y1) = at.min(0), at.max(0)
            told = f"{len(at)}, x {_number(x0)} to {_number(x1)}, y {_number(y0)} to {_number(y1)}"
            if len(at) > 4 and x1 > x0 and y1 > y0:
                told += f", correlation {np.corrcoef(at.T)[0, 1]:+.2f}"
            found.append(f"{_name(cloud, 'points')}: {told}")
    return found


def _names(axis: Any) -> str:
    """The words at the ticks of an axis, if they are words."""
    words = [_plain(tick.get_text()) for tick in axis.get_ticklabels()]
    words = [w.removeprefix("mathdefault{") for w in words if w]  # powers on a log scale
    is_words = words and not any(w.lstrip("+-\N{MINUS SIGN}")[:1].isdigit() for w in words)
    return f" ({', '.join(words[:20])}{', ...' if len(words) > 20 else ''})" if is_words else ""


def _axes(ax: Axes) -> str:
    """One plot in words, empty if there is nothing in it."""
    parts = []
    if ax.get_title() or ax.get_title(loc="left"):
        parts.append(_plain(ax.get_title() or ax.get_title(loc="left")))
    for name, axis, (low, high) in (("x", ax.xaxis, ax.get_xlim()), ("y", ax.yaxis, ax.get_ylim())):
        label, words = _plain(axis.get_label_text()), _names(axis)
        if ax.axison and (label or words):
            ends = f", {_number(low)} to {_number(high)}"
            parts.append(f"{name}: {(label + (words or ends)).strip()}")
    drawn = _lines(ax) + _bars(ax) + _intervals(ax) + _points(ax)
    sizes = (image.get_size() for image in ax.images)
    drawn += [f"map of {' by '.join(map(str, size))} cells" for size in sizes]
    return "; ".join(parts + drawn[:12])


def alt_text(figure: Figure) -> str:
    """What a figure shows: its label, or its axes and series with their ends and extremes."""
    label = str(figure.get_label() or "")
    # pyplot numbers its windows in the label.
    if label and not label.startswith("Figure "):
        return label
    plots = [told for told in map(_axes, figure.axes) if told]
    count = f"Figure with {len(plots)} plots. " if len(plots) > 1 else "Plot. "
    return count + " ".join(f"{told}." for told in plots)


def png(figure: Figure) -> bytes:
    """The figure at 150 dots per inch, with a palette of 256 colours to keep notebooks small."""
    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight")
    image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(out, "png", optimize=True)
    return out.getvalue()


def mimebundle(figure: Figure, **_: Any) -> dict[str, str]:
    """What a notebook keeps of a figure: the HTML image with its alt text, and the PNG alone."""
    data = png(figure)
    # Bytes 16 to 19 of a PNG are its width; a page has 100 pixels to the inch.
    width = round(100 / DPI * int.from_bytes(data[16:20], "big"))
    image = base64.b64encode(data).decode()
    shown = (
        f'<img alt="{html.escape(alt_text(figure))}" width="{width}" style="max-width: 100%" '
        f'src="data:image/png;base64,{image}">'
    )
    return {"image/png": image, "text/html": shown}


def show_alt_texts() -> None:
    """Show every figure of this notebook with its alt text; does nothing outside a notebook."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None:
        return
    formatter = shell.display_formatter
    # The inline backend's own PNG would come before ours.
    formatter.formatters["image/png"].pop(Figure, None)
    formatter.mimebundle_formatter.for_type(Figure, mimebundle)
