"""Every example in a docstring of the package is true."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "grpo_jax").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_hold(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted, f"{module} has a '>>> ' that is not in a docstring"
    assert not result.failed


def test_modules_with_examples_are_found():
    assert {"grpo_jax.objective.kl", "grpo_jax.export", "grpo_jax.rewards.answers.text"} <= set(MODULES)
