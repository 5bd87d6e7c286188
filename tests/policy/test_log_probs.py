"""Scoring: values against a float64 loop, chunks and micro-batches inert, and no [B, L, V] anywhere."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from numpy_toy import completion_logits, softmax
from toy import VOCAB, make_toy_policy

from grpo_jax.objective.losses import loss_weights
from grpo_jax.objective.recipes import grpo, make_recipe
from grpo_jax.policy.log_probs import (
    completion_hidden,
    completion_log_probs,
    token_log_probs,
    token_log_probs_and_kls,
)
from grpo_jax.training.learner import experience_loss
from grpo_jax.types import Experience, Rollout

B, S, T = 8, 5, 7
WIDTH = 16


def make_rollout(vocab: int = VOCAB) -> Rollout:
    """Returns a rollout of random tokens, prompts of 1..S tokens and completions of 0..T, junk as padding."""
    rng = np.random.default_rng(0)
    prompt_sizes, sizes = rng.integers(1, S + 1, (B, 1)), np.array([[7, 0, 1, 3, 7, 2, 5, 6]]).T
    return Rollout(
        prompt_tokens=jnp.asarray(rng.integers(0, vocab, (B, S)), jnp.int32),
        prompt_mask=jnp.asarray(np.arange(S) >= S - prompt_sizes),
        tokens=jnp.asarray(rng.integers(0, vocab, (B, T)), jnp.int32),
        mask=jnp.asarray(np.arange(T) < sizes),
        log_probs=jnp.zeros((B, T)),
        kept_mass=jnp.ones((B, T)),
        finished=jnp.ones(B, bool),
    )


ROLLOUT = make_rollout()


def make_experience(rollout: Rollout) -> Experience:
    noise = jax.random.normal(jax.random.key(1), (3, *rollout.mask.shape))
    return Experience(
        prompt_tokens=rollout.prompt_tokens,
        prompt_mask=rollout.prompt_mask,
        tokens=rollout.tokens,
        mask=rollout.mask,
        advantages=noise[2, :, 0],
        weights=loss_weights(rollout.mask),
        old_log_probs=-3 + noise[0],
        ref_log_probs=-3 + noise[1],
    )


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_values_and_entropies_equal_a_literal_loop(toy_policy, temperature):
    log_probs, entropies = jax.device_get(completion_log_probs(*toy_policy, ROLLOUT, temperature=temperature))
    chex.assert_shape([log_probs, entropies], (B, T))
    chex.assert_type([log_probs, entropies], jnp.float32)
    for row in range(B):
        probs = softmax(completion_logits(toy_policy[1], ROLLOUT, row) / temperature)
        n = len(probs)
        for t in range(n):
            np.testing.assert_allclose(log_probs[row, t], np.log(probs[t, ROLLOUT.tokens[row, t]]), atol=3e-5)
            np.testing.assert_allclose(entropies[row, t], -np.sum(probs[t] * np.log(probs[t])), atol=3e-5)
        assert not np.any(log_probs[row, n:]) and not np.any(entropies[row, n:])


def test_temperature_zero_counts_as_one(toy_policy):
    chex.assert_trees_all_equal(
        completion_log_probs(*toy_policy, ROLLOUT, temperature=0.0),
        completion_log_probs(*toy_policy, ROLLOUT, temperature=1.0),
    )


def test_padding_and_its_content_change_nothing(toy_policy):
    expected = completion_log_probs(*toy_policy, ROLLOUT, temperature=1.0)
    other = ROLLOUT.replace(
        prompt_tokens=jnp.where(ROLLOUT.prompt_mask, ROLLOUT.prompt_tokens, 1),
        tokens=jnp.where(ROLLOUT.mask, ROLLOUT.tokens, 2),
    )
    chex.assert_trees_all_close(
        completion_log_probs(*toy_policy, other, temperature=1.0), expected, atol=1e-6
    )
    wider = other.replace(
        prompt_tokens=jnp.pad(other.prompt_tokens, ((0, 0), (4, 0))),
        prompt_mask=jnp.pad(other.prompt_mask, ((0, 0), (4, 0))),
        tokens=jnp.pad(other.tokens, ((0, 0), (0, 3)), constant_values=6),
        mask=jnp.pad(other.mask, ((0, 0), (0, 3))),
        log_probs=None,
        kept_mass=None,
    )
    log_probs, entropies = completion_log_probs(*toy_policy, wider, temperature=1.0)
    chex.assert_trees_all_close((log_probs[:, :T], entropies[:, :T]), expected, atol=1e-5)
    assert not np.any(log_probs[:, T:]) and not np.any(entropies[:, T:])


def test_rows_do_not_depend_on_each_other(toy_policy):
    order = np.random.default_rng(1).permutation(B)
    permuted = completion_log_probs(*toy_policy, jax.tree.map(lambda x: x[order], ROLLOUT), temperature=1.0)
    expected = completion_log_probs(*toy_policy, ROLLOUT, temperature=1.0)
    chex.assert_trees_all_close(permuted, jax.tree.map(lambda x: x[order], expected), atol=1e-6)


# Exact KL


@pytest.fixture(scope="module")
def ref_params(toy_policy):
    noise = jax.random.split(jax.random.key(3), len(toy_policy[1]))
    return {
        name: x + 0.2 * jax.random.normal(key, x.shape)
        for key, (name, x) in zip(noise, sorted(toy_policy[1].items()), strict=True)
    }


def log_probs_and_kls(toy_policy, params, ref_params, **settings):
    policy, _ = toy_policy
    hidden, ref_hidden = (completion_hidden(policy, p, ROLLOUT) for p in (params, ref_params))
    return token_log_probs_and_kls(policy, params, ref_params, hidden, ref_hidden, ROLLOUT.tokens, **settings)


@pytest.mark.parametrize(("temperature", "chunk_size"), [(1.0, 3), (0.5, B * T), (2.0, B * T + 1)])
def test_exact_kls_equal_a_literal_loop(toy_policy, ref_params, temperature, chunk_size):
    params, settings = toy_policy[1], {"temperature": temperature, "chunk_size": chunk_size}
    log_probs, entropies, kls = log_probs_and_kls(toy_policy, params, ref_params, **settings)
    alone = completion_log_probs(*toy_policy, ROLLOUT, temperature=temperature)
    mask = ROLLOUT.mask
    chex.assert_trees_all_close((log_probs * mask, entropies * mask), alone, atol=1e-5)
    chex.assert_type(kls, jnp.float32)
    for row in range(B):
        p, r = (softmax(completion_logits(x, ROLLOUT, row) / temperature) for x in (params, ref_params))
        for t in range(len(p)):
            expected = sum(p[t, v] * (np.log(p[t, v]) - np.log(r[t, v])) for v in range(VOCAB))
            np.testing.assert_allclose(kls[row, t], expected, atol=3e-5, rtol=1e-4)
    _, _, itself = log_probs_and_kls(toy_policy, params, params, **settings)
    np.testing.assert_allclose(itself, 0, atol=1e-6)


def test_gradients_of_the_exact_kl_reach_the_policy_and_not_the_reference(toy_policy, ref_params):
    policy, params = toy_policy

    def chunked(params, ref_params):
        return jnp.sum(log_probs_and_kls(toy_policy, params, ref_params, chunk_size=5)[2] * ROLLOUT.mask)

    def dense(params, ref_params):
        all_log_probs = [
            jax.nn.log_softmax(policy.unembed(p, completion_hidden(policy, p, ROLLOUT)))
            for p in (params, ref_params)
        ]
        kls = jnp.sum(jnp.exp(all_log_probs[0]) * (all_log_probs[0] - all_log_probs[1]), axis=-1)
        return jnp.sum(kls * ROLLOUT.mask)

    grads, ref_grads = jax.jit(jax.grad(chunked, argnums=(0, 1)))(params, ref_params)
    expected = jax.jit(jax.grad(dense))(params, ref_params)
    chex.assert_trees_all_close(grads, expected, atol=2e-5, rtol=1e-4)
    assert not any(np.any(x) for x in jax.tree.leaves(ref_grads))


# Chunks and micro-batches


@pytest.fixture(scope="module")
def values_and_grads(toy_policy):
    """A function: fn(params, hidden) -> (log_probs, entropies) to their values and gradients."""
    policy, params = toy_policy
    hidden = completion_hidden(policy, params, ROLLOUT)
    # One direction for each output, so that both have a gradient.
    directions = jax.random.normal(jax.random.key(2), (2, B, T))

    def evaluate(fn):
        def scalar(params, hidden):
            values = fn(params, hidden)
            return jnp.sum(directions * jnp.stack(values)), values

        (_, values), grads = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(params, hidden)
        return values, grads

    return evaluate


@pytest.fixture(scope="module")
def full(toy_policy, values_and_grads):
    """Values and gradients with all logits at once."""

    def score(params, hidden):
        log_probs = jax.nn.log_softmax(toy_policy[0].unembed(params, hidden) / 1.3)
        entropies = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return jnp.take_along_axis(log_probs, ROLLOUT.tokens[..., None], axis=-1)[..., 0], entropies

    return values_and_grads(score)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, B * T, B * T + 1])
def test_chunks_change_neither_values_nor_gradients(toy_policy, values_and_grads, full, chunk_size):
    def score(params, hidden):
        return token_log_probs(
            toy_policy[0], params, hidden, ROLLOUT.tokens, temperature=1.3, chunk_size=chunk_size
        )

    values, grads = values_and_grads(score)
    chex.assert_trees_all_close(values, full[0], atol=1e-6, rtol=1e-6)
    chex.assert_trees_all_close(grads, full[1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_microbatches", [2, 8])
def test_microbatches_change_nothing(toy_policy, num_microbatches):
    expected = completion_log_probs(*toy_policy, ROLLOUT, temperature=1.0)
    sliced = completion_log_probs(
        *toy_policy, ROLLOUT, temperature=1.0, num_microbatches=num_microbatches, chunk_size=5
    )
    chex.assert_trees_all_close(sliced, expected, atol=1e-6, rtol=1e-6)


def test_microbatches_that_do_not_divide_the_batch_raise(toy_policy):
    with pytest.raises(ValueError, match="8 rows do not divide into 3"):
        completion_log_probs(*toy_policy, ROLLOUT, num_microbatches=3)


# Memory


def largest_array(jaxpr) -> tuple[int, str]:
    """Returns (elements, where) of the largest intermediate result, inner jaxprs included."""
    largest = (0, "")
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            largest = max(largest, (math.prod(out.aval.shape), f"{equation.primitive}: {out.aval}"))
        for inner in jaxprs_in_params(equation.params):
            largest = max(largest, largest_array(inner))
    return largest


@pytest.fixture(scope="module")
def large_vocabulary():
    """A policy whose [B,T,V] dwarfs its parameters, and a rollout for it."""
    return (*make_toy_policy(vocab=997), make_rollout(997))


BIG = 997 * B * T
CHUNK = 4


def test_scoring_never_holds_the_logits_of_all_tokens(large_vocabulary):
    policy, params, rollout = large_vocabulary

    def elements(chunk_size):
        jaxpr = jax.make_jaxpr(
            lambda params, rollout: completion_log_probs(policy, params, rollout, chunk_size=chunk_size)
        )(params, rollout)
        return largest_array(jaxpr.jaxpr)

    assert elements(B * T)[0] >= BIG  # the walk does see inside
    assert elements(CHUNK)[0] < BIG / 3, elements(CHUNK)


@pytest.mark.parametrize("kl_estimator", ["k3", "exact"])
def test_the_gradient_never_holds_the_logits_of_all_tokens(large_vocabulary, kl_estimator):
    policy, params, rollout = large_vocabulary
    experience = make_experience(rollout)
    recipe = make_recipe("grpo", kl_estimator=kl_estimator, entropy_coef=0.1)
    ref_params = params if recipe.exact_kl else None  # two sets of logits then, of one chunk at a time

    def grad(chunk_size):
        return jax.grad(
            lambda params, ref_params, experience: experience_loss(
                params,
                policy,
                experience,
                recipe=recipe,
                ref_params=ref_params,
                temperature=1.0,
                chunk_size=chunk_size,
            )[0]
        )

    def elements(chunk_size):
        return largest_array(jax.make_jaxpr(grad(chunk_size))(params, ref_params, experience).jaxpr)

    assert elements(B * T)[0] >= BIG
    assert elements(CHUNK)[0] < BIG / 3, elements(CHUNK)
    # What the compiler needs besides the arguments and results agrees: well below the float32 logits.
    memory = jax.jit(grad(CHUNK)).lower(params, ref_params, experience).compile().memory_analysis()
    assert memory.temp_size_in_bytes < BIG * 4


def test_the_gradient_accumulates_only_what_unembed_uses(large_vocabulary):
    # A loop over chunks that carried zeros for every parameter would cost a second copy of the model.
    policy, params, rollout = large_vocabulary
    hidden = jnp.ones((B, T, WIDTH))
    jaxpr = jax.make_jaxpr(
        jax.grad(
            lambda params: jnp.sum(
                token_log_probs(policy, params, hidden, rollout.tokens, chunk_size=CHUNK)[0]
            )
        )
    )(params)
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    carried = [out.aval.shape for scan in scans for out in scan.outvars[: scan.params["num_carry"]]]
    assert carried == [(WIDTH, 997)]


# Numbers at the edge


def test_minus_infinity_in_the_logits_gives_finite_values_and_gradients():
    toy, params = make_toy_policy()
    # Model and tokenizer may disagree about the vocabulary: the tail of the logits is -inf then.
    policy = toy.replace(
        unembed=lambda params, hidden: jnp.where(jnp.arange(VOCAB) < 9, hidden @ params["head"], -jnp.inf)
    )
    rollout = ROLLOUT.replace(tokens=ROLLOUT.tokens % 9)
    log_probs, entropies = completion_log_probs(policy, params, rollout, chunk_size=5)
    probs = [softmax(completion_logits(params, rollout, row)[:, :9]) for row in range(B)]
    for row, p in enumerate(probs):
        np.testing.assert_allclose(entropies[row, : len(p)], -np.sum(p * np.log(p), axis=-1), atol=3e-5)
    assert np.all(np.isfinite(log_probs))

    def loss(params):
        return experience_loss(
            params, policy, make_experience(rollout), recipe=grpo, temperature=1.0, chunk_size=5
        )[0]

    chex.assert_tree_all_finite(jax.jit(jax.grad(loss))(params))


def test_huge_logits_give_finite_values():
    policy, params = make_toy_policy()
    params["head"] = params["head"] * 1e30
    log_probs, entropies = completion_log_probs(policy, params, ROLLOUT)
    assert np.all(np.isfinite(log_probs)) and np.all(np.isfinite(entropies))
    np.testing.assert_allclose(entropies, 0, atol=1e-6)


def test_low_precision_hidden_states_are_scored_in_float32():
    toy, params = make_toy_policy()
    policy = toy.replace(unembed=lambda params, hidden: (hidden @ params["head"]).astype(jnp.bfloat16))
    log_probs, _ = completion_log_probs(policy, params, ROLLOUT)
    assert log_probs.dtype == jnp.float32
    # bfloat16 logits cost their rounding, but a normaliser summed in bfloat16 would cost more.
    expected, _ = completion_log_probs(toy, params, ROLLOUT)
    np.testing.assert_allclose(log_probs, expected, atol=0.04)


# Contracts


def test_new_temperature_compiles_nothing(toy_policy):
    completion_log_probs(*toy_policy, ROLLOUT, temperature=1.0)
    compiled = completion_log_probs._cache_size()
    for temperature in (0.1, 0.7, 3.0):
        completion_log_probs(*toy_policy, ROLLOUT, temperature=temperature)
    assert completion_log_probs._cache_size() == compiled


@pytest.mark.usefixtures("no_shape_checks")
def test_hidden_and_tokens_of_different_shape_raise(toy_policy):
    policy, params = toy_policy
    with pytest.raises(AssertionError):
        token_log_probs(policy, params, jnp.zeros((2, 3, WIDTH)), jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(AssertionError):
        completion_log_probs(policy, params, ROLLOUT.replace(mask=ROLLOUT.mask[0]))


def test_eager_equals_jitted(toy_policy):
    with jax.disable_jit():
        eager = completion_log_probs(*toy_policy, ROLLOUT, temperature=1.0)
    chex.assert_trees_all_close(eager, completion_log_probs(*toy_policy, ROLLOUT, temperature=1.0), atol=1e-5)
