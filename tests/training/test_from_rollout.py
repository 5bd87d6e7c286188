"""`experience_of`: what one's own loop makes of a rollout and its rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax
from grpo_jax import RECIPES, completion_log_probs, experience_of, generate, group_advantages, make_recipe

N, G, T, V = 3, 4, 5, 6
PARAMS = jax.random.normal(jax.random.key(1), (V, V))
POLICY = grpo_jax.policy_from_apply(lambda params, tokens, mask, positions: params[tokens])
PROMPTS = grpo_jax.pad_prompts([[1], [2, 3], [4]], 2)
ROLLOUT = generate(POLICY, PARAMS, PROMPTS, jax.random.key(0), group_size=G, max_new_tokens=T, eos_ids=0)
LOG_PROBS, ENTROPIES = completion_log_probs(POLICY, PARAMS, ROLLOUT)
REF, _ = completion_log_probs(POLICY, PARAMS + 0.5 * jnp.eye(V), ROLLOUT)
REWARDS = np.array([[1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [2, 0, 1, 0]])
SCORED = {"ref_log_probs": REF, "old_log_probs": LOG_PROBS, "entropies": ENTROPIES}


@pytest.mark.parametrize("name", RECIPES)
def test_weights_and_advantages_are_the_recipes(name):
    recipe = make_recipe(name, overlong_buffer=0)
    experience = experience_of(ROLLOUT, recipe, rewards=REWARDS, **SCORED)
    rewards = jnp.asarray(REWARDS)
    if recipe.kl_placement == "reward":
        kls = grpo_jax.kl_penalty(LOG_PROBS, REF, ROLLOUT.mask)
        rewards = rewards - recipe.kl_coef * kls.reshape(N, G)
    expected = recipe.advantage(rewards, valid=None).reshape(-1)
    np.testing.assert_allclose(experience.advantages, expected, atol=1e-5)
    np.testing.assert_allclose(experience.weights, recipe.weights(ROLLOUT.mask, max_length=T), atol=1e-7)
    np.testing.assert_array_equal(experience.sampler_log_probs, ROLLOUT.log_probs)
    assert experience.tokens.shape == (N * G, T) and experience.prompt_tokens.shape == (N * G, 2)


def test_the_first_update_needs_rewards_alone():
    experience = experience_of(ROLLOUT, make_recipe("dr_grpo"), rewards=REWARDS)
    state = grpo_jax.init_train_state(POLICY, PARAMS, optax.sgd(0.1))
    _, metrics = grpo_jax.train_step(state, experience, recipe=make_recipe("dr_grpo"), group_size=G)
    assert metrics["ratio/max"] == 1 and metrics["grad_norm"] > 0
    assert metrics["sampling/logp_difference_max"] < 1e-5


def test_advantages_of_ones_own_train_as_they_are():
    own = group_advantages(jnp.asarray(REWARDS), scale="none")
    experience = experience_of(ROLLOUT, make_recipe("dapo"), advantages=own)
    np.testing.assert_allclose(experience.advantages, np.asarray(own).reshape(-1), atol=1e-7)
    np.testing.assert_allclose(jnp.sum(experience.weights), 1, atol=1e-6)


def test_a_missing_reward_is_no_reward():
    missing = REWARDS.copy()
    missing[0, 1] = np.nan
    advantages = experience_of(ROLLOUT, make_recipe("dr_grpo"), rewards=missing).advantages
    np.testing.assert_allclose(advantages[:G], [1 / 3, 0, -2 / 3, 1 / 3], atol=1e-6)


def test_what_is_truncated_does_not_train():
    recipe = make_recipe("dr_grpo", mask_truncated=True)
    experience = experience_of(ROLLOUT, recipe, rewards=REWARDS)
    finished = np.asarray(ROLLOUT.finished)
    assert 0 < finished.sum() < finished.size
    assert not np.asarray(experience.weights)[~finished].any()
    assert not np.asarray(experience.advantages)[~finished].any()


BAD = {
    "nothing": ("grpo", {}, r"give rewards \[N, G\] or advantages"),
    "both": ("grpo", {"rewards": REWARDS, "advantages": REWARDS}, "and not both"),
    "flat": (
        "dr_grpo",
        {"rewards": REWARDS.reshape(-1)},
        r"shape \[12\].* give rewards\.reshape\(-1, gr",
    ),
    "too few": ("dr_grpo", {"rewards": REWARDS[:2]}, r"\[2, 4\] are 8 numbers.* has 12 completions"),
    "transposed": ("dr_grpo", {"rewards": REWARDS.T}, r"\[4, 3\] make groups of 3 .* different prompts"),
    "NaN": (
        "dr_grpo",
        {"advantages": np.full((N, G), np.nan)},
        "are not all finite: give rewards",
    ),
    "no reference": ("grpo", {"rewards": REWARDS}, r"grpo needs ref_log_probs: .*ref_params.*kl_coef=0"),
    "no old": ("rloo", {"rewards": REWARDS, "ref_log_probs": REF}, r"needs old_log_probs: give .*\)\[0\]"),
    "KL in rewards": (
        "rloo",
        {"advantages": REWARDS},
        "rloo subtracts its KL from the rewards",
    ),
    "shape": (
        "grpo",
        {"rewards": REWARDS, "ref_log_probs": REF[:, 1:]},
        r"ref_log_probs have the shape \[12, 4\], and the completions \[12, 5\]",
    ),
}


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line(name):
    recipe, values, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        experience_of(ROLLOUT, make_recipe(recipe), **values)
    assert "\n" not in str(error.value)


def test_entropies_are_asked_for():
    with pytest.raises(ValueError, match=r"dr_grpo needs entropies: give entropies=.*\[1\]"):
        experience_of(ROLLOUT, make_recipe("dr_grpo", top_entropy=0.2), rewards=REWARDS)
