"""The train step: one literal update, and everything that must not change it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import VOCAB, make_toy_policy, off_policy_experience

from grpo_jax.objective.recipes import RECIPES, grpo, make_recipe
from grpo_jax.policy.decoding import generate
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.policy.lora import Lora, Target, init_adapters
from grpo_jax.training.learner import train_step
from grpo_jax.training.optimizers import make_optimizer
from grpo_jax.training.reference import is_reference, mix_params
from grpo_jax.training.train_state import init_train_state
from grpo_jax.types import Experience, Prompts

N, G, S, T = 2, 4, 4, 6
B = N * G
# Adam's first step is the sign of the gradient, which hides its size: sgd shows it.
SGD = optax.sgd(0.1)
ADAM = make_optimizer(0.01, weight_decay=0.0, max_grad_norm=0.5)


@pytest.fixture(scope="module")
def experience(toy_policy) -> Experience:
    """Off-policy experience: old and reference log-probs lie around the policy's own."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < np.array([[6, 2, 1, 5, 6, 3, 0, 4]]).T
    return off_policy_experience(*toy_policy, mask, rng, prompt_length=S)


def step(toy_policy, experience, *, optimizer=SGD, recipe=grpo, temperature=1.0, **settings):
    """Makes one update from the initial parameters: (state, metrics)."""
    state = init_train_state(*toy_policy, optimizer)
    return train_step(state, experience, recipe=recipe, temperature=temperature, **settings)


def take(experience, order):
    return jax.tree.map(lambda x: x[order], experience)


def all_log_probs(policy, params, e, temperature):
    """Log-probs [B,T,V] of every token of the vocabulary, all at once."""
    tokens = jnp.concatenate([e.prompt_tokens, e.tokens], axis=1)
    mask = jnp.concatenate([e.prompt_mask, e.mask], axis=1)
    positions = jnp.clip(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, _ = policy.forward(params, tokens, mask, positions, None)
    return jax.nn.log_softmax(policy.unembed(params, hidden) / temperature)[:, S - 1 : -1]


def literal_loss(policy, params, experience, *, temperature, clip, kl_coef):
    """The objective of GRPO, equation 3, from full logits, as few lines as it takes."""
    e = experience
    log_probs = all_log_probs(policy, params, e, temperature)
    log_probs = jnp.sum(log_probs * jax.nn.one_hot(e.tokens, VOCAB), axis=-1)
    ratios = jnp.exp(log_probs - e.old_log_probs)
    advantages = e.advantages[:, None]
    objective = jnp.minimum(ratios * advantages, jnp.clip(ratios, 1 - clip, 1 + clip) * advantages)
    difference = e.ref_log_probs - log_probs
    kl = jnp.exp(difference) - difference - 1
    per_token = jnp.where(e.mask, -objective + kl_coef * kl, 0)
    return jnp.mean(jnp.sum(per_token, axis=1) / jnp.maximum(jnp.sum(e.mask, axis=1), 1))


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_one_step_is_the_literal_loss_and_an_optax_update(toy_policy, experience, optimizer):
    policy, params = toy_policy
    temperature = 0.8
    state, metrics = step(toy_policy, experience, optimizer=optimizer, temperature=temperature)
    loss, grads = jax.jit(jax.value_and_grad(literal_loss, argnums=1))(
        policy, params, experience, temperature=temperature, clip=0.2, kl_coef=0.04
    )
    updates, opt_state = optimizer.update(grads, optimizer.init(params), params)
    chex.assert_trees_all_close(state.params, optax.apply_updates(params, updates), atol=1e-5, rtol=1e-4)
    chex.assert_trees_all_close(state.opt_state, opt_state, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-6)
    # Before clipping to 0.5.
    assert metrics["grad_norm"] > 0.5
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert state.step == 1 and state.skipped == 0 and metrics["skipped_updates"] == 0


def test_metrics_are_scalars_with_their_definitions(toy_policy, experience):
    _, metrics = step(toy_policy, experience)
    log_probs, entropies = completion_log_probs(*toy_policy, experience, temperature=1.0)
    mask = np.asarray(experience.mask)
    ratios = np.exp(log_probs - experience.old_log_probs)[mask]
    positive = np.broadcast_to(experience.advantages[:, None] > 0, mask.shape)[mask]
    difference = np.asarray(experience.ref_log_probs - log_probs)[mask]
    expected = {
        "entropy": np.mean(np.asarray(entropies)[mask]),
        "ratio/mean": np.mean(ratios),
        "ratio/max": np.max(ratios),
        "clip_ratio/high_mean": np.mean((ratios > 1.2) & positive),
        "clip_ratio/low_mean": np.mean((ratios < 0.8) & ~positive),
        "clip_ratio/region_mean": np.mean(np.where(positive, ratios > 1.2, ratios < 0.8)),
        "kl": np.mean(np.exp(difference) - difference - 1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    assert min(expected["clip_ratio/high_mean"], expected["clip_ratio/low_mean"]) > 0
    kl = np.zeros(mask.shape)
    kl[mask] = np.exp(difference) - difference - 1
    np.testing.assert_allclose(
        metrics["loss"] - metrics["policy_loss"], 0.04 * np.sum(experience.weights * kl), atol=1e-6
    )
    chex.assert_shape(list(metrics.values()), ())


# Terms of the whole distribution: exact KL and entropy

EXACT = make_recipe("grpo", kl_estimator="exact", kl_coef=0.3, entropy_coef=0.2)


@pytest.fixture(scope="module")
def ref_params(toy_policy):
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), toy_policy[1])


@pytest.fixture(scope="module")
def penalized(experience):
    """Without an estimate of the KL, and with other weights for KL and entropy than for the policy."""
    penalty_weights = jnp.asarray(np.random.default_rng(3).random((B, T)) * experience.mask, jnp.float32)
    return experience.replace(ref_log_probs=None, penalty_weights=penalty_weights)


def dense_terms(params, policy, ref_params, e, temperature):
    """(policy term, exact KL and entropy, both weighed): from all logits of both policies at once."""
    log_probs, ref = (all_log_probs(policy, p, e, temperature) for p in (params, ref_params))
    chosen = jnp.sum(log_probs * jax.nn.one_hot(e.tokens, VOCAB), axis=-1)
    ratios, advantages = jnp.exp(chosen - e.old_log_probs), e.advantages[:, None]
    policy_loss = -jnp.minimum(ratios * advantages, jnp.clip(ratios, 0.8, 1.2) * advantages)
    kls = jnp.sum(jnp.exp(log_probs) * (log_probs - ref), axis=-1)
    entropies = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    weights = e.weights if e.penalty_weights is None else e.penalty_weights
    return tuple(
        jnp.sum(jnp.where(e.mask, w * x, 0))
        for w, x in ((e.weights, policy_loss), (weights, kls), (weights, entropies))
    )


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize(
    ("kl_coef", "entropy_coef", "weighed_apart"), [(0.3, 0.2, True), (0.7, None, True), (0.0, -0.5, False)]
)
def test_exact_kl_and_entropy_by_value(
    toy_policy, ref_params, penalized, kl_coef, entropy_coef, weighed_apart, num_microbatches
):
    policy, params = toy_policy
    e = penalized if weighed_apart else penalized.replace(penalty_weights=None)
    recipe = EXACT.replace(kl_coef=kl_coef, entropy_coef=entropy_coef)

    def literal(params):
        policy_loss, kl, entropy = dense_terms(params, policy, ref_params, e, 0.8)
        return policy_loss + kl_coef * kl - (entropy_coef or 0.0) * entropy

    loss, grads = jax.jit(jax.value_and_grad(literal))(params)
    state, metrics = step(
        toy_policy,
        e,
        recipe=recipe,
        ref_params=ref_params,
        temperature=0.8,
        num_microbatches=num_microbatches,
        chunk_size=5,
    )
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)  # SGD
    chex.assert_trees_all_close(state.params, expected, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, atol=2e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


@pytest.mark.slow
def test_the_exact_kl_is_measured_over_the_vocabulary(toy_policy, ref_params, penalized):
    policy, params = toy_policy
    _, metrics = step(toy_policy, penalized, recipe=EXACT, ref_params=ref_params)
    uniform = penalized.replace(penalty_weights=penalized.mask / jnp.sum(penalized.mask))
    _, kl, entropy = dense_terms(params, policy, ref_params, uniform, 1.0)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
    _, itself = step(toy_policy, penalized, recipe=EXACT, ref_params=params)
    np.testing.assert_allclose(itself["kl"], 0, atol=1e-6)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_penalties_of_an_estimate_have_their_own_weights(toy_policy, experience, num_microbatches):
    recipe = grpo.replace(kl_coef=0.5)
    zero, only = jnp.zeros((B, T)), np.array([1, 0, 0, 1, 0, 0, 0, 1], np.float32)[:, None]
    settings = {"recipe": recipe, "num_microbatches": num_microbatches}
    without, _ = step(toy_policy, experience.replace(penalty_weights=zero), **settings)
    policy_only, _ = step(toy_policy, experience, recipe=recipe.replace(kl_coef=0.0))
    assert_same_params(without, policy_only)
    # The KL of some rows is the KL of an experience whose other rows weigh nothing.
    some = experience.weights * only
    chosen, _ = step(toy_policy, experience.replace(weights=zero, penalty_weights=some), **settings)
    dead = experience.replace(advantages=jnp.zeros(B), weights=some)
    assert_same_params(chosen, step(toy_policy, dead, **settings)[0])
    equal, _ = step(toy_policy, experience.replace(penalty_weights=experience.weights), **settings)
    assert_same_params(equal, step(toy_policy, experience, **settings)[0])


def assert_same_params(actual, expected):
    chex.assert_trees_all_close(actual.params, expected.params, atol=1e-6, rtol=1e-5)


def test_parameters_of_a_reference_are_for_an_exact_kl_only(toy_policy, experience, ref_params):
    with pytest.raises(ValueError, match="ref_params are only for a recipe whose kl_estimator is exact"):
        step(toy_policy, experience, ref_params=ref_params)
    with pytest.raises(ValueError, match="an exact KL needs kls"):
        step(toy_policy, experience, recipe=EXACT)


def test_a_reference_moves_by_alpha_and_outlives_the_state(toy_policy, ref_params):
    state = init_train_state(*toy_policy, SGD)
    for alpha in (0.0, 0.25, 1.0):
        mixed = mix_params(state.params, ref_params, alpha)
        expected = jax.tree.map(
            lambda p, r, a=alpha: a * np.asarray(p, np.float64) + (1 - a) * np.asarray(r, np.float64),
            state.params,
            ref_params,
        )
        chex.assert_trees_all_close(mixed, expected, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_equal(mixed, toy_policy[1])  # alpha 1 is a copy
    jax.tree.map(lambda x: x.delete(), state.params)  # what donation does
    assert not any(x.is_deleted() for x in jax.tree.leaves((mixed, ref_params)))


# What must change nothing


@pytest.mark.parametrize(
    ("name", "num_microbatches"), [("grpo", 2), ("grpo", 4), ("grpo", 8), ("dr_grpo", 4), ("dapo", 4)]
)
def test_microbatches_change_nothing(toy_policy, experience, name, num_microbatches):
    recipe = RECIPES[name]
    experience = experience.replace(weights=recipe.weights(experience.mask, max_length=T))
    state, metrics = step(toy_policy, experience, recipe=recipe)
    sliced, sliced_metrics = step(
        toy_policy, experience, recipe=recipe, num_microbatches=num_microbatches, chunk_size=5
    )
    chex.assert_trees_all_close(sliced.params, state.params, atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(sliced_metrics, metrics, atol=1e-5, rtol=1e-5)


def assert_same_update(actual, expected):
    chex.assert_trees_all_close(actual[0].params, expected[0].params, atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(actual[1], expected[1], atol=1e-5, rtol=1e-5)


def test_padding_rows_and_columns_change_nothing(toy_policy, experience):
    e = experience
    # As many rows again, 3 columns of left padding, 2 of right padding.
    padded = e.replace(
        prompt_tokens=jnp.pad(e.prompt_tokens, [(0, B), (3, 0)], constant_values=5),
        prompt_mask=jnp.pad(e.prompt_mask, [(0, B), (3, 0)]),
        tokens=jnp.pad(e.tokens, [(0, B), (0, 2)], constant_values=7),
        mask=jnp.pad(e.mask, [(0, B), (0, 2)]),
        advantages=jnp.pad(e.advantages, (0, B)),
        weights=jnp.pad(e.weights, [(0, B), (0, 2)]),
        old_log_probs=jnp.pad(e.old_log_probs, [(0, B), (0, 2)], constant_values=-1e4),
        ref_log_probs=jnp.pad(e.ref_log_probs, [(0, B), (0, 2)], constant_values=1e4),
    )
    expected = step(toy_policy, experience)
    assert_same_update(step(toy_policy, padded), expected)
    # The second slice is padding only.
    assert_same_update(step(toy_policy, padded, num_microbatches=2), expected)


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_row_order_changes_nothing(toy_policy, experience, num_microbatches):
    order = np.random.default_rng(1).permutation(B)
    permuted = step(toy_policy, take(experience, order), num_microbatches=num_microbatches)
    assert_same_update(permuted, step(toy_policy, experience))


def test_what_stands_at_masked_positions_changes_nothing(toy_policy, experience):
    e = experience
    junk = e.replace(
        tokens=jnp.where(e.mask, e.tokens, 3),
        prompt_tokens=jnp.where(e.prompt_mask, e.prompt_tokens, 3),
        old_log_probs=jnp.where(e.mask, e.old_log_probs, -jnp.inf),
        ref_log_probs=jnp.where(e.mask, e.ref_log_probs, jnp.nan),
    )
    assert_same_update(step(toy_policy, junk), step(toy_policy, experience))


def test_without_a_reference_equals_kl_coef_zero(toy_policy, experience):
    recipe = grpo.replace(kl_coef=0.0)
    without, metrics = step(toy_policy, experience.replace(ref_log_probs=None), recipe=recipe)
    given, given_metrics = step(toy_policy, experience, recipe=recipe)
    chex.assert_trees_all_close(without.params, given.params, atol=1e-6)
    assert metrics["kl"] == 0 and given_metrics["kl"] > 0  # still watched
    np.testing.assert_allclose(metrics["loss"], given_metrics["loss"], atol=1e-6)
    with_kl, _ = step(toy_policy, experience, recipe=grpo.replace(kl_coef=1.0))
    assert optax.tree.norm(jax.tree.map(jnp.subtract, with_kl.params, given.params)) > 1e-3


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_equal_rewards_leave_the_parameters_bit_identical(toy_policy, experience, num_microbatches):
    recipe = grpo.replace(kl_coef=0.0)
    advantages = recipe.advantage(jnp.full((N, G), 0.35)).reshape(B)
    np.testing.assert_array_equal(advantages, 0)
    state, metrics = step(
        toy_policy,
        experience.replace(advantages=advantages),
        optimizer=ADAM,
        recipe=recipe,
        num_microbatches=num_microbatches,
    )
    chex.assert_trees_all_equal(state.params, toy_policy[1])
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and state.skipped == 0


# Updates that are skipped


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_a_non_finite_update_is_skipped_and_counted(toy_policy, experience, bad, num_microbatches):
    settings = {"recipe": grpo, "num_microbatches": num_microbatches}
    broken = experience.replace(advantages=experience.advantages.at[3].set(bad))
    state, _ = step(toy_policy, experience, optimizer=ADAM, num_microbatches=num_microbatches)
    before = jax.device_get((state.params, state.opt_state))
    for count in (1, 2):
        state, metrics = train_step(state, broken, **settings, temperature=1.0)
        chex.assert_trees_all_equal(jax.device_get((state.params, state.opt_state)), before)
        assert not np.isfinite(metrics["grad_norm"]) or not np.isfinite(metrics["loss"])
        assert metrics["skipped_updates"] == metrics["skipped_updates_in_a_row"] == count
        assert state.skipped == state.skipped_in_a_row == count and state.step == 1 + count
    state, metrics = train_step(state, experience, **settings, temperature=1.0)
    assert metrics["skipped_updates"] == 2 and metrics["skipped_updates_in_a_row"] == 0
    assert state.step == 4
    assert not np.array_equal(state.params["head"], before[0]["head"])
    # As if the broken batches had never been there.
    clean, _ = step(toy_policy, experience, optimizer=ADAM, num_microbatches=num_microbatches)
    clean, _ = train_step(clean, experience, **settings, temperature=1.0)
    chex.assert_trees_all_equal((clean.params, clean.opt_state), (state.params, state.opt_state))


def test_parameters_that_overflow_are_left_alone(toy_policy, experience):
    policy, params = toy_policy
    params = {**params, "head": params["head"].at[0, 0].set(jnp.inf)}
    state, metrics = step((policy, params), experience)
    chex.assert_trees_all_equal(state.params, params)
    assert metrics["skipped_updates"] == 1


def endless_loss(log_ratios, log_probs, advantages):
    """The loss is infinite, its gradient is not."""
    return jnp.inf - log_ratios * advantages


def endless_gradient(log_ratios, log_probs, advantages):
    """The loss is finite, its gradient is not: the root is taken at 0."""
    return jnp.sqrt(log_ratios - jax.lax.stop_gradient(log_ratios)) * advantages


@pytest.mark.parametrize("surrogate", [endless_loss, endless_gradient])
def test_loss_and_gradient_must_both_be_finite(toy_policy, experience, surrogate):
    recipe = grpo.replace(surrogate=surrogate, clip={})
    state, metrics = step(toy_policy, experience, recipe=recipe)
    assert np.isfinite(metrics["loss"]) != np.isfinite(metrics["grad_norm"])
    chex.assert_trees_all_equal(state.params, toy_policy[1])
    assert state.skipped == 1


# Updates that are idle


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_an_idle_update_moves_nothing_although_there_is_momentum(toy_policy, experience, num_microbatches):
    optimizer = make_optimizer(0.01, weight_decay=0.1)
    settings = {"recipe": grpo, "num_microbatches": num_microbatches}
    state, _ = step(toy_policy, experience, optimizer=optimizer, **settings)
    before = jax.device_get((state.params, state.opt_state))
    # What dynamic sampling makes of a rollout without a single informative group.
    masked = experience.replace(
        mask=jnp.zeros((B, T), bool), weights=jnp.zeros((B, T)), advantages=jnp.zeros(B)
    )
    # All rewards equal; the KL is measured, but has no coefficient.
    dead = experience.replace(advantages=jnp.zeros(B))
    for count, (idle, kl_coef) in enumerate(((masked, 0.04), (dead, 0.0)), start=1):
        settings["recipe"] = grpo.replace(kl_coef=kl_coef)
        state, metrics = train_step(state, idle, **settings)
        chex.assert_trees_all_equal(jax.device_get((state.params, state.opt_state)), before)
        assert metrics["idle_updates"] == state.idle == count and state.step == 1 + count
        assert metrics["grad_norm"] == metrics["loss"] == 0
        assert (metrics["kl"] > 0) == (idle is dead)
        assert metrics["skipped_updates"] == metrics["skipped_updates_in_a_row"] == 0
    # With one, the KL of dead groups is a gradient, and the update is a real one.
    state, metrics = train_step(state, dead, **settings | {"recipe": grpo})
    assert metrics["idle_updates"] == 2 and metrics["grad_norm"] > 0
    assert not np.array_equal(state.params["head"], before[0]["head"])


KL_RECIPES = {
    **{name: make_recipe("grpo", kl_estimator=name) for name in ("k1", "k2", "k3", "ratio_k1", "ratio_k3")},
    "exact": EXACT.replace(kl_coef=0.5, entropy_coef=None),
    "dapo": make_recipe("dapo", kl_coef=0.1),
    "rloo": make_recipe("rloo"),  # its KL is in the advantages; here it is only measured
}


@pytest.fixture(scope="module")
def rounded(toy_policy, experience) -> Experience:
    """All groups dead, and the policy is the reference, whose log-probs another program computed."""
    log_probs, _ = completion_log_probs(*toy_policy, experience, temperature=1.0)
    noise = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32) * 2e-6
    return experience.replace(
        advantages=jnp.zeros(B), old_log_probs=log_probs, ref_log_probs=log_probs + noise
    )


@pytest.mark.parametrize("name", KL_RECIPES)
def test_the_rounding_of_two_programs_is_no_kl(toy_policy, experience, rounded, name):
    # What a user without a driver has: no word about the reference but its log-probs or its parameters.
    recipe, changes = KL_RECIPES[name], {}
    if recipe.exact_kl:
        rounded, changes = rounded.replace(ref_log_probs=None), {"ref_params": toy_policy[1]}
    for num_microbatches in (1, 4):
        state = init_train_state(*toy_policy, ADAM)
        before = jax.device_get((state.params, state.opt_state))
        settings = {"recipe": recipe, "num_microbatches": num_microbatches, **changes}
        for count in (1, 2):
            state, metrics = train_step(state, rounded, **settings)
            assert metrics["idle_updates"] == count
            assert metrics["grad_norm"] == metrics["kl"] == metrics["loss"] == 0
        chex.assert_trees_all_equal(jax.device_get((state.params, state.opt_state)), before)


def test_a_real_kl_of_dead_groups_pulls_back(toy_policy, experience, rounded):
    # One small step away from the reference; then its KL is all there is to learn from.
    live = rounded.replace(advantages=experience.advantages)
    state, _ = step(toy_policy, live, optimizer=optax.adam(1e-4))
    away, _ = completion_log_probs(toy_policy[0], state.params, rounded, temperature=1.0)
    state = init_train_state(toy_policy[0], state.params, optax.adam(1e-5))
    apart = [jnp.sum(jnp.where(rounded.mask, (away - rounded.ref_log_probs) ** 2, 0))]
    for _ in range(5):
        state, metrics = train_step(state, rounded, recipe=grpo)
        assert metrics["grad_norm"] > 0 and metrics["idle_updates"] == 0
        log_probs, _ = completion_log_probs(toy_policy[0], state.params, rounded, temperature=1.0)
        apart.append(jnp.sum(jnp.where(rounded.mask, (log_probs - rounded.ref_log_probs) ** 2, 0)))
    assert np.all(np.diff(apart) < 0)


def test_rounding_counts_where_something_is_learned(toy_policy, experience, rounded):
    # Values of a batch with a signal are those of the formula, down to the rounding.
    live = rounded.replace(advantages=experience.advantages)
    assert step(toy_policy, live, recipe=KL_RECIPES["k1"])[1]["kl"] != 0
    # An entropy bonus is a signal too.
    bonus = KL_RECIPES["k1"].replace(entropy_coef=0.1)
    assert step(toy_policy, rounded, recipe=bonus)[1]["kl"] != 0
    # Who knows that the policy is the reference says so.
    itself, metrics = step(toy_policy, live, recipe=KL_RECIPES["k1"], at_reference=True)
    assert metrics["kl"] == 0
    free, _ = step(toy_policy, live, recipe=grpo.replace(kl_coef=0.0))
    chex.assert_trees_all_equal(itself.params, free.params)


def test_a_policy_is_its_reference_if_all_parameters_are_equal(toy_policy):
    params = toy_policy[1]
    assert is_reference(params, jax.tree.map(jnp.copy, params))
    for name in params:
        assert not is_reference(params, {**params, name: params[name].at[0, 0].add(1e-6)})
    lora = Lora(rank=2, alpha=4.0, targets=(Target(path=("head",), inputs=16, outputs=VOCAB),))
    adapters = init_adapters(lora, jax.random.key(0))
    assert is_reference(adapters, params, params)
    moved = {"head": {**adapters["head"], "b": adapters["head"]["b"].at[1, 3].set(1e-9)}}
    assert not is_reference(moved, params, params)
    other = {**params, "head": params["head"] + 1}
    assert not is_reference(adapters, other, params)


def test_a_reference_equal_to_the_policy_stays_it(toy_policy):
    params = toy_policy[1]
    for alpha in (0.1, 0.3, 0.6, 0.7):
        chex.assert_trees_all_equal(mix_params(params, jax.tree.map(jnp.copy, params), alpha), params)


def test_a_broken_update_is_skipped_and_not_idle(toy_policy, experience):
    state, metrics = step(toy_policy, experience.replace(advantages=jnp.full(B, jnp.nan)))
    assert metrics["skipped_updates"] == 1 and metrics["idle_updates"] == state.idle == 0


# State


def test_parameters_in_low_precision_are_refused(toy_policy):
    policy, params = toy_policy
    params = {**params, "up": params["up"].astype(jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"\['up'\] is bfloat16"):
        init_train_state(policy, params, SGD)


def test_the_state_is_donated_and_the_callers_parameters_are_not(toy_policy, experience):
    old = init_train_state(*toy_policy, ADAM)
    arrays = jax.tree.leaves(old)
    new, _ = train_step(old, experience, recipe=grpo, temperature=1.0)
    assert all(x.is_deleted() for x in arrays)
    assert not any(x.is_deleted() for x in jax.tree.leaves((new, toy_policy[1], experience)))


def test_steps_compile_once_whatever_the_numbers(toy_policy, experience):
    state = init_train_state(*toy_policy, ADAM)
    state, _ = train_step(state, experience, recipe=make_recipe("dapo", kl_coef=0.0), temperature=1.0)
    compiled = train_step._cache_size()
    for n in range(1, 4):
        recipe = make_recipe("dapo", kl_coef=0.1 * n, clip_range=0.1 * n, clip_range_high=0.2 * n)
        state, _ = train_step(state, experience, recipe=recipe, temperature=0.5 * n)
    assert train_step._cache_size() == compiled
    assert state.step == 4


def test_a_coefficient_or_a_reference_that_moves_compiles_nothing(toy_policy, penalized, ref_params):
    state = init_train_state(*toy_policy, ADAM)
    state, _ = train_step(state, penalized, recipe=EXACT, ref_params=ref_params)
    compiled, kls = train_step._cache_size(), []
    for n in range(1, 4):
        recipe = EXACT.replace(kl_coef=0.1 * n, entropy_coef=0.01 * n, max_staleness=None)
        ref_params = mix_params(state.params, ref_params, 0.5)
        state, metrics = train_step(state, penalized, recipe=recipe, ref_params=ref_params)
        kls.append(float(metrics["kl"]))
    assert train_step._cache_size() == compiled
    assert kls[0] > kls[1] > kls[2] > 0  # the reference comes closer


def test_clip_values_take_effect_in_a_compiled_function(toy_policy, experience):
    _, narrow = step(toy_policy, experience, recipe=make_recipe("grpo", clip_range=0.01))
    _, wide = step(toy_policy, experience, recipe=make_recipe("grpo", clip_range=0.9))
    assert narrow["clip_ratio/region_mean"] > 0.3 and wide["clip_ratio/region_mean"] < 0.05


def test_later_passes_over_one_experience_are_off_policy(toy_policy, experience):
    log_probs, _ = completion_log_probs(*toy_policy, experience, temperature=1.0)
    on_policy = experience.replace(old_log_probs=log_probs, ref_log_probs=log_probs)
    state, first = step(toy_policy, on_policy, optimizer=make_optimizer(0.05))
    np.testing.assert_allclose([first["ratio/mean"], first["ratio/max"]], 1, atol=1e-5)
    np.testing.assert_allclose(first["kl"], 0, atol=1e-6)
    assert first["clip_ratio/region_mean"] == 0 and first["grad_norm"] > 0
    _, second = train_step(state, on_policy, recipe=grpo, temperature=1.0)
    assert second["ratio/max"] > 1.2 and second["clip_ratio/region_mean"] > 0 and second["kl"] > 1e-3
    assert second["policy_loss"] < first["policy_loss"]


# Contracts


@pytest.mark.usefixtures("no_shape_checks")
def test_wrong_shapes_raise(toy_policy, experience):
    e = experience
    for wrong in (
        e.replace(weights=e.weights[:, :-1]),
        e.replace(old_log_probs=e.old_log_probs[:, :-1]),
        e.replace(ref_log_probs=e.ref_log_probs[:, :-1]),
        e.replace(mask=e.mask[:, :-1]),
        e.replace(mask=e.mask[0]),
        e.replace(prompt_mask=e.prompt_mask[:, :-1]),
        e.replace(prompt_tokens=e.prompt_tokens[:-1], prompt_mask=e.prompt_mask[:-1]),
        e.replace(advantages=e.advantages[:, None]),
        e.replace(advantages=e.advantages[:-1]),
    ):
        with pytest.raises(AssertionError):
            step(toy_policy, wrong)
    with pytest.raises(ValueError, match="8 rows do not divide into 3"):
        step(toy_policy, e, num_microbatches=3)


# The whole, once


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_policy_learns_to_say_seven(name):
    policy, params = make_toy_policy(seed=3)
    recipe, prompts_count, group_size, length = RECIPES[name], 4, 8, 4
    prompts = Prompts(
        tokens=jnp.arange(prompts_count * 2, dtype=jnp.int32).reshape(prompts_count, 2),
        mask=jnp.ones((prompts_count, 2), bool),
    )
    state, history = init_train_state(policy, params, make_optimizer(0.01)), []
    sampling = {"group_size": group_size, "max_new_tokens": length, "eos_ids": jnp.array([0])}
    for number in range(100):
        key = jax.random.fold_in(jax.random.key(0), number)
        rollout = generate(policy, state.params, prompts, key, **sampling)
        rewards = jnp.sum((rollout.tokens == 7) & rollout.mask, axis=1).astype(jnp.float32)
        reference, _ = completion_log_probs(policy, params, rollout)
        experience = Experience(
            prompt_tokens=rollout.prompt_tokens,
            prompt_mask=rollout.prompt_mask,
            tokens=rollout.tokens,
            mask=rollout.mask,
            advantages=recipe.advantage(rewards.reshape(prompts_count, group_size)).reshape(-1),
            weights=recipe.weights(rollout.mask, max_length=length),
            old_log_probs=rollout.log_probs,
            ref_log_probs=reference,
        )
        state, metrics = train_step(state, experience, recipe=recipe)
        np.testing.assert_allclose(metrics["ratio/max"], 1, atol=1e-4)
        history.append(float(jnp.mean(rewards)))
    assert np.mean(history[:5]) < 1.0 and np.mean(history[-5:]) > 3.0, history[::10]
    assert state.skipped == 0
