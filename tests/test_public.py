"""`import grpo_jax` costs nothing until a public name is asked for, and then all of them are there."""

import subprocess
import sys
import types

import pytest
import small_run

import grpo_jax
from grpo_jax import public


def loaded_by(code: str) -> set[str]:
    """Returns the top-level modules that a Python process has loaded after some code."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=small_run.environment(), check=True
    )
    return set(done.stdout.split())


def test_every_public_name_is_given():
    assert len(public.__all__) == len(set(public.__all__)) > 40
    for name in set(public.__all__) - {"generate"}:  # the command of that name may have taken its place
        assert getattr(grpo_jax, name) is getattr(public, name)
    assert set(public.__all__) <= set(dir(grpo_jax))
    assert {"grpo_loss", "train_step", "make_recipe", "clipped_surrogate", "kl_k3"} <= set(public.__all__)


def test_a_star_import_gives_them_all():
    names = {}
    exec("from grpo_jax import *", names)
    assert set(public.__all__) == set(names) - {"__builtins__"}


def test_what_is_not_there_is_an_attribute_error():
    for name in ("grpo_los", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(grpo_jax, name)


def test_the_package_alone_loads_no_jax():
    assert not loaded_by("import grpo_jax.__main__") & {"jax", "numpy", "flax"}
    assert "jax" in loaded_by("import grpo_jax\ngrpo_jax.grpo_loss")


def test_rooms_of_the_mathematics_need_no_import_of_their_own():
    code = "import grpo_jax\nassert grpo_jax.objective.losses.grpo_loss is grpo_jax.grpo_loss"
    assert "jax" in loaded_by(code)
    assert isinstance(grpo_jax.objective, types.ModuleType)
