"""What holds of every recipe, with the KL term on: padding is inert, slices add up, nothing gives nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.losses import loss_weights
from grpo_jax.recipes import RECIPES, make_recipe

B, T = 8, 6
DATA = ("log_probs", "old", "ref")
pytestmark = [
    pytest.mark.parametrize("name", RECIPES),
    pytest.mark.parametrize("estimator", ["k3", "ratio_k1", "ratio_k3"]),
]


@functools.cache
def recipe_of(name, estimator):
    return make_recipe(name, kl_estimator=estimator, kl_coef=0.3)


@functools.cache
def make_batch():
    """Right-padded rows, one empty and one full, with ratios beyond every recipe's clip and cap."""
    rng = np.random.default_rng(0)
    log_probs = -rng.exponential(1.0, (B, T)) - 0.1
    batch = {
        "log_probs": log_probs,
        "old": log_probs - 1.2 * rng.standard_normal((B, T)),
        "ref": log_probs + 0.7 * rng.standard_normal((B, T)),
        "advantages": np.array([1.2, -0.7, 0.4, -0.9, 0.8, 0.0, -1.1, 0.3]),
    }
    batch = {name: value.astype(np.float32) for name, value in batch.items()}
    batch["mask"] = np.arange(T) < np.array([6, 3, 5, 1, 0, 4, 6, 2])[:, None]
    ratios = np.exp(batch["log_probs"] - batch["old"])[batch["mask"]]
    assert ratios.max() > 5 and ratios.min() < 0.5
    return batch


def eager(recipe, batch, weights):
    def loss(log_probs):
        return recipe.loss(log_probs, batch["old"], batch["advantages"], batch["mask"], weights, batch["ref"])

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(batch["log_probs"])
    return value, gradient, metrics


value_and_grad = jax.jit(eager)


def weights_of(recipe, mask):
    return np.asarray(recipe.weights(mask, max_length=T))


def test_masked_positions_are_inert(name, estimator):
    recipe, batch = recipe_of(name, estimator), make_batch()
    mask, weights = batch["mask"], weights_of(recipe, batch["mask"])
    clean = value_and_grad(recipe, batch, weights)
    chex.assert_tree_all_finite(clean)
    gradient = np.asarray(clean[1])
    assert (gradient[~mask] == 0).all() and (gradient[mask & (batch["advantages"] != 0)[:, None]] != 0).any()
    for junk in (np.nan, np.inf, -np.inf, 1e4, -1e4):
        for names in (*((n,) for n in DATA), DATA):
            dirty = {n: np.where(mask, batch[n], np.float32(junk)) for n in names}
            chex.assert_trees_all_equal(value_and_grad(recipe, {**batch, **dirty}, weights), clean)
    # Eagerly too, where nothing is fused or rewritten across operations.
    clean = eager(recipe, batch, weights)
    for names in (*((n,) for n in DATA), DATA):
        dirty = {n: np.where(mask, batch[n], np.float32(np.nan)) for n in names}
        chex.assert_trees_all_equal(eager(recipe, {**batch, **dirty}, weights), clean)


def test_padding_rows_and_columns_are_inert(name, estimator):
    recipe, batch = recipe_of(name, estimator), make_batch()
    loss, gradient, metrics = value_and_grad(recipe, batch, weights_of(recipe, batch["mask"]))
    pad = ((0, 3), (0, 2))
    padded = {n: np.pad(x, pad[: x.ndim], constant_values=np.nan) for n, x in batch.items() if n != "mask"}
    padded["mask"] = np.pad(batch["mask"], pad)
    weights = loss_weights(padded["mask"], reduction=recipe.reduction, max_length=T, num_sequences=B)
    padded_loss, padded_gradient, padded_metrics = value_and_grad(recipe, padded, weights)
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(padded_gradient[:B, :T], gradient, rtol=1e-6, atol=1e-7)
    assert (padded_gradient[B:] == 0).all() and (padded_gradient[:, T:] == 0).all()
    chex.assert_trees_all_close(padded_metrics, metrics, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_slices", [2, 8])
def test_slices_add_up_to_the_whole(name, estimator, num_slices):
    recipe, batch = recipe_of(name, estimator), make_batch()
    weights = weights_of(recipe, batch["mask"])
    loss, gradient, metrics = value_and_grad(recipe, batch, weights)
    parts = [
        value_and_grad(recipe, {n: x[rows] for n, x in batch.items()}, weights[rows])
        for rows in np.split(np.arange(B), num_slices)
    ]
    np.testing.assert_allclose(sum(part[0] for part in parts), loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), gradient, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        sum(p[2].policy_loss for p in parts), metrics.policy_loss, rtol=1e-6, atol=1e-6
    )
    assert sum(int(p[2].num_tokens) for p in parts) == metrics.num_tokens == batch["mask"].sum()


def test_nothing_gives_nothing(name, estimator):
    recipe, batch = recipe_of(name, estimator), make_batch()
    nothing = {n: np.full_like(batch[n], np.nan) for n in DATA}
    nothing = {**batch, **nothing, "mask": np.zeros((B, T), bool)}
    weights = weights_of(recipe, nothing["mask"])
    assert (weights == 0).all()
    result = value_and_grad(recipe, nothing, weights)
    chex.assert_trees_all_equal(result, jax.tree.map(jnp.zeros_like, result))


@pytest.mark.parametrize("sign", [1, -1])
def test_runaway_tokens_stay_finite(name, estimator, sign):
    """Log-probs (never above 0) that fall to -1e4 in one array, at a token that counts."""
    recipe, batch = recipe_of(name, estimator), make_batch()
    weights = weights_of(recipe, batch["mask"])
    for n in DATA:
        wild = batch[n].copy()
        wild[:, 0] = -1e4
        changed = {**batch, n: wild, "advantages": np.full(B, sign, np.float32)}
        chex.assert_tree_all_finite(value_and_grad(recipe, changed, weights))
