"""What holds of every recipe: it is its paper's loop, padding is inert, slices add up, equal rewards train
nothing.

The proof takes minutes. tests/objective/test_recipes_are_their_loops.py is the short form of it.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_loops import (
    MAX_LENGTH,
    check_against_the_loop,
    jitted,
    objective,
    random_batch,
    with_kl_in_the_loss,
)

from grpo_jax.objective.recipes import KL_NAMES, RECIPES

every_recipe = pytest.mark.parametrize("name", RECIPES)
# Where the kind of the KL term could make a difference: numbers that must stay finite.
every_kl = pytest.mark.parametrize("estimator", ["k3", "ratio_k1", "ratio_k3"])

# ------------------------------------------------------------------------------------ literal loops
NUMBERS = {
    "kl_coef": st.sampled_from([0.0, 0.04, 1.0]),
    "entropy_coef": st.sampled_from([0.0, 0.01]),
    "max_staleness": st.sampled_from([float("inf"), 0.099, 0.0]),
}
# Each kind compiles once per recipe and precision, so half of them here; eagerly all kinds in both.
JITTED_KLS = {True: ("k2", "ratio_k1", "exact"), False: ("k1", "k3", "ratio_k3")}
precisions = pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])


@precisions
@every_recipe
@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9), numbers=st.fixed_dictionaries(NUMBERS), data=st.data())
def test_jitted_it_is_the_loop(name, x64, seed, numbers, data):
    estimator = data.draw(st.sampled_from(JITTED_KLS[x64]))
    check_against_the_loop(jitted, name, seed, {**numbers, "estimator": estimator}, x64)


@precisions
@every_recipe
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**9), numbers=st.fixed_dictionaries(NUMBERS), estimator=st.sampled_from(KL_NAMES)
)
def test_eagerly_it_is_the_loop(name, x64, seed, numbers, estimator):
    check_against_the_loop(objective, name, seed, {**numbers, "estimator": estimator}, x64)


@every_recipe
def test_the_random_batches_reach_every_case(name):
    """Else the two tests above would prove less than they seem to."""
    batches = [random_batch(name, seed) for seed in range(200)]
    paper = oracle.PAPERS[name]
    seen = dict.fromkeys(("clip_low", "clip_high", "stale", "kl"), 0)
    for batch in batches:
        _, _, metrics = oracle.objective(paper, batch, max_length=MAX_LENGTH, max_staleness=0.099)
        seen = {key: count + (metrics[key] != 0) for key, count in seen.items()}
    clips = paper.surrogate in ("clipped", "gmpo")
    assert min(seen["stale"], seen["kl"]) > 5 and (min(seen["clip_low"], seen["clip_high"]) > 5) == clips
    assert any(not b["mask"].any(axis=1).all() for b in batches)
    advantages = [oracle.advantages(b["rewards"], b["valid"], scale=paper.scale) for b in batches]
    assert any((a == 0).all() for a in advantages) and any((a > 0).any() for a in advantages)


# --------------------------------------------------------------------------------------- one batch
N, G, T = 2, 4, 6
B = N * G
DATA = ("log_probs", "old", "ref", "entropies")


@functools.cache
def make_batch():
    """Right-padded rows, one empty and one full, with ratios beyond every recipe's clip and cap."""
    rng = np.random.default_rng(0)
    log_probs = -rng.exponential(1.0, (B, T)) - 0.1
    batch = {
        "log_probs": log_probs,
        "old": log_probs - 1.2 * rng.standard_normal((B, T)),
        "ref": log_probs + 0.7 * rng.standard_normal((B, T)),
        "entropies": rng.uniform(0, 2, (B, T)),
        "advantages": np.array([1.2, -0.7, 0.4, -0.9, 0.8, 0.0, -1.1, 0.3]),
    }
    batch = {name: value.astype(np.float32) for name, value in batch.items()}
    batch["mask"] = np.arange(T) < np.array([6, 3, 5, 1, 0, 4, 6, 2])[:, None]
    ratios = np.exp(batch["log_probs"] - batch["old"])[batch["mask"]]
    assert ratios.max() > 5 and ratios.min() < 0.5
    return batch


def eager(recipe, batch, weights):
    def loss(log_probs):
        rest = (batch["old"], batch["advantages"], batch["mask"], weights, batch["ref"])
        return recipe.loss(log_probs, *rest, entropies=batch["entropies"])

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(batch["log_probs"])
    return value, gradient, metrics


value_and_grad = jax.jit(eager)


@functools.cache
def recipe_of(name, estimator="ratio_k3", kl_coef=0.3):
    return with_kl_in_the_loss(name, estimator, kl_coef, entropy_coef=0.01, max_staleness=0.8)


def without_penalties(name):
    return RECIPES[name].replace(kl_coef=0.0)


def weights_of(recipe, mask, **sizes):
    return np.asarray(recipe.weights(mask, max_length=T, **sizes))


# -------------------------------------------------------------------------------------- inert padding
@every_recipe
@every_kl
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


@every_recipe
def test_padding_rows_and_columns_are_inert(name):
    recipe, batch = recipe_of(name), make_batch()
    loss, gradient, metrics = value_and_grad(recipe, batch, weights_of(recipe, batch["mask"]))
    pad = ((0, 3), (0, 2))
    padded = {n: np.pad(x, pad[: x.ndim], constant_values=np.nan) for n, x in batch.items() if n != "mask"}
    padded["mask"] = np.pad(batch["mask"], pad)
    weights = weights_of(recipe, padded["mask"], num_sequences=B)
    padded_loss, padded_gradient, padded_metrics = value_and_grad(recipe, padded, weights)
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(padded_gradient[:B, :T], gradient, rtol=1e-6, atol=1e-7)
    assert (padded_gradient[B:] == 0).all() and (padded_gradient[:, T:] == 0).all()
    chex.assert_trees_all_close(padded_metrics, metrics, rtol=1e-6, atol=1e-6)


@every_recipe
@every_kl
def test_nothing_gives_nothing(name, estimator):
    recipe, batch = recipe_of(name, estimator), make_batch()
    nothing = {n: np.full_like(batch[n], np.nan) for n in DATA}
    nothing = {**batch, **nothing, "mask": np.zeros((B, T), bool)}
    weights = weights_of(recipe, nothing["mask"])
    assert (weights == 0).all()
    for function in (value_and_grad, eager):
        result = function(recipe, nothing, weights)
        chex.assert_trees_all_equal(result, jax.tree.map(jnp.zeros_like, result))


@every_recipe
@every_kl
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


# --------------------------------------------------------------------------- order and slices of rows
@every_recipe
@pytest.mark.parametrize("kind", ["rows of a group", "groups", "both"])
def test_order_does_not_matter(name, kind):
    recipe, batch = recipe_of(name), make_batch()
    rewards = np.array([[1.0, 0.0, 0.5, 0.0], [2.0, 2.0, -1.0, 0.25]], np.float32)
    order = np.arange(B).reshape(N, G)
    order = order if kind == "groups" else order[:, [2, 0, 3, 1]]
    order = order if kind == "rows of a group" else order[::-1]

    def run(rewards, batch):
        advantages = np.asarray(recipe.advantage(rewards))
        weights = weights_of(recipe, batch["mask"])
        return advantages, value_and_grad(recipe, {**batch, "advantages": advantages.reshape(-1)}, weights)

    advantages, (loss, gradient, metrics) = run(rewards, batch)
    rows = order.reshape(-1)
    shuffled = {n: x[rows] for n, x in batch.items()}
    result, (new_loss, new_gradient, new_metrics) = run(rewards.reshape(-1)[order], shuffled)
    np.testing.assert_allclose(result, advantages.reshape(-1)[order], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(new_gradient, np.asarray(gradient)[rows], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(new_loss, loss, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(new_metrics, metrics, rtol=1e-5, atol=1e-6)


def slices_of(recipe, batch, weights, num_slices):
    return [
        value_and_grad(recipe, {n: x[rows] for n, x in batch.items()}, weights[rows])
        for rows in np.split(np.arange(B), num_slices)
    ]


@every_recipe
def test_slices_add_up_to_the_whole(name):
    """One and the same objective, however many micro-batches it is cut into; bnpo's by its M, see below."""
    recipe, batch = recipe_of(name), make_batch()
    for num_slices in (1, 2, 4, 8):
        weights = weights_of(recipe, batch["mask"], num_microbatches=num_slices)
        if name != "bnpo":
            np.testing.assert_array_equal(weights, weights_of(recipe, batch["mask"]))
        loss, gradient, metrics = value_and_grad(recipe, batch, weights)
        parts = slices_of(recipe, batch, weights, num_slices)
        np.testing.assert_allclose(sum(part[0] for part in parts), loss, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), gradient, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            sum(p[2].policy_loss for p in parts), metrics.policy_loss, rtol=1e-6, atol=1e-6
        )
        assert sum(int(p[2].num_tokens) for p in parts) == metrics.num_tokens == batch["mask"].sum()


def test_only_bnpo_depends_on_the_number_of_slices():
    recipe, batch = recipe_of("bnpo"), make_batch()
    losses = []
    for num_slices in (1, 2, 4, 8):
        weights = weights_of(recipe, batch["mask"], num_microbatches=num_slices)
        losses.append(float(value_and_grad(recipe, batch, weights)[0]))
        # What TRL does: every micro-batch is a batch of its own, and their losses are averaged.
        means = []
        for rows in np.split(np.arange(B), num_slices):
            part = {n: x[rows] for n, x in batch.items()}
            alone = part["mask"] / max(part["mask"].sum(), 1)
            means.append(value_and_grad(recipe, part, alone.astype(np.float32))[0])
        np.testing.assert_allclose(losses[-1], np.mean(means), rtol=1e-6)
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-3, losses


# ------------------------------------------------------------------------------- on and off the policy
@every_recipe
def test_at_ratio_one_the_gradient_is_reinforce(name):
    """-w A, token by token.

    Where a ratio is shared by a row's n tokens (GSPO, GMPO), its derivative by each is 1 / n, and what the
    tokens of the row pass on adds up to -A times the mean of their weights: -w A again, since all reductions
    give the tokens of one row one weight.
    """
    batch = dict(make_batch())
    batch["old"] = batch["log_probs"]
    with jax.enable_x64(True):
        batch = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in batch.items()}
        recipe = without_penalties(name)
        weights = weights_of(recipe, batch["mask"])
        for function in (value_and_grad, eager):
            _, gradient, metrics = function(recipe, batch, weights)
            expected = -weights * batch["advantages"][:, None]
            np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-16)
            assert metrics.ratio_mean == metrics.ratio_max == 1
            assert metrics.clip_low == metrics.clip_high == 0


@every_recipe
@pytest.mark.parametrize("log_ratio", [1.0, -1.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_outside_the_clip_the_gradient_is_exactly_zero(name, log_ratio, sign):
    recipe, batch = without_penalties(name), dict(make_batch())
    batch["log_probs"] = batch["old"] + np.float32(log_ratio)
    batch["advantages"] = np.full(B, sign, np.float32)
    # Only on the side that the advantage favours; CISPO, SAPO and REINFORCE never cut a gradient.
    cut = log_ratio * sign > 0 and oracle.PAPERS[name].surrogate in ("clipped", "gmpo")
    for function in (value_and_grad, eager):
        _, gradient, metrics = function(recipe, batch, weights_of(recipe, batch["mask"]))
        gradient = np.asarray(gradient)[batch["mask"]]
        assert (gradient == 0).all() if cut else (np.sign(gradient) == -sign).all()
        assert metrics.clip_high == float(cut and log_ratio > 0)
        assert metrics.clip_low == float(cut and log_ratio < 0)


@every_recipe
def test_groups_of_equal_rewards_give_exactly_nothing(name):
    """0.35 and 0.95 are not what their mean is in floating point."""
    recipe, batch = without_penalties(name), dict(make_batch())
    weights = weights_of(recipe, batch["mask"])
    for rewards in ([[0.35] * G, [0.95] * G], [[0.1] * G, [0.1, 0.1, np.nan, 0.1]]):
        rewards = np.array(rewards, np.float32)
        batch["advantages"] = np.asarray(recipe.advantage(rewards, valid=~np.isnan(rewards))).reshape(-1)
        for function in (value_and_grad, eager):
            loss, gradient, metrics = function(recipe, batch, weights)
            assert loss == 0 and (np.asarray(gradient) == 0).all()
            assert metrics.clip_low == metrics.clip_high == 0
    # One group of two: its rows are untouched by the other.
    rewards = np.array([[0.35] * G, [1.0, 0.0, 0.0, 1.0]], np.float32)
    batch["advantages"] = np.asarray(recipe.advantage(rewards)).reshape(-1)
    gradient = np.asarray(value_and_grad(recipe, batch, weights)[1])
    assert (gradient[:G] == 0).all() and (gradient[G:] != 0).any()
