"""The table of scripts/mutation_check.py fits the code: every mutant changes exactly one place."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("mutation_check", ROOT / "scripts" / "mutation_check.py")
mutation_check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mutation_check)

CASES = [(file, *mutant) for file, mutants in mutation_check.MUTANTS.items() for mutant in mutants]


@pytest.mark.parametrize(
    ("file", "old", "new"), [(f, o, n) for f, _, o, n in CASES], ids=[c[1] for c in CASES]
)
def test_the_mutant_is_another_program(file, old, new):
    text = (ROOT / "grpo_jax" / file).read_text()
    mutated = mutation_check.mutate(text, old, new)
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))


@pytest.mark.parametrize("file", mutation_check.MUTANTS)
def test_the_layout_of_a_file_does_not_matter(file):
    text = (ROOT / "grpo_jax" / file).read_text()
    ruff = [sys.executable, "-m", "ruff", "format", "--line-length", "60", "-"]
    narrow = subprocess.run(
        ruff, input=text, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert narrow != text
    for _, old, new in mutation_check.MUTANTS[file]:
        assert mutation_check.mutate(narrow, old, new) == mutation_check.mutate(text, old, new)


def test_only_what_the_mutant_means_is_replaced():
    text = 'x = f(\n    a,  # a comment\n    "b",\n)\ny = (a)\n'
    assert mutation_check.mutate(text, "f( a, 'b' )", "g(a)") == "x = g(a)\ny = a"
    assert mutation_check.mutate(text, "y = a\n", "") == "x = f(a, 'b')\n"
    assert mutation_check.mutate("x = 1", "1", r"\1") == r"x = \1"  # no pattern, a plain text


def test_the_table_is_whole():
    assert len(CASES) >= 25 and len({(file, name) for file, name, *_ in CASES}) == len(CASES)
    for file, modules in mutation_check.TESTS.items():
        assert file in mutation_check.MUTANTS
        paths = [ROOT / "tests" / module for module in modules]
        assert all(path.with_name(f"test_{path.name}.py").is_file() for path in paths)


def test_a_text_that_is_not_there_once_is_refused():
    with pytest.raises(ValueError, match="occurs 2 times"):
        mutation_check.mutate("a + a", "a", "b")
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutation_check.mutate("a", "c", "b")
