"""The documentation site has every page, every public name, and docstrings as they were meant.

`.ci/run` builds it, and a warning of Sphinx ends that. Sphinx is not needed here.
"""

import importlib.util
import re

import test_readme
from test_readme import REFERENCE, ROOT, TITLES

import grpo_jax
from grpo_jax import public
from grpo_jax.objective.recipes import RECIPES

_spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
conf = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(conf)
API = (ROOT / "docs" / "api.md").read_text()


def test_every_public_function_is_on_the_page_of_the_api():
    modules = set(re.findall(r"automodule:: (\S+)", API))
    for name in public.__all__:
        value = getattr(grpo_jax, name)
        if callable(value) and name not in RECIPES:
            assert value.__module__ in modules, f"{name} of {value.__module__} is not in docs/api.md"
    for name in RECIPES:
        assert f"| `{name}` |" in REFERENCE["objective"]


def test_modules_of_the_api_exist():
    for module in re.findall(r"automodule:: (\S+)", API):
        assert importlib.util.find_spec(module), module


def test_the_start_page_leads_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    blocks = re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]
    lines = [re.sub(r".* <(.*)>$", r"\1", line) for line in lines]  # Title <page>
    listed = {line.removeprefix("/") if line.startswith("/") else f"docs/{line}" for line in lines}
    assert {"docs/[!ai]*", "notebooks/*"} <= listed  # whatever is added there, beside api and index
    pages = {title.removesuffix(".md") for title in TITLES if not title.startswith("docs/")}
    assert pages <= listed
    for page in pages | (listed - {"docs/[!ai]*", "notebooks/*"}):
        assert (ROOT / f"{page}.md").exists(), page


def test_docstrings_become_restructured_text():
    lines = [
        "Takes a* and |b|, `c*d`, a *length* and args_.",
        "",
        "    a table   1",
        "      of two  2",
        "",
        "More.",
        "",
        "Args:",
        "    x: **text** of x_.",
        "",
        "    y: more.",
        "",
        ">>> f(2 * 3)",
    ]
    conf.markdown_docstring(None, "function", "f", None, None, lines)
    assert lines == [
        "Takes a\\* and \\|b\\|, `c*d`, a *length* and args\\_.",
        "",
        "::",
        "",
        "    a table   1",
        "      of two  2",
        "",
        "More.",
        "",
        "Args:",
        "    x: \\*\\*text\\*\\* of x\\_.",
        "",
        "    y: more.",
        "",
        ">>> f(2 * 3)",
    ]


def test_a_signature_shows_shapes_alone():
    array = "~jaxtyping.Float[jaxlib._jax.Array, 'B T'] | ~jaxtyping.Float[ndarray, 'B T']"
    number = "Real[jaxlib._jax.Array, ''] | Real[ndarray, ''] | number | int | float"
    signature = f"(x: {array} | None = None, y: {number} = 0.0)"
    shown = conf.shapes_alone(None, "function", "f", None, None, signature, None)
    assert shown == ("(x: Float[Array, 'B T'] | None = None, y: Real[Array, ''] = 0.0)", None)


def test_pages_are_those_of_the_readmes():
    assert conf.root_doc == "docs/index" and "docs/index.md" in TITLES
    patterns = set(conf.include_patterns)
    assert {"*.md", "docs/*.md", "configs/README.md", "grpo_jax/*/README.md", "notebooks/*.ipynb"} <= patterns
    assert all((test_readme.ROOT / path).exists() for path in ("docs/site/index.html", "docs/conf.py"))
