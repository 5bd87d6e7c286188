"""Prompts run once: scoring and the update give what running every sequence whole gives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.models.loading import load_model
from grpo_jax.objective.losses import loss_weights
from grpo_jax.objective.recipes import make_recipe
from grpo_jax.policy.decoding import generate
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.training.learner import train_step
from grpo_jax.training.train_state import init_train_state
from grpo_jax.types import Experience, Prompts

N, G, S, T = 2, 4, 5, 6
B = N * G


@pytest.fixture(scope="module")
def packaged():
    model = load_model("packaged:arithmetic")
    return model.policy, model.params


@pytest.fixture(scope="module", params=["toy", "packaged"])
def model(request, toy_policy):
    return toy_policy if request.param == "toy" else request.getfixturevalue("packaged")


@pytest.fixture(scope="module")
def rollout(model):
    prompts = Prompts(
        tokens=jax.random.randint(jax.random.key(0), (N, S), 0, 12),
        mask=jnp.arange(S) >= jnp.array([[0], [3]]),
    )
    settings = {"group_size": G, "max_new_tokens": T, "eos_ids": jnp.arange(2), "temperature": 2.0}
    return generate(*model, prompts, jax.random.key(1), **settings)


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_scores_are_those_of_whole_sequences(model, rollout, num_microbatches):
    whole = completion_log_probs(*model, rollout)
    shared = completion_log_probs(*model, rollout, group_size=G, num_microbatches=num_microbatches)
    chex.assert_trees_all_close(shared, whole, atol=1e-5)


def test_gradients_are_those_of_whole_sequences(model, rollout):
    policy, params = model

    def total(params, group_size):
        log_probs, _ = completion_log_probs(policy, params, rollout, group_size=group_size)
        return jnp.mean(log_probs * jnp.linspace(-1, 1, B)[:, None])

    whole, shared = (jax.grad(total)(params, size) for size in (1, G))
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(whole))
    chex.assert_trees_all_close(shared, whole, atol=1e-5 * largest)


@pytest.mark.parametrize("num_microbatches", [1, 2, 8])
def test_updates_are_those_of_whole_sequences(model, rollout, num_microbatches):
    experience = Experience(
        prompt_tokens=rollout.prompt_tokens,
        prompt_mask=rollout.prompt_mask,
        tokens=rollout.tokens,
        mask=rollout.mask,
        advantages=jnp.asarray(np.random.default_rng(0).normal(size=B), jnp.float32),
        weights=loss_weights(rollout.mask),
        old_log_probs=rollout.log_probs + 0.1,
    )

    def update(**settings):
        state = init_train_state(*model, optax.sgd(0.1))
        return train_step(state, experience, recipe=make_recipe("grpo", kl_coef=0.0), **settings)

    (whole, expected), (shared, metrics) = update(), update(group_size=G, num_microbatches=num_microbatches)
    chex.assert_trees_all_close(shared.params, whole.params, atol=1e-5)
    chex.assert_trees_all_close(metrics, expected, rtol=1e-4, atol=1e-5)


def test_one_token_completions(model, rollout):
    short = rollout.replace(
        tokens=rollout.tokens[:, :1], mask=rollout.mask[:, :1], log_probs=None, kept_mass=None
    )
    shared = completion_log_probs(*model, short, group_size=G)
    chex.assert_trees_all_close(shared, completion_log_probs(*model, short), atol=1e-5)
