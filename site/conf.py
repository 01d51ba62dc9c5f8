"""Sphinx's settings; ``build.py`` lays the sources out and calls it."""

import importlib
import inspect
import re
import tomllib
from pathlib import Path

import iapo_mini

ROOT = Path(iapo_mini.__file__).parent.parent
with (ROOT / "pyproject.toml").open("rb") as file:
    REPOSITORY = tomllib.load(file)["project"]["urls"]["Repository"]

project = "iapo-mini"
author = "the authors of iapo-mini"
release = iapo_mini.__version__
root_doc = "index"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
]
# Exercises are third-level headings right below the title.
suppress_warnings = ["myst.header"]

# Notebooks as committed.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_dmath_allow_labels = False
mathjax_path = "mathjax.js"
mathjax3_config = {"svg": {"fontCache": "global"}}

autodoc_mock_imports = ["vllm", "trl", "bitsandbytes", "ipywidgets"]
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
# A line of ours may speak of several arguments, which the default takes for a type and a name.
napoleon_use_param = False
napoleon_custom_sections = [("Attributes", "params_style")]
highlight_language = "none"
python_maximum_signature_line_length = 90

html_context = {"default_mode": "auto"}
html_theme = "pydata_sphinx_theme"
html_title = "iapo-mini"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "github_url": REPOSITORY,
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "explorer": []}


def linkcode_resolve(domain, info):
    """Address of the lines in the repository that a name stands for."""
    module = importlib.import_module(info["module"])
    found = module
    try:
        for part in info["fullname"].split("."):
            found = getattr(found, part)
        # A property is its getter, and a decorated function what was decorated.
        found = inspect.unwrap(getattr(found, "fget", None) or found)
        lines, first = inspect.getsourcelines(found)
        file = Path(inspect.getsourcefile(found)).relative_to(ROOT).as_posix()
    except (AttributeError, TypeError, ValueError, OSError):  # a constant
        return None
    return f"{REPOSITORY}/blob/main/{file}#L{first}-L{first + len(lines) - 1}"


def _read(app, what, name, obj, options, lines):
    """Make reStructuredText of a docstring: bars are absolute values, and no substitutions; an
    indented block of a module's docstring (the layout of a file, an equation) is shown as it is.
    """
    out, shown = [], False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            shown = False
        above = next((x for x in reversed(out) if x.strip()), "")
        begins = indented and above and not out[-1].strip()
        if what == "module" and begins and not above.startswith((" ", "*", "-", "::")):
            out += ["::", ""]
            shown = True
        # What is code already stays as it is.
        parts = [line] if shown else re.split(r"(``[^`]*``)", line)
        code = ("``", "    ") if shown else ("``",)
        out.append("".join(p if p.startswith(code) else p.replace("|", "\\|") for p in parts))
    lines[:] = out


def _signature(app, what, name, obj, options, signature, returned):
    """A default that can't be parsed would leave the whole signature without links."""
    return (signature or "").replace("<factory>", "...") or None, returned


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _read, priority=400)
