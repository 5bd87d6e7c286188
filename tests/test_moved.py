"""Old names of modules still find them, and rooms name what can be imported from them."""

import importlib
import sys
import warnings

import pytest

import grpo_jax
from grpo_jax import moved

ROOMS = ("config", "models", "rewards", "data", "checkpoints")


@pytest.mark.parametrize(("old", "new"), moved.MOVED.items())
def test_an_old_name_is_the_module_itself(old, new):
    sys.modules.pop(f"grpo_jax.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"grpo_jax.{old} is grpo_jax.{new} now"):
        found = importlib.import_module(f"grpo_jax.{old}")
    assert found is importlib.import_module(f"grpo_jax.{new}")
    assert found.__name__ == found.__spec__.name == f"grpo_jax.{new}"
    del sys.modules[f"grpo_jax.{old}"]
    delattr(grpo_jax, old)


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("grpo_jax.never_was")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("grpo_jax.objective.kernels")


def test_new_names_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        importlib.import_module("grpo_jax.objective.losses")


@pytest.mark.parametrize(("old", "new"), moved.RENAMED.items())
def test_the_old_name_of_a_function_warns_whoever_uses_it(old, new):
    with pytest.warns(DeprecationWarning, match=f"grpo_jax.{old} is grpo_jax.{new} now") as warned:
        found = getattr(grpo_jax, old)
    assert found is getattr(grpo_jax, new)
    assert warned[0].filename == __file__


def test_the_old_name_of_a_function_is_the_function():
    assert grpo_jax.reward_weights is grpo_jax.effective_weights


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_gives_the_names_it_lists(room):
    module = importlib.import_module(f"grpo_jax.{room}")
    assert all(getattr(module, name) is not None for name in module.__all__) and module.__all__
    with pytest.raises(AttributeError, match="no attribute 'never_was'"):
        _ = module.never_was
