"""The table of scripts/mutation_check.py fits the code: every mutant changes exactly one place."""

import ast
import importlib.util
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


def test_the_table_is_whole():
    assert len(CASES) >= 25 and len({(file, name) for file, name, *_ in CASES}) == len(CASES)
    for file, modules in mutation_check.TESTS.items():
        assert file in mutation_check.MUTANTS
        assert all(
            (ROOT / "tests" / folder / f"test_{name}.py").is_file()
            for folder, name in (m.split("/") for m in modules)
        )


def test_a_text_that_is_not_there_once_is_refused():
    with pytest.raises(ValueError, match="occurs 2 times"):
        mutation_check.mutate("a a", "a", "b")
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutation_check.mutate("a", "c", "b")
