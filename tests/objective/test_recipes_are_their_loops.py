"""Every recipe is its paper's loop, on a few batches. tests/nightly/test_every_recipe.py has many more."""

import oracle
import pytest
from recipe_loops import check_against_the_loop, jitted

from grpo_jax.objective.recipes import RECIPES


def test_every_recipe_has_a_loop():
    assert set(RECIPES) == set(oracle.PAPERS), "give the new recipe a row in oracle.PAPERS"


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_loop(name):
    choices = {"kl_coef": 0.04, "entropy_coef": 0.01, "max_staleness": 0.099, "estimator": "ratio_k3"}
    for seed in range(10):
        check_against_the_loop(jitted, name, seed, choices, x64=True)
