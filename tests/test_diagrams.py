"""Diagrams and alt texts: everything drawn can be read, heard and told apart."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from iapo_mini import diagrams, plots
from iapo_mini.advantages import normalize
from iapo_mini.alt_text import alt_text, mimebundle
from iapo_mini.diagrams import information, learning, weights
from iapo_mini.early_exit.prefixes import branch_inputs
from iapo_mini.objective import clipped_surrogate
from iapo_mini.plots import COLORS, MARKERS, STYLES

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("**/[0-9]*.ipynb"))


def hidden(figure):
    """Labels of ticks that lie outside the axes, which matplotlib keeps but does not draw."""
    found = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            outside = [t for t in ticks if not low - 1e-9 <= t.get_loc() <= high + 1e-9]
            unseen = ticks if not ax.axison else outside
            found |= {id(label) for t in unseen for label in (t.label1, t.label2)}
    return found


def texts(figure):
    """(text, its box in pixels) of everything that is written in a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    unseen = hidden(figure)
    return [
        (t, t.get_window_extent(canvas.get_renderer()))
        for t in figure.findobj(Text)
        if t.get_visible() and t.get_text().strip() and id(t) not in unseen
    ]


def overlap(a, b):
    return a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1


@pytest.mark.parametrize("diagram", diagrams.DIAGRAMS, ids=lambda d: d.__name__)
def test_diagram_is_clean_and_has_an_alt_text(diagram):
    figure = diagram()
    assert isinstance(figure, Figure)
    told = alt_text(figure)
    assert 300 <= len(told) <= 900 and told.endswith(".") and "$" not in told
    written = texts(figure)
    assert min(t.get_fontsize() for t, _ in written) >= 8
    for i, (text, box) in enumerate(written):
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1, text
        for other, place in written[:i]:
            assert not overlap(box, place), (text.get_text(), other.get_text())


def test_an_overlap_of_texts_would_be_found():
    figure = Figure()
    for word in ("one", "other"):
        figure.text(0.5, 0.5, word)
    (_, a), (_, b) = texts(figure)
    assert overlap(a, b)


def test_every_diagram_stands_in_a_notebook():
    text = "".join(p.read_text(encoding="utf-8") for p in NOTEBOOKS)
    missing = [d.__name__ for d in diagrams.DIAGRAMS if f"diagrams.{d.__name__}()" not in text]
    assert missing == []


def test_numbers_of_the_diagrams_are_the_library_s():
    rewards = torch.tensor(learning.REWARDS)
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    found = torch.tensor([learning.norm(learning.REWARDS)])
    assert torch.allclose(found, normalize(rewards[None], everywhere), atol=1e-3)
    for ratio, advantage in ((1.1, 0.83), (1.5, 0.83), (0.5, -1.17), (1.5, -1.17)):
        log, zero = torch.tensor([ratio]).log(), torch.zeros(1)
        library, _ = clipped_surrogate(log, zero, torch.tensor([advantage]))
        assert learning.clipped(ratio, advantage) == pytest.approx(float(library[0]), abs=1e-6)


def test_packed_branches_are_those_of_the_estimator():
    prompt, length, ends, postfix = 2, 4, (1, 3, 4), 2
    trunk = torch.ones(1, prompt + length, dtype=torch.bool)
    positions = torch.arange(prompt + length)[None]
    after = torch.tensor([[prompt - 1 + t for t in ends]])
    inputs = branch_inputs(trunk, positions, after, torch.tensor([7, 8]))
    mask = information.packed_mask(prompt, length, ends, postfix)
    assert torch.equal(torch.tensor(mask), inputs["attention_mask"][0, 0].bool())
    found = information.packed_positions(prompt, ends, postfix)
    assert found == inputs["position_ids"][0].tolist()


def test_levels_of_four_bits_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    code = bnb.quantize_4bit(torch.ones(64), quant_type="nf4")[1].code
    assert weights.nf4_levels() == pytest.approx(code.tolist(), abs=1e-5)


def test_alt_text_of_a_plot_tells_axes_series_and_extremes():
    figure = Figure()
    ax = figure.subplots()
    ax.plot([1, 2, 3], [5.0, 2.0, 4.0], label="GRPO")
    ax.bar([0, 1], [1.5, 2.5], label="seeds")
    ax.scatter([0, 1], [3, 4])
    ax.set_xlabel("training step")
    ax.set_ylabel("$H$ (nats)")
    told = alt_text(figure)
    assert "x: training step" in told and "y: H (nats)" in told
    assert "line 'GRPO' from 5 at 1 to 4 at 3, lowest 2 at 2" in told
    assert "bars 'seeds': 1.5, 2.5" in told and "points: 2, x 0 to 1, y 3 to 4" in told


@pytest.mark.parametrize("bars", [1, 3, 13])
def test_alt_text_of_values_that_are_missing(bars):
    figure = Figure()
    ax = figure.subplots()
    ax.bar(range(bars), [np.nan] * bars, label="empty")
    ax.errorbar(range(bars), [np.nan] * bars, 1.0, label="nothing")
    told = alt_text(figure)
    assert f"bars 'empty': {bars} without a value" in told and "nothing" not in told


def test_alt_texts_of_the_plots_tell_their_numbers():
    told = alt_text(DRAWN["comparison"]())
    assert "mean length (tokens); x: (start policy, IAPO); bars: 30.5, 30.5" in told
    assert "IAPO: compute 9.0, hedge 3.0" in alt_text(DRAWN["role_composition"]())
    figure = Figure()
    figure.subplots().errorbar(4, 2, [[1], [1]], fmt="o", label="GRPO")
    assert "points with intervals 'GRPO' 2 at 4" in alt_text(figure)


def test_own_words_come_before_the_description():
    figure = Figure()
    figure.subplots().plot([1, 2])
    figure.set_label('Says "what" & why.')
    shown = mimebundle(figure)["text/html"]
    assert alt_text(figure) == 'Says "what" & why.'
    assert 'alt="Says &quot;what&quot; &amp; why."' in shown and shown.endswith(">")


def test_image_has_150_dots_per_inch():
    figure = Figure(figsize=(4, 2))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.plot([1, 2])
    ax.axis("off")
    bundle = mimebundle(figure)
    width = int(re.search(r'width="(\d+)"', bundle["text/html"])[1])
    assert width == 420  # four inches, and a margin of a tenth of an inch on either side


def figures_of(notebook):
    """(cell's text, output's data) of every picture that a notebook keeps."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield "".join(cell["source"]), output["data"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_picture_of_a_notebook_has_an_alt_text(notebook):
    pictures = list(figures_of(notebook))
    code = notebook.read_text(encoding="utf-8")
    assert not pictures or "show_alt_texts()" in code
    for source, data in pictures:
        alt = re.search(r'<img alt="([^"]*)"', "".join(data.get("text/html", "")))
        assert alt and len(alt[1]) >= 60, source


def test_pictures_of_the_documents_have_alt_texts():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for alt, file in re.findall(r"!\[([^\]]*)\]\((\S+)\)", page.read_text(encoding="utf-8")):
            badge = "shields.io" in file or "colab" in file
            assert badge or len(alt) >= 60, (page.name, file)


MACHADO = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
                   (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
                     (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
                   (0.004733, 0.691367, 0.303900)),
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
}  # fmt: skip
"""Machado, Oliveira and Fernandes (2009), full severity, on linear RGB."""


def cielab(color, blindness):
    """What a reader sees of a colour ``#rrggbb``, in CIELAB under D65."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(MACHADO[blindness]) @ linear, 0, 1)
    to_xyz = np.array(((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750),
                       (0.0193339, 0.1191920, 0.9503041)))  # fmt: skip
    t = to_xyz @ seen / to_xyz.sum(1)
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array((116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])))


METHODS = list(MARKERS)


@pytest.mark.parametrize("blindness", MACHADO)
def test_methods_are_told_apart_under_every_colour_blindness(blindness):
    assert {"iapo", "iapo_ne", "sgrpo"} <= set(METHODS) and len(METHODS) >= 16
    seen = {name: cielab(COLORS[name], blindness) for name in METHODS}
    close = {
        (a, b): float(np.linalg.norm(seen[a] - seen[b]))
        for a, b in itertools.combinations(METHODS, 2)
    }
    near = min(close, key=close.get)
    assert close[near] >= 15, (near, close[near])


@pytest.mark.parametrize("blindness", MACHADO)
def test_roles_are_told_apart_and_a_role_is_not_a_method(blindness):
    roles = [name for name in COLORS if name not in METHODS]
    assert {"compute", "restate", "conclude", "format"} <= set(roles)
    seen = {name: cielab(COLORS[name], blindness) for name in COLORS}
    for a, b in itertools.combinations(roles, 2):
        assert np.linalg.norm(seen[a] - seen[b]) >= 18, (a, b)
    for role, method in itertools.product(roles, METHODS):
        assert np.linalg.norm(seen[role] - seen[method]) >= 9, (role, method)


def test_cielab_is_that_of_the_definition():
    assert cielab("#ffffff", "none") == pytest.approx([100, 0, 0], abs=0.01)
    assert cielab("#ff0000", "none") == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    # Red and green of equal lightness are one colour for a deuteranope.
    red, green = cielab("#c05000", "deuteranopia"), cielab("#808000", "deuteranopia")
    assert np.linalg.norm(red - green) < 12
    assert np.linalg.norm(cielab("#c05000", "none") - cielab("#808000", "none")) > 40


def test_methods_differ_in_marker_or_line_too():
    assert STYLES.keys() == MARKERS.keys() and len(set(MARKERS.values())) == len(MARKERS)
    by_line = [STYLES[name] for name in ("start", "grpo", "iapo", "iapo_ne")]
    assert len(set(by_line)) == 4


WORDS = "So , Tom has 12 coins . Hmm , let me see . 12 + 5 = 17 .".split()
WORD_ROLES = ["restate"] * 7 + ["hedge"] * 6 + ["compute"] * 6
CURVES = {"iapo": [{"length": [3, 2], "accuracy": [0.5, 0.6], "entropy": [1.0, 0.9]}]}
BARS = {
    name: {"length": [30, 31], "pass@1": [0.7, 0.8], "pass@8": [1, 1], "ratio@8": [0.1, 0.2]}
    for name in ("start", "iapo")
}
GUESSES = torch.linspace(0, 1, 80).view(20, 4)
EXITS = {"confidence": GUESSES, "correct": GUESSES > 0.4, "entropy": 1 - GUESSES}
DRAWN = {
    "training_curves": lambda: plots.training_curves(CURVES),
    "comparison": lambda: plots.comparison(BARS),
    "role_composition": lambda: plots.role_composition({"iapo": {"compute": 9, "hedge": 3}}),
    "token_heatmap": lambda: plots.token_heatmap(
        [w + " " for w in WORDS], [0.1] * len(WORDS), WORD_ROLES, r"$\alpha = 0.4$"
    ),
    "reliability": lambda: plots.reliability({"embedded": EXITS}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_labels_of_plots_have_at_least_eight_points_and_an_alt_text(name):
    figure = DRAWN[name]()
    assert min(text.get_fontsize() for text, _ in texts(figure)) >= 8
    assert len(alt_text(figure)) >= 60 and "$" not in alt_text(figure)


def test_no_label_of_the_library_or_the_course_is_smaller_than_eight_points():
    files = [*(ROOT / "iapo_mini").rglob("*.py"), *NOTEBOOKS]
    small = re.compile(r"\b(?:font|label)size=([0-7](?:\.\d+)?)\b")
    found = [(f.name, m[0]) for f in files for m in small.finditer(f.read_text(encoding="utf-8"))]
    assert found == []


def test_no_value_of_a_heat_map_lies_beyond_its_scale():
    figure = plots.token_heatmap(["a", "b", "c"], [0.1, -0.4, 2.5])
    assert figure.axes[-1].get_xlim() == pytest.approx((-2.5, 2.5))


def test_heat_map_names_every_role_where_its_tokens_stand():
    figure = DRAWN["token_heatmap"]()
    written = [t for t, _ in texts(figure) if t.axes is figure.axes[0]]
    below = {t.get_text(): t.get_position()[0] for t in written if t.get_text() in WORD_ROLES}
    assert list(below) == ["restate", "hedge", "compute"]
    assert below["restate"] < below["hedge"] < below["compute"]
    assert "Hmm , let me see" in alt_text(figure) and alt_text(figure).startswith("alpha = 0.4.")
