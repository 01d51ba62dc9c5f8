"""Make slides from the notebooks: ``python site/slides.py --out build/slides`` (``make slides``).

A section of a notebook becomes one slide with its heading, its first paragraph and its equations,
and one slide for every picture, with the sentence that follows it. Code is left out. The other
text of the section is in the speaker's notes (press S). Nothing is run: text and pictures are those
of the committed notebooks.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import SlidesExporter

ROOT = Path(__file__).parent.resolve().parent
SESSIONS = {
    "1_what_a_token_tells": (
        "01_verbosity_and_grpo", "02_conditional_mutual_information", "03_early_exit",
        "04_when_the_estimate_lies",
    ),
    "2_what_it_is_worth": (
        "04b_better_estimates", "05_the_advantage_term_by_term", "06_why_length_falls",
        "08_the_full_comparison",
    ),
}  # fmt: skip
"""Session -> its notebooks, in order."""
LAST = re.compile(r"Exercises|Where to go from here")
"""Headings after which a notebook has nothing for slides."""
LONGEST = 420
"""Largest number of characters of text on a slide; longer paragraphs end after a sentence."""
_EQUATION = re.compile(r"\$\$.*?\$\$", re.DOTALL)
_SENTENCE = re.compile(r"(?:(?<=[.!?:])|(?<=[.!?]\)))\s+(?=[A-Z(*`$])")


def shortened(text: str, longest: int = LONGEST) -> str:
    """The first sentences that fit into ``longest`` characters, at least one.

    It never ends within brackets or within bold text.
    """
    kept = whole = ""
    for sentence in _SENTENCE.split(text.strip()):
        kept = f"{kept} {sentence}".strip()
        if whole and len(kept) > longest:
            break
        if kept.count("(") == kept.count(")") and kept.count("**") % 2 == 0:
            whole = kept
    return re.sub(r":$", ".", whole or kept)


def pieces(text: str) -> list[str]:
    """Parts of a Markdown text, each of which begins with a heading or is before the first one."""
    return [part for part in re.split(r"^(?=#{1,3} )", text, flags=re.MULTILINE) if part.strip()]


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a Markdown text that are plain text: no lists, tables, equations or HTML."""
    parts = [part.strip() for part in _EQUATION.sub("\n\n", text).split("\n\n")]
    return [part for part in parts if part and not re.match(r"[#|<\-*>`!\[]|\d+\.", part)]


def _slide(text: str, kind: str) -> Any:
    return nbformat.v4.new_markdown_cell(text, metadata={"slideshow": {"slide_type": kind}})


def _pictures(cell: Any) -> list[Any]:
    """The outputs of a code cell that are pictures, as HTML with an alt text where there is one."""
    found = []
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        page = "".join(data.get("text/html", ""))
        kept = {"text/html": page} if "<img" in page or "<svg" in page else {}
        if not kept and "image/png" in data:
            kept = {"image/png": data["image/png"]}
        if kept:
            found.append(nbformat.v4.new_output("display_data", data=kept))
    return found


def slides_of(notebook: Any) -> Iterator[Any]:
    """Cells of the slides that are made from a notebook."""
    cells = list(notebook.cells)
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            for piece in pieces(cell.source):
                heading, _, rest = piece.partition("\n")
                titled = heading.startswith("#")
                if titled and LAST.search(heading):
                    return
                if titled:
                    plain = paragraphs(rest)
                    first = shortened(plain[0]) if plain else ""
                    equation = _EQUATION.findall(rest)[:1]
                    kind = "slide" if re.match(r"##? ", heading) else "subslide"
                    yield _slide("\n\n".join([heading, *filter(None, [first]), *equation]), kind)
                yield _slide(piece.strip(), "notes")
            continue
        pictures = _pictures(cell)
        if not pictures:
            continue
        shown = nbformat.v4.new_code_cell(
            outputs=pictures, metadata={"slideshow": {"slide_type": "subslide"}}
        )
        yield shown
        after = cells[number + 1] if number + 1 < len(cells) else None
        if after is not None and after.cell_type == "markdown" and not after.source.startswith("#"):
            told = paragraphs(after.source)
            if told:
                yield _slide(shortened(told[0], LONGEST // 2), "-")


def deck(session: str) -> Any:
    """The notebook of a session's slides."""
    cells = []
    for name in SESSIONS[session]:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        cells += slides_of(nbformat.read(path, as_version=4))
    return nbformat.v4.new_notebook(
        cells=cells, metadata={"title": f"iapo-mini, session {session[0]}"}
    )


def build(out: Path) -> list[Path]:
    """Write one page of slides per session; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    exporter = SlidesExporter(exclude_input=True, exclude_input_prompt=True,
                              exclude_output_prompt=True)  # fmt: skip
    made = []
    for session in SESSIONS:
        page, _ = exporter.from_notebook_node(deck(session))
        made.append(out / f"{session}.html")
        made[-1].write_text(page, encoding="utf-8", newline="\n")
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make slides from the committed notebooks.")
    parser.add_argument("--out", default="build/slides", help="folder to write (%(default)s)")
    for path in build(Path(parser.parse_args().out)):
        print(path)


if __name__ == "__main__":
    main()
