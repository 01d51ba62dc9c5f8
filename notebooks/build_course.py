"""Build a static HTML of the whole course: ``python notebooks/build_course.py --out build/course``.

Notebooks are converted as committed, with their outputs; nothing is run. The syllabus becomes the
start page, and links between pages lead to their HTML.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

ROOT = Path(__file__).parent.parent
GITHUB = "https://github.com/iapo-mini/iapo-mini/blob/main/"
_PAGE = """<!doctype html><meta charset="utf-8"><title>iapo-mini: the course</title>
<style>body {{ font: 17px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
td, th {{ padding: 2px 10px; text-align: left; vertical-align: top }}
.anchor-link {{ display: none }}</style>
{body}"""


def turn_links(html: str, page: Path, pages: dict[Path, str], out: str) -> str:
    """Make links to other pages of the course lead to their HTML, and links to files to GitHub.

    Args:
        html: HTML of the page.
        page: file that the page was made from.
        pages: file -> path of its HTML, relative to the course's folder.
        out: path of this page's HTML, relative to the same folder.
    """

    def turn(match: re.Match) -> str:
        target, _, anchor = match[1].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        file = (page.parent / target).resolve()
        if file in pages:
            up = "../" * out.count("/")
            return f'href="{up}{pages[file]}{"#" + anchor if anchor else ""}"'
        inside = file.is_relative_to(ROOT.resolve())
        return f'href="{GITHUB}{file.relative_to(ROOT.resolve())}"' if inside else match[0]

    return re.sub(r'href="([^"]+)"', turn, html)


def build(out: Path) -> list[Path]:
    """Write the course to a folder and return the pages."""
    lessons = sorted((ROOT / "notebooks").glob("*.ipynb"))
    solutions = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
    syllabus = (ROOT / "docs" / "syllabus.md").resolve()
    pages = {path.resolve(): f"{path.stem}.html" for path in lessons}
    pages |= {path.resolve(): f"solutions/{path.stem}.html" for path in solutions}
    pages[syllabus] = "index.html"
    exporter, written = HTMLExporter(), []
    for path, name in pages.items():
        if path == syllabus:
            html = _PAGE.format(body=markdown2html(path.read_text()))
        else:
            html, _ = exporter.from_filename(str(path))
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(turn_links(html, path, pages, name))
        written.append(target)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "course")
    folder = parser.parse_args().out
    print(f"{len(build(folder))} pages; open {folder / 'index.html'}")
