"""One device or eight: the same update of every recipe. Run as a script it prints the largest differences.

The eight devices are simulated. XLA makes them when it starts, so the comparison has a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from toy import make_toy_policy, off_policy_experience

from grpo_jax.cli import enable_compilation_cache
from grpo_jax.objective.recipes import RECIPES, make_recipe
from grpo_jax.training.learner import train_step
from grpo_jax.training.train_state import init_train_state

NUM_DEVICES = 8
B, S, T = 16, 4, 6
CASES = {**RECIPES, "exact KL": make_recipe("grpo", kl_estimator="exact", kl_coef=0.3)}


def make_experience(policy, params):
    """Off-policy rows of every length, 0 too."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < rng.permutation(np.arange(B) % (T + 1))[:, None]
    return off_policy_experience(policy, params, mask, rng, prompt_length=S)


def update(recipe, experience, policy, params, ref_params, *, rows, rest, num_microbatches):
    """Makes one update with the experience placed as `rows` and all else as `rest`: (params, metrics)."""
    data = jax.device_put(experience, rows)
    state = jax.device_put(init_train_state(policy, params, optax.sgd(0.5)), rest)
    ref_params = jax.device_put(ref_params, rest) if recipe.exact_kl else None
    for x in jax.tree.leaves(data):  # really cut: every device has its own rows
        assert x.sharding.shard_shape(x.shape)[0] * len(x.sharding.device_set) == B
    state, metrics = train_step(
        state, data, recipe=recipe, ref_params=ref_params, num_microbatches=num_microbatches
    )
    assert jax.tree.leaves(state.params)[0].sharding.device_set == data.mask.sharding.device_set
    return jax.device_get((state.params, metrics))


def largest_differences(recipe, experience, policy, params, ref_params):
    """Compares parameters and metrics of one device with those of eight, in 1 and in 2 micro-batches.

    Each difference is relative where the value is above 1. One device takes the batch whole: what makes bnpo
    depend on the micro-batches is in the weights already.
    """
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    by_row, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    assert len(by_row.device_set) == NUM_DEVICES
    one = jax.devices()[0]
    largest = []
    for m in (1, 2):
        weights = recipe.weights(experience.mask, max_length=T, num_microbatches=m)
        data = (recipe, experience.replace(weights=weights), policy, params, ref_params)
        expected = update(*data, rows=one, rest=one, num_microbatches=1)
        moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), expected[0], jax.device_get(params))
        assert min(jax.tree.leaves(moved)) > 1e-4, moved  # else the comparison says nothing
        actual = update(*data, rows=by_row, rest=everywhere, num_microbatches=m)
        differences = jax.tree.map(
            lambda x, y: np.max(np.abs(x - y) / np.maximum(np.abs(x), 1)), expected, actual
        )
        largest.append(max(map(float, jax.tree.leaves(differences))))
    return largest


def main():
    assert len(jax.devices()) == NUM_DEVICES
    enable_compilation_cache()
    policy, params = make_toy_policy()
    _, ref_params = make_toy_policy(seed=1)
    experience = make_experience(policy, params)
    print(
        json.dumps(
            {
                name: largest_differences(recipe, experience, policy, params, ref_params)
                for name, recipe in CASES.items()
            }
        )
    )


@pytest.fixture(scope="module")
def differences():
    # What is compiled runs once: less optimisation is half the time.
    flags = f"--xla_force_host_platform_device_count={NUM_DEVICES} --xla_backend_optimization_level=0"
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    run = [sys.executable, __file__]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_make_the_update_of_one(differences, name):
    for num_microbatches, difference in zip((1, 2), differences[name], strict=True):
        print(f"{name}, {num_microbatches} micro-batches: one and eight devices differ by {difference:.1e}")
        assert difference < 1e-5


if __name__ == "__main__":
    main()
