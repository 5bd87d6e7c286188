"""The README is true: its Python runs, its files exist, its length is kept."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_examples_run(number, capsys):
    exec(compile(BLOCKS[number], f"README.md, Python block {number}", "exec"), {})


def test_files_it_names_exist():
    names = set(re.findall(r"(?:configs|benchmarks|scripts|notebooks|\.ci|grpo_jax)/[\w./]+\w", README))
    assert names
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_modules_of_the_floor_table_are_those_of_the_package():
    table = README[README.index("| floor | files |") :]
    named = set(re.findall(r"`(\w+)/?`", table[: table.index("\n\n")]))
    package = {path.stem for path in (ROOT / "grpo_jax").iterdir() if path.suffix == ".py"}
    package |= {path.name for path in (ROOT / "grpo_jax").iterdir() if (path / "__init__.py").exists()}
    missing = package - named - {"__init__"}
    assert not missing, f"README's floor table lacks {sorted(missing)}"


def test_length():
    assert len(README.splitlines()) <= 200
