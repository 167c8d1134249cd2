"""The documentation: ``make docs`` builds it into build/docs. The page of an op is its docstring."""

import re
from pathlib import Path

import ppo_kernels

HERE = Path(__file__).parent

project = "ppo_kernels"
version = release = ppo_kernels.__version__
copyright = "the authors of ppo_kernels"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
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


def setup(app) -> None:
    app.connect("autodoc-process-docstring", one_error_per_line, priority=400)  # before napoleon reads it
