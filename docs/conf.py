"""Sphinx: the pages of this folder, and a reference made from the docstrings.

pip install '.[docs]' && sphinx-build -W docs build/docs
"""

import io
import re
from contextlib import redirect_stdout
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import kimi_core
from kimi_core.cli.start import config

project = "kimi_core"
author = "the kimi_core authors"
version = release = kimi_core.__version__
html_title = f"kimi_core {version}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
myst_heading_anchors = 3
# The pages are read in the repository, too, and point to its files.
suppress_warnings = ["myst.xref_missing"]
autodoc_member_order = "bysource"
add_module_names = False


class Settings(SphinxDirective):
    """What ``kimi config`` prints."""

    def run(self) -> list[nodes.Node]:
        with redirect_stdout(io.StringIO()) as printed:
            config([])
        return [nodes.literal_block(printed.getvalue(), printed.getvalue(), language="none")]


def as_rst(_app: Sphinx, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """Our docstrings as reStructuredText: literals in one backtick, examples without a mark."""
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", "\n".join(lines))
    text = re.sub(r"\|(Δ[^|]*)\|", r"\|\1\|", text)
    text = re.sub(r"(^|\n)(\S[^\n]*)\n\n(?=    \S)", r"\1\2\n\n::\n\n", text)
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> None:
    app.add_directive("settings", Settings)
    app.connect("autodoc-process-docstring", as_rst, priority=100)  # Before napoleon's.
