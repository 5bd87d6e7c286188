"""Configures the documentation site: READMEs, pages, notebooks and docstrings, as they are.

    .venv/bin/pip install -e ".[docs]"
    .venv/bin/python -m sphinx -W -c docs -b html . build/site     # from a clone; build/site/index.html

The source folder is the root of the clone, so that links between READMEs lead where they do on GitHub.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from grpo_jax.version import __version__  # noqa: E402

project = "grpo_jax"
author = "The grpo_jax authors"
copyright = author
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "configs/README.md",
    "benchmarks/README.md",
    "grpo_jax/*/README.md",
    "notebooks/*.ipynb",
]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "models"]
html_theme = "furo"
html_title = f"grpo_jax {release}"
html_extra_path = ["site"]  # index.html leads to the start page
html_show_sourcelink = False

nb_execution_mode = "off"  # notebooks are stored as they ran; scripts/execute_notebooks.py runs them
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]  # the formulas of the notebooks
myst_dmath_allow_space = False
myst_dmath_allow_digits = False  # $18 is money

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "replace, from_tuple, to_tuple"}
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
smartquotes_action = "D"  # dashes alone: the text is full of names in quotes
default_role = "literal"  # docstrings write `code` with one backtick, as Markdown does

# Sections of a docstring that napoleon reads. Their indented text is no picture or table.
_SECTIONS = re.compile(r"(Args|Returns|Raises|Yields|Example|Examples|Attributes):$")
# Code, links and *emphasis* stay as they are.
_MARKUP = re.compile(r"(``.+?``|`[^`]+`|https?://[^\s)>]+|(?<![\w*])\*\w[\w ]*\*(?![\w*]))", re.DOTALL)


def _as_rst(text: str) -> str:
    """Escapes what reStructuredText would read as markup outside of code."""
    parts = _MARKUP.split(text)
    return "".join(
        part if index % 2 else re.sub(r"([*|\\])|(?<=\w)(_)(?=\W|$)", r"\\\1\2", part)
        for index, part in enumerate(parts)
    )


def markdown_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Turns a docstring, which is written as plain text with Markdown's code, into reStructuredText.

    Indented blocks after a blank line (tables, pictures, examples of commands) are shown as they are.
    """
    result: list[str] = []
    prose: list[str] = []
    in_section = False
    literal = False

    def flush() -> None:
        result.extend(_as_rst("\n".join(prose)).split("\n") if prose else [])
        prose.clear()

    for index, line in enumerate(lines):
        indented = line.startswith("    ")
        if line.strip() and not indented:
            in_section = bool(_SECTIONS.fullmatch(line.strip()))
            literal = False
        begins = indented and not literal and not in_section and (index == 0 or not lines[index - 1].strip())
        if begins and not line.strip().startswith(">>>"):
            flush()
            result.extend(["::", ""])
            literal = True
        if literal or line.lstrip().startswith(">>>"):
            flush()
            result.append(line)
        else:
            prose.append(line)
    flush()
    lines[:] = result


def shapes_alone(app, what, name, obj, options, signature: str | None, returned: str | None):
    """Writes `Float[Array, "B T"]` for what takes arrays of JAX and NumPy, and numbers, of that shape."""

    def shorter(text: str | None) -> str | None:
        text = re.sub(
            r"jaxlib\._jax\.|jax\.jaxlib\._jax\.|~|jaxtyping\.|collections\.abc\.|numpy\.", "", text or ""
        )
        either = (
            r"(\w+\[)Array(, '[^']*'\]) \| \1ndarray\2( \| number \| (bool \| )?int \| float( \| complex)?)?"
        )
        return re.sub(either, r"\1Array\2", text) or None

    return shorter(signature), shorter(returned)


def setup(app) -> None:
    """Connects the translation before napoleon's."""
    app.connect("autodoc-process-docstring", markdown_docstring, priority=400)
    app.connect("autodoc-process-signature", shapes_alone)
