"""What pyproject.toml declares is what the code imports, for the package, the tests and the notebooks."""

import ast
import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# distribution -> why it is declared although nothing imports it
BY_OTHERS = {
    "pytest-xdist": "the README's test command passes -n",
    "ruff": "a command; .ci/run and pre-commit call it",
    "mypy": "a command; .ci/run calls it",
    "ipykernel": "it runs the cells of the notebooks",
}
# What scripts and benchmarks need beyond the extras; each says so where it is used.
BY_HAND = {"torch", "peft", "gguf"}
_DISTRIBUTIONS = metadata.packages_distributions()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements) -> set[str]:
    """Returns the distributions of a list of requirements; one of ourselves stands for our extras."""
    found = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w.-]+)(?:\[([^\]]*)\])?", requirement).groups()
        if canonical(name) != "grpo-jax":
            found.add(canonical(name))
            continue
        for extra in extras.split(","):
            found |= declared(PROJECT["optional-dependencies"][extra])
    return found


def distributions_of(module: str) -> set[str]:
    """Returns the distributions that may have installed a module; an absent one has the module's name."""
    return {canonical(name) for name in _DISTRIBUTIONS.get(module, [module])}


def imports_of(source: str, *, always: bool = False) -> set[str]:
    """Returns the top-level modules of other people that code imports.

    Args:
        source: Python code.
        always: only imports that run whenever the module is imported, not those in functions.
    """
    found = set()
    waiting = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "pytest.importorskip",
        ):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        later = later or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        if not (always and later):
            waiting.extend(ast.iter_child_nodes(node))
    return {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"grpo_jax"}


def code_of(folder: str) -> dict[str, str]:
    """Returns the Python code of a folder by file, cells of notebooks included."""
    code = {str(path): path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py")}
    for path in (ROOT / folder).rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line for cell in cells if cell["cell_type"] == "code" for line in [*cell["source"], "\n"]]
        code[str(path)] = "".join(line for line in lines if not line.startswith(("%", "!")))
    return code


CORE = declared(PROJECT["dependencies"])
EXTRAS = {name: declared(listed) for name, listed in PROJECT["optional-dependencies"].items()}
OPTIONAL = set().union(
    *(names for extra, names in EXTRAS.items() if extra not in ("test", "notebooks", "docs"))
)
PACKAGE = code_of("grpo_jax")
# Modules of our own that scripts, tests and benchmarks import from beside them.
OURS = {path.stem for folder in ("tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")}


def missing(code: dict[str, str], allowed: set[str], *, always: bool = False) -> dict[str, list[str]]:
    """Returns the modules that are imported and not declared, each with the files that import it."""
    found: dict[str, list[str]] = {}
    for path, source in code.items():
        for module in imports_of(source, always=always) - OURS:
            if not distributions_of(module) & allowed:
                found.setdefault(module, []).append(str(Path(path).relative_to(ROOT)))
    return found


def test_the_walk_sees_every_kind_of_import():
    code = """
import os, jax.numpy as jnp
from yaml import safe_load
from . import beside
if TYPE_CHECKING:
    import wandb
def f():
    from rich.table import Table
    return importlib.import_module("datasets.features"), pytest.importorskip("torch")
class C:
    import optax
"""
    assert imports_of(code) == {"jax", "yaml", "wandb", "rich", "datasets", "torch", "optax"}
    assert imports_of(code, always=True) == {"jax", "yaml", "optax"}


def test_names_are_compared_as_pip_does():
    assert declared(["PyYAML", "a_b[c]>=1,<2 ; python_version < '3.12'"]) == {"pyyaml", "a-b"}
    assert declared(["grpo-jax[hub,parquet]"]) == {"datasets", "pyarrow"}
    assert distributions_of("yaml") == {"pyyaml"} and distributions_of("no_such") == {"no-such"}


def test_whatever_the_package_imports_is_declared():
    assert missing(PACKAGE, CORE | OPTIONAL) == {}


def test_what_is_imported_in_any_case_is_no_extra():
    assert missing(PACKAGE, CORE, always=True) == {}


def test_whatever_tests_import_is_declared():
    # Tests of an extra that `test` leaves out are skipped where it is not installed.
    # There is no jax without jaxlib.
    assert missing(code_of("tests"), CORE | OPTIONAL | EXTRAS["test"] | {"jaxlib"}) == {}


def test_whatever_notebooks_import_is_declared():
    assert missing(code_of("notebooks"), CORE | EXTRAS["notebooks"]) == {}


def test_whatever_scripts_import_is_declared_or_named_here():
    code = code_of("scripts") | code_of("benchmarks")
    assert missing(code, CORE | OPTIONAL | EXTRAS["test"] | BY_HAND) == {}


def imported(folders) -> set[str]:
    modules = set().union(*(imports_of(source) for folder in folders for source in code_of(folder).values()))
    return set().union(*map(distributions_of, modules))


def test_whatever_is_declared_is_imported():
    package = imported(["grpo_jax"])
    assert (CORE | OPTIONAL) - package == set()
    everywhere = package | imported(["tests", "notebooks", "scripts", "benchmarks"])
    assert EXTRAS["test"] - everywhere - set(BY_OTHERS) == set()
    assert set(BY_OTHERS) <= EXTRAS["test"] - everywhere, "these are imported: take them out"


def test_the_extra_docs_is_what_the_site_is_configured_with():
    conf = (ROOT / "docs" / "conf.py").read_text()
    used = {"sphinx"} if "sphinx.ext.autodoc" in conf else set()
    used |= {name for name in ("myst-nb", "furo") if f'"{name.replace("-", "_")}"' in conf}
    assert EXTRAS["docs"] == used


def test_each_distribution_is_declared_once():
    for first in ("", *EXTRAS):
        for second in EXTRAS:
            if first != second and "test" not in (first, second):
                both = (CORE if first == "" else EXTRAS[first]) & EXTRAS[second]
                assert not both, f"{both}: in {first or 'dependencies'} and in {second}"
