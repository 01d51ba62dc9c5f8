"""Sphinx's settings; ``build.py`` lays the sources out and calls it."""

import re

import iapo_mini

project = "iapo-mini"
author = "the authors of iapo-mini"
release = iapo_mini.__version__
root_doc = "index"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
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
napoleon_use_ivar = True
python_maximum_signature_line_length = 90

html_context = {"default_mode": "auto"}
html_theme = "pydata_sphinx_theme"
html_title = "iapo-mini"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
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


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _read, priority=400)
