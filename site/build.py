"""Build the site: ``python site/build.py --out build/site`` (``make site``).

Documents, figures and notebooks are taken as they are committed, outputs included; nothing is run.
They are copied to a folder of sources in which links are made to fit the site: a link to a page of
the site stays inside, one to a module leads to its API page, one to any other file to the
repository. Sphinx then builds the site, and every warning (a dead link is one) is an error.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

SITE = Path(__file__).parent.resolve()
ROOT = SITE.parent
with (ROOT / "pyproject.toml").open("rb") as file:
    REPOSITORY = tomllib.load(file)["project"]["urls"]["Repository"]
_RAW = REPOSITORY.replace("://github.com", "://raw.githubusercontent.com")
_ON_MAIN = re.compile(rf"(?:{REPOSITORY}/(?:blob|tree|raw)|{_RAW})/main/(.+)")
GROUPS = {
    "iapo_mini": "The method",
    "iapo_mini.problems": "Problems",
    "iapo_mini.early_exit": "Early exit",
    "iapo_mini.engines": "Engines",
    "iapo_mini.tools": "Tools",
    "iapo_mini.exercises": "Cases of the exercises",
    "iapo_mini.diagrams": "Diagrams",
    "iapo_mini.policies": "Shipped policies",
    "iapo_mini.lab": "Laboratory",
    "iapo_mini.lab.figures": "Figures of the laboratory",
}
"""Packages and the headings of their modules on the API page; others stand below their own name."""


def modules() -> dict[str, Path]:
    """Every public module of the library and its file."""
    found = {}
    for path in sorted((ROOT / "iapo_mini").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts[-1].startswith("_"):
            found[".".join(parts)] = path
    return found


def pages() -> dict[str, str]:
    """File of the repository, relative to its root -> page of the site that is made from it."""
    texts = [*ROOT.glob("docs/*.md"), *ROOT.glob("figures/*.md"), *ROOT.glob("*.md")]
    notebooks = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/solutions/*.ipynb")]
    taken = [*texts, *notebooks, ROOT / "notebooks" / "README.md"]
    found = {path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix() for path in taken}
    found |= {"notebooks/solutions": "course.md", "notebooks": "course.md", "docs": "docs.md"}
    for module, path in modules().items():
        found[path.relative_to(ROOT).as_posix()] = f"api/{module}.rst"
        if path.name == "__init__.py":
            found[path.parent.relative_to(ROOT).as_posix()] = f"api/{module}.rst"
    return found


def turn(target: str, page: str, known: dict[str, str]) -> str:
    """Where a link of a page leads on the site.

    Args:
        target: of the link, as written; a file of the repository may be relative to the page or
            an address on the repository's main branch.
        page: the file it stands in, relative to the root of the repository.
        known: :func:`pages`.
    """
    path, mark, anchor = target.partition("#")
    on_main = _ON_MAIN.match(path)
    if on_main:
        file = on_main[1].rstrip("/")
    elif not path or re.match(r"[a-z]+:", path):
        return target
    else:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    here = posixpath.dirname(page)
    if file in known:
        return posixpath.relpath(known[file], here) + mark + anchor
    if file.startswith("figures/") and file.endswith(".png"):
        return posixpath.relpath(file, here)
    kind = "tree" if (ROOT / file).is_dir() else "blob"
    return f"{REPOSITORY}/{kind}/main/{file}{mark}{anchor}"


def turn_links(text: str, page: str, known: dict[str, str]) -> str:
    """A page's Markdown with every link and picture turned; code is left alone.

    A badge becomes a plain link, so that the site loads nothing from elsewhere.
    """
    text = re.sub(r"\[!\[([^\]]*)\]\(https?:[^)]*\)\]\(", r"[\1](", text)

    def link(match: re.Match) -> str:
        return f"{match[1]}({turn(match[2], page, known)})" if match[1] else match[0]

    # What is read as code first is not taken for a link.
    return re.sub(r"(?s)```.*?```|`[^`\n]+`|(\])\(([^)\s]+)\)", link, text)


def _write(path: Path, text: str) -> None:
    """Write what has changed only: Sphinx then reads it anew and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _notebook(text: str, page: str, known: dict[str, str]) -> str:
    """A notebook for the site: links turned, and the explorer's page in place of its widgets."""
    notebook = json.loads(text)
    explorer = posixpath.relpath("explorer.html", posixpath.dirname(page))
    shown = f'<p>The explorer needs a kernel. <a href="{explorer}">Try one without it</a>.</p>'
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = turn_links("".join(cell["source"]), page, known)
        for output in cell.get("outputs", []):
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                output["data"] = {"text/html": shown, "text/plain": "explorer"}
    return json.dumps(notebook, ensure_ascii=False)


def _api(sources: Path) -> None:
    """One page for each module from its docstrings, and one that lists them."""
    groups: dict[str, list[str]] = {}
    found = modules()
    for name, path in found.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        groups.setdefault(package, []).append(name)
        _write(
            sources / f"api/{name}.rst",
            f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n"
            "   :member-order: bysource\n   :show-inheritance:\n"
            "   :ignore-module-all:\n",
        )
    text = ["# API", "Made from the docstrings. Every name links to its source.", ""]
    for package in sorted(groups, key=lambda p: (list(GROUPS).index(p) if p in GROUPS else 99, p)):
        heading = GROUPS.get(package, package)
        text += [f"## {heading}", "", "| module | holds |", "|---|---|"]
        for name in groups[package]:
            told = ast.get_docstring(ast.parse(found[name].read_text(encoding="utf-8"))) or ""
            # A docstring is reStructuredText, and this page is Markdown.
            first = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", told.partition("\n\n")[0])
            first = " ".join(first.replace("``", "`").replace("|", "\\|").split())
            text.append(f"| [{name}](api/{name}.rst) | {first} |")
        entries = "\n".join(f"api/{name}" for name in groups[package])
        text += ["", f"```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{entries}\n```", ""]
    _write(sources / "api.md", "\n".join(text))


def _static(sources: Path) -> None:
    """The explorer with its numbers, and MathJax, so that the site needs no other server."""
    static = sources / "_static"
    shutil.copytree(SITE / "static", static, dirs_exist_ok=True)
    # A script, not JSON: a page that is opened as a file may not fetch another file.
    scenes = (SITE / "static/explorer.json").read_text(encoding="utf-8").strip()
    _write(static / "explorer_data.js", f"window.EXPLORER = {scenes};\n")
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if found is None or found.origin is None:
        sys.exit("site/build.py needs the tools of the site: pip install -e '.[site]'")
    # It draws with paths, so that no font has to be loaded.
    shutil.copy(Path(found.origin).parent / "static/mathjax/tex-svg.js", static / "mathjax.js")


def gather(sources: Path) -> None:
    """Write the folder of sources; what has no file any more is removed."""
    known = pages()
    kept = set()
    for file in {page for page in known.values() if not page.startswith("api/")} & set(known):
        text = (ROOT / file).read_text(encoding="utf-8")
        turned = _notebook if file.endswith(".ipynb") else turn_links
        _write(sources / file, turned(text, file, known))
        kept.add(file)
    for path in SITE.glob("*.md"):
        _write(sources / path.name, turn_links(path.read_text(encoding="utf-8"), path.name, known))
        kept.add(path.name)
    shutil.copytree(ROOT / "figures", sources / "figures", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("results", "*.md"))  # fmt: skip
    shutil.copy(SITE / "conf.py", sources)
    _api(sources)
    kept |= {"api.md", *(f"api/{name}.rst" for name in modules())}
    for path in [*sources.rglob("*.md"), *sources.rglob("*.rst"), *sources.rglob("*.ipynb")]:
        if path.relative_to(sources).as_posix() not in kept:
            path.unlink()
    _static(sources)


def build(out: Path) -> int:
    """Build the site into a folder; returns Sphinx's exit status, 0 if nothing was wrong."""
    sources = out.parent / f"{out.name}-sources"
    gather(sources)
    command = [sys.executable, "-m", "sphinx", "-W", "-q"]
    command += ["-d", str(out.parent / f"{out.name}-doctrees")]
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [*command, str(sources), str(out)], env=os.environ | {"PYTHONPATH": places}
    ).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    folder = parser.parse_args().out.resolve()
    status = build(folder)
    if status == 0:
        print(f"open {folder / 'index.html'}")
    sys.exit(status)
