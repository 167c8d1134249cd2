"""The documentation: ``make docs`` builds it into build/docs. The page of an op is its docstring."""

import re
from functools import partial
from html import escape
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.logging import getLogger

import ppo_kernels

HERE = Path(__file__).parent

project = "ppo_kernels"
version = release = ppo_kernels.__version__
copyright = "the authors of ppo_kernels"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_math_renderer = "mathml"
myst_heading_anchors = 3
autodoc_typehints = "none"  # the docstrings say it better
html_theme = "furo"
html_title = f"ppo_kernels {release}"
exclude_patterns = ["requirements.txt"]


def write_op_pages() -> None:
    """A page for each public name, of which none is listed by hand."""
    folder = HERE / "ops"
    folder.mkdir(exist_ok=True)
    pages = {}
    for name in ppo_kernels.__all__:
        kind = "autoclass" if isinstance(getattr(ppo_kernels, name), type) else "autofunction"
        pages[f"{name}.rst"] = f"{name}\n{'=' * len(name)}\n\n.. {kind}:: ppo_kernels.{name}\n"
    for old in {page.name for page in folder.glob("*.rst")} - set(pages):
        (folder / old).unlink()
    for page, text in pages.items():
        (folder / page).write_text(text)


write_op_pages()


def one_error_per_line(_app, _what, _name, _object, _options, lines: list[str]) -> None:
    """The docstrings say what is raised in a paragraph; the page has it as a list."""
    text = "\n".join(lines)
    lines[:] = re.sub(r"(?<=\S)\s+((?:Value|Type|Runtime)Error: )", r"\n    \1", text).split("\n")


def visit_formula(self, node, *, block: bool) -> None:
    """As MathML, which browsers show without a script from the network."""
    try:
        formula = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        getLogger(__name__).warning("this formula has no MathML: %s", error, location=node)
        formula = escape(node.astext())
    self.body.append(f'<div style="overflow: auto hidden">{formula}</div>' if block else formula)
    raise SkipNode


def setup(app) -> None:
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(partial(visit_formula, block=False), None),
        block_renderers=(partial(visit_formula, block=True), None),
    )
    app.connect("autodoc-process-docstring", one_error_per_line, priority=400)  # before napoleon reads it
