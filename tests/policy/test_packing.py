"""Packing: real tokens side by side and back again, and everything that runs on them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.models.loading import load_model
from grpo_jax.objective.losses import loss_weights
from grpo_jax.objective.recipes import make_recipe
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.policy.packing import make_packing
from grpo_jax.training.learner import train_step
from grpo_jax.training.train_state import init_train_state
from grpo_jax.types import Experience

MASK = np.arange(5) < np.array([3, 0, 5, 1])[:, None]
REAL = int(MASK.sum())
N, G, S, T = 2, 4, 6, 9
B = N * G


@pytest.mark.parametrize("num_tokens", [REAL, REAL + 4])
def test_pack_lists_the_real_tokens_in_order_and_unpack_puts_them_back(num_tokens):
    x = np.random.default_rng(0).normal(size=(*MASK.shape, 2)).astype(np.float32)
    packing = make_packing(jnp.asarray(MASK), num_tokens)
    packed = packing.pack(jnp.asarray(x))
    np.testing.assert_array_equal(packed[:REAL], x[MASK])
    np.testing.assert_array_equal(packed[REAL:], 0)
    np.testing.assert_array_equal(packing.unpack(packed), np.where(MASK[..., None], x, 0))


@pytest.mark.parametrize("num_tokens", [REAL, REAL + 4])
def test_each_is_the_derivative_of_the_other(num_tokens):
    packing = make_packing(jnp.asarray(MASK), num_tokens)
    rng = np.random.default_rng(1)
    rows, tokens = jnp.asarray(rng.normal(size=MASK.shape)), jnp.asarray(rng.normal(size=num_tokens))

    def literal_pack(x):  # a scatter and a gather that XLA differentiates itself
        return jnp.zeros(num_tokens).at[jnp.arange(REAL)].set(x.reshape(-1)[np.flatnonzero(MASK)])

    def literal_unpack(x):
        return jnp.zeros(MASK.size).at[np.flatnonzero(MASK)].set(x[:REAL]).reshape(MASK.shape)

    for ours, literal, x, g in (
        (packing.pack, literal_pack, rows, tokens),
        (packing.unpack, literal_unpack, tokens, rows),
    ):
        chex.assert_trees_all_close(jax.vjp(ours, x)[1](g), jax.vjp(literal, x)[1](g))


@pytest.fixture(scope="module")
def packaged():
    model = load_model("packaged:arithmetic")
    return model.policy, model.params


@pytest.fixture(scope="module")
def experience(packaged):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T, B)
    mask = jnp.asarray(np.arange(T) < lengths[:, None])
    prompts = np.repeat(rng.integers(0, 12, (N, S)), G, axis=0)
    experience = Experience(
        prompt_tokens=jnp.asarray(prompts, jnp.int32),
        prompt_mask=jnp.asarray(np.repeat(np.arange(S) >= [[0], [4]], G, axis=0)),
        tokens=jnp.asarray(rng.integers(0, 12, (B, T)), jnp.int32),
        mask=mask,
        advantages=jnp.asarray(rng.normal(size=B), jnp.float32),
        weights=loss_weights(mask),
        old_log_probs=jnp.zeros((B, T)),
    )
    own, _ = completion_log_probs(*packaged, experience)
    old, ref = own + 0.2 * rng.normal(size=(2, B, T)).astype(np.float32)
    return experience.replace(old_log_probs=old, ref_log_probs=ref)


def updated(packaged, experience, **settings):
    state = init_train_state(*packaged, optax.sgd(1.0))
    recipe = make_recipe("grpo", kl_coef=0.1, entropy_coef=0.05)
    state, metrics = train_step(state, experience, recipe=recipe, group_size=G, **settings)
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize("room", [0, 7])
def test_packed_scores_are_those_of_the_rows(packaged, experience, room):
    num_tokens = int(experience.mask.sum()) + room
    rows = completion_log_probs(*packaged, experience, group_size=G)
    packed = completion_log_probs(*packaged, experience, group_size=G, num_tokens=num_tokens)
    chex.assert_trees_all_close(packed, rows, atol=1e-5)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_packed_updates_are_those_of_the_rows(packaged, experience, num_microbatches):
    fullest = int(experience.mask.reshape(num_microbatches, -1).sum(axis=1).max())
    rows = updated(packaged, experience, num_microbatches=num_microbatches)
    packed = updated(packaged, experience, num_microbatches=num_microbatches, num_tokens=fullest)
    chex.assert_trees_all_close(packed, rows, atol=1e-5, rtol=1e-4)


def test_more_tokens_than_promised_change_nothing(packaged, experience):
    """Tokens without a place would be left out of the gradient in silence."""
    params, metrics = updated(packaged, experience, num_tokens=int(experience.mask.sum()) - 1)
    assert np.isnan(metrics["loss"]) and metrics["skipped_updates"] == 1
    chex.assert_trees_all_equal(params, jax.device_get(packaged[1]))


def test_without_old_log_probs_the_policys_own_are_taken(packaged, experience):
    own, _ = completion_log_probs(*packaged, experience, group_size=G)
    sampler = own + 0.25 * (jnp.arange(T) == 1) * experience.mask
    given = updated(packaged, experience.replace(old_log_probs=own))
    taken = updated(packaged, experience.replace(old_log_probs=None, sampler_log_probs=sampler))
    difference = taken[1].pop("sampling/logp_difference_max")
    np.testing.assert_allclose(difference, 0.25, atol=1e-5)
    chex.assert_trees_all_close(taken, given, atol=1e-5)
    assert taken[1]["ratio/max"] == taken[1]["ratio/mean"] == 1
