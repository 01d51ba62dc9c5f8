"""Slides made from the committed notebooks."""

import re
from pathlib import Path

import nbformat
import pytest
from helpers import load_script

ROOT = Path(__file__).parent.parent
pytest.importorskip("nbconvert")
slides = load_script(ROOT / "site" / "slides.py")
PNG = "iVBORw0KGgo="


def notebook(*cells):
    made = {"m": nbformat.v4.new_markdown_cell, "c": nbformat.v4.new_code_cell}
    return nbformat.v4.new_notebook(cells=[made[kind](text) for kind, text in cells])


def kinds(cells):
    return [cell.metadata.slideshow.slide_type for cell in cells]


def test_a_section_is_a_slide_and_its_text_is_in_the_notes():
    book = notebook(
        ("m", "# One\n\nFirst sentence. Second.\n\nMore.\n\n$$ a = b $$"), ("c", "x = 1"),
        ("m", "Only for the notes."), ("m", "## Exercises\n\nNone."), ("m", "## Never shown"),
    )  # fmt: skip
    found = list(slides.slides_of(book))
    assert kinds(found) == ["slide", "notes", "notes"]
    assert found[0].source == "# One\n\nFirst sentence. Second.\n\n$$ a = b $$"
    assert found[1].source.endswith("$$ a = b $$") and found[2].source == "Only for the notes."


def test_a_heading_within_a_cell_begins_a_slide_or_ends_the_notebook():
    book = notebook(("m", "# One\n\nA.\n\n## Two\n\nB."), ("m", "C.\n\n## Exercises\n\nNone."))
    found = list(slides.slides_of(book))
    assert kinds(found) == ["slide", "notes", "slide", "notes", "notes"]
    assert [cell.source for cell in found[2:]] == ["## Two\n\nB.", "## Two\n\nB.", "C."]


def test_a_picture_is_a_slide_with_the_sentence_behind_it():
    book = notebook(("m", "## A"), ("c", "plot()"), ("m", "See the dip. It is real.\n\nMore."))
    html = {"text/html": '<img alt="a dip" src="x">', "image/png": PNG, "text/plain": "Figure"}
    book.cells[1].outputs = [
        nbformat.v4.new_output("stream", text="printed"),
        nbformat.v4.new_output("display_data", data=html),
        nbformat.v4.new_output("display_data", data={"image/png": PNG}),
        nbformat.v4.new_output("execute_result", data={"text/plain": "7"}, execution_count=1),
    ]
    found = list(slides.slides_of(book))
    assert kinds(found) == ["slide", "notes", "subslide", "-", "notes"]
    assert [list(output.data) for output in found[2].outputs] == [["text/html"], ["image/png"]]
    assert found[3].source == "See the dip. It is real."


@pytest.mark.parametrize(
    ("text", "longest", "expected"),
    [
        ("One. Two. Three.", 9, "One. Two."),
        ("A very long first sentence. Two.", 5, "A very long first sentence."),
        ("About 0.5 nats. More.", 15, "About 0.5 nats."),
        ("Now by hand: 3 + 4", 99, "Now by hand: 3 + 4"),
        ("By hand:", 99, "By hand."),
        ("(One. Two.) Three.", 4, "(One. Two.)"),
        ("Look. **Bold one. Bold two.** End.", 12, "Look."),
    ],
)
def test_long_paragraphs_end_after_a_sentence(text, longest, expected):
    assert slides.shortened(text, longest) == expected


@pytest.mark.parametrize("session", slides.SESSIONS)
def test_the_committed_notebooks_make_slides_that_fit(session):
    cells = slides.deck(session).cells
    shown = [cell for cell in cells if cell.metadata.slideshow.slide_type != "notes"]
    texts = [cell.source for cell in shown if cell.cell_type == "markdown"]
    assert len(shown) >= 30 and sum(cell.cell_type == "code" for cell in shown) >= 12
    assert sum(text.startswith("# ") for text in texts) == len(slides.SESSIONS[session])
    assert not any(re.search(r"Exercise|Open in Colab|pip install", text) for text in texts)
    assert max(len(re.sub(r"\$\$.*?\$\$", "", t, flags=re.DOTALL)) for t in texts) < 700
    assert all(cell.source == "" for cell in shown if cell.cell_type == "code")


def test_the_pages_are_written(tmp_path):
    for path in slides.build(tmp_path / "deck"):
        page = path.read_text(encoding="utf-8")
        assert page.count("<section>") > 30 and '<aside class="notes">' in page
        assert "In [" not in page
