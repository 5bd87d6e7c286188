"""The cards: scripts outside the package that train a GPT-2 of transformers, or a model of one's own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import small_run

CARDS = sorted((Path(__file__).parent / "cards").glob("*.py"))
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)


def test_there_is_one_for_each_kind_of_model():
    assert [path.stem for path in CARDS] == ["bare", "gpt2", "linen", "nnx"]


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_fifteen_lines_train(path, tmp_path):
    _, *body = ast.parse(path.read_text()).body
    lines = [node.end_lineno - node.lineno + 1 for node in body if not isinstance(node, DEFINITIONS)]
    assert sum(lines) <= 16 - (path.stem == "gpt2")  # a model of one's own has a line for its parameters
    done = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        env=small_run.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (ast.literal_eval(line) for line in done.stdout.splitlines())
    # The first update is at the reference, and the second is not.
    assert first["kl"] == 0 and second["kl"] > 0
    assert min(first["grad_norm"], second["grad_norm"]) > 0.1
    assert second["skipped_updates"] == 0 and second["sampling/logp_difference_max"] < 1e-3
    assert not list(tmp_path.iterdir())
