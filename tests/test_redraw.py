"""Committed figures and the notebooks' diagrams are what today's code draws."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from iapo_mini import diagrams
from iapo_mini.alt_text import png
from iapo_mini.lab.redraw import redraw
from iapo_mini.plots import COLORS

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "figures"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("**/[0-9]*.ipynb"))
FROM_POLICIES = {"calibration", "estimator_calibration", "explain", "heat_maps"}
"""Figures that need more than their results file."""


def apart(one, other):
    """Share of the pixels of two images that differ clearly; 1 if their sizes differ."""
    a, b = (np.asarray(Image.open(path).convert("RGB"), dtype=int) for path in (one, other))
    return float((abs(a - b).max(-1) > 32).mean()) if a.shape == b.shape else 1.0


def test_committed_figures_are_drawn_by_todays_code(tmp_path):
    drawn = redraw(FIGURES, tmp_path)
    assert {p.stem for p in drawn} == {p.stem for p in FIGURES.glob("*.png")} - FROM_POLICIES
    old = {p.stem: apart(p, FIGURES / p.name) for p in drawn}
    # Fonts and processors move a few pixels; another colour or another number moves more.
    assert {stem: share for stem, share in old.items() if share > 0.005} == {}


def pictures(cell):
    """The images that a notebook's cell shows, as files."""
    shown = [output.get("data", {}).get("image/png") for output in cell.get("outputs", ())]
    return [io.BytesIO(base64.b64decode(image)) for image in shown if image]


SHOWN = {  # call in a cell -> names whose colours its picture must have
    "role_composition(": ("compute", "restate", "plan", "format"),
    "training_curves(": ("iapo", "grpo"),
    "token_heatmap(": ("compute", "format"),
}


def test_pictures_in_notebooks_have_todays_colours():
    """Their numbers are the reader's, so they can't be drawn again here; their colours can."""
    old, seen = [], set()
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            calls = [call for call in SHOWN if call in source and "def " not in source]
            shown = [Image.open(file).convert("RGB") for file in pictures(cell)] if calls else []
            if not shown:
                continue
            pixels = np.concatenate([np.asarray(image, int).reshape(-1, 3) for image in shown])
            for call in calls:
                colors = [255 * np.array(to_rgb(COLORS[name])) for name in SHOWN[call]]
                near = [(abs(pixels - color).max(1) < 9).any() for color in colors]
                wanted = any if call == "training_curves(" else all  # one method may stand alone
                old += [(path.name, call)] * (not wanted(near))
                seen.add(call)
    assert old == [] and seen == SHOWN.keys()


def test_diagrams_in_notebooks_are_drawn_by_todays_code():
    old, seen = [], 0
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            asked = re.fullmatch(r"diagrams\.(\w+)\(\)", "".join(cell["source"]).strip())
            if asked:
                (kept,) = pictures(cell)
                drawn = io.BytesIO(png(getattr(diagrams, asked[1])()))
                old += [(path.name, asked[1])] * (apart(kept, drawn) > 0.005)
                seen += 1
    assert old == [] and seen >= len(diagrams.DIAGRAMS)
