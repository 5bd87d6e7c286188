"""Estimators of KL by loops, and the table of the module's docstring, line by line, on a categorical."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import shape_checks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax.objective.kl import (
    KL_ESTIMATORS,
    MAX_LOG_RATIO,
    adapt_kl_coef,
    bounded_exp,
    kl_exact,
    kl_k1,
    kl_k2,
    kl_k3,
)
from grpo_jax.objective.losses import grpo_loss
from grpo_jax.objective.recipes import rloo
from grpo_jax.objective.shaping import kl_penalty

V = 5
THETA = np.array([0.3, -1.2, 0.9, 0.0, -0.4])
REFERENCE = np.array([-0.5, 0.4, 0.2, 1.1, -2.0])
LOG_PROBS = hnp.arrays(np.float32, (7,), elements=st.floats(-12, 0, width=32))
JITTED = {
    name: jax.jit(jax.value_and_grad(lambda log_probs, ref, f=f: jnp.sum(f(log_probs, ref))))
    for name, f in KL_ESTIMATORS.items()
}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(LOG_PROBS, LOG_PROBS, st.sampled_from(sorted(KL_ESTIMATORS)))
def test_matches_the_loop(log_probs, ref_log_probs, name):
    value, gradient = JITTED[name](log_probs, ref_log_probs)
    terms = [oracle.kl(name, *map(float, pair)) for pair in zip(log_probs, ref_log_probs, strict=True)]
    np.testing.assert_allclose(value, sum(v for v, _ in terms), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, [g for _, g in terms], rtol=1e-5, atol=1e-5)


def expected_estimate(theta, estimator):
    """E over samples of pi of the estimator, exactly; differentiated as a loss is, token by token."""
    log_probs = jax.nn.log_softmax(theta)
    sampled = jax.lax.stop_gradient(jnp.exp(log_probs))
    return jnp.sum(sampled * estimator(log_probs, jax.nn.log_softmax(REFERENCE)))


def divergence(p_logits, q_logits):
    p, q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(p) * (p - q))


def loss_of_all_tokens(theta, name):
    """The KL term of grpo_loss on policy, one row per token, weighed by how often it is sampled."""
    estimator = KL_ESTIMATORS.get(name.removeprefix("ratio_"))
    log_probs, ref = (jax.nn.log_softmax(logits)[:, None] for logits in (theta, REFERENCE))
    kls = kl_exact(theta, jnp.asarray(REFERENCE)) if name == "exact" else None
    loss, _ = grpo_loss(
        log_probs,
        jax.lax.stop_gradient(log_probs),
        jnp.zeros(V),
        jnp.ones((V, 1), bool),
        jnp.exp(log_probs),
        ref_log_probs=ref,
        kl_estimator=estimator,
        kl_coef=1.0,
        kl_ratio_corrected=name.startswith("ratio_"),
        kls=None if kls is None else jnp.full((V, 1), kls),
    )
    return loss


NO_GRADIENT, FORWARD, BACKWARD = "zero", "of KL(pi || ref)", "of KL(ref || pi)"


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("name", "unbiased", "gradient"),
    [
        ("k1", True, NO_GRADIENT),
        ("k2", False, FORWARD),
        ("k3", True, BACKWARD),
        ("ratio_k1", True, FORWARD),
        ("ratio_k3", True, FORWARD),
        ("exact", True, FORWARD),
    ],
)
def test_the_table_in_the_docstring(name, unbiased, gradient, jit):
    with jax.enable_x64(True):
        function = jax.value_and_grad(functools.partial(loss_of_all_tokens, name=name))
        value, actual = (jax.jit(function) if jit else function)(jnp.asarray(THETA))
        exact = divergence(THETA, REFERENCE)
        if unbiased:
            np.testing.assert_allclose(value, exact, rtol=1e-12)
        else:
            assert abs(value - exact) > 1e-3
        gradients = {
            NO_GRADIENT: np.zeros(V),
            FORWARD: jax.grad(divergence)(THETA, REFERENCE),
            BACKWARD: jax.grad(divergence, argnums=1)(REFERENCE, THETA),
        }
        np.testing.assert_allclose(actual, gradients[gradient], rtol=1e-12, atol=1e-15)
        for x, y in itertools.combinations(gradients.values(), 2):  # three directions, well apart
            assert np.abs(x - y).max() > 0.05


def test_k1_has_a_high_variance_and_the_others_a_low_one():
    """Near the reference, where training is; one number per token that may be sampled."""
    with jax.enable_x64(True):
        log_probs = jax.nn.log_softmax(THETA)
        ref = jax.nn.log_softmax(THETA + 0.1 * (REFERENCE - THETA))
        probs = np.exp(log_probs)
        values = {name: np.asarray(f(log_probs, ref)) for name, f in KL_ESTIMATORS.items()}
        variance = {name: probs @ x**2 - (probs @ x) ** 2 for name, x in values.items()}
        assert variance["k1"] > 20 * max(variance["k2"], variance["k3"])
        assert (values["k1"] < 0).any() and (values["k2"] >= 0).all() and (values["k3"] >= 0).all()


def test_estimates_in_expectation_are_sums_over_tokens():
    """The estimators by themselves, without the loss around them."""
    with jax.enable_x64(True):
        exact = divergence(THETA, REFERENCE)
        np.testing.assert_allclose(expected_estimate(THETA, kl_k1), exact, rtol=1e-12)
        np.testing.assert_allclose(expected_estimate(THETA, kl_k3), exact, rtol=1e-12)
        np.testing.assert_allclose(jax.grad(expected_estimate)(THETA, kl_k1), 0, atol=1e-15)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("sampler", [THETA, np.array([0.1, -0.6, 0.2, 0.7, -0.9])], ids=["on", "off"])
@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_ratio_corrected_gradient_is_that_of_the_divergence(estimator, sampler, jit):
    """rho * k1 and rho * k3 through `grpo_loss`: one row per token, weighed by how often it is sampled.

    On the policy (rho is 1 in value) and off it: rho makes the samples of another policy count as pi's.
    """
    with jax.enable_x64(True):
        old, ref = (jax.nn.log_softmax(logits)[:, None] for logits in (sampler, REFERENCE))

        def penalty(theta):
            loss, metrics = grpo_loss(
                jax.nn.log_softmax(theta)[:, None],
                old,
                jnp.zeros(V),
                jnp.ones((V, 1), bool),
                jnp.exp(old),
                ref_log_probs=ref,
                kl_estimator=estimator,
                kl_coef=1.0,
                kl_ratio_corrected=True,
            )
            return loss, metrics.ratio_max

        function = jax.value_and_grad(penalty, has_aux=True)
        (value, ratio_max), gradient = (jax.jit(function) if jit else function)(THETA)
        np.testing.assert_allclose(value, divergence(THETA, REFERENCE), rtol=1e-12)
        np.testing.assert_allclose(gradient, jax.grad(divergence)(THETA, REFERENCE), rtol=1e-12)
        assert (ratio_max == 1) == (sampler is THETA)


# --------------------------------------------------------------------------------- KL in the reward
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_minus_k1_in_the_reward_is_the_gradient_of_minus_the_divergence(baseline):
    """All completions of two tokens, the second depending on the first: what RLOO does, in expectation.

    A baseline that does not depend on the completion (as the mean of the others does not) changes nothing.
    """
    rng = np.random.default_rng(0)
    first, second, ref_first, ref_second = (rng.standard_normal(shape) for shape in ((3,), (3, 3)) * 2)
    sequences = np.array(list(itertools.product(range(3), repeat=2)))
    mask = jnp.ones((9, 2), bool)

    def log_probs_of(first, second):
        a, b = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
        return jnp.stack([a[sequences[:, 0]], b[sequences[:, 0], sequences[:, 1]]], axis=1)

    def loss(params):
        log_probs = log_probs_of(*params)
        advantages = -kl_penalty(log_probs, ref, mask) - baseline
        # sequence_sum without its 1 / B, times how often the completion is sampled.
        weights = 9 * rloo.weights(mask, max_length=2) * jnp.exp(jnp.sum(log_probs, axis=1, keepdims=True))
        return rloo.loss(log_probs, jax.lax.stop_gradient(log_probs), advantages, mask, weights, ref)[0]

    def minus_divergence(params):
        joint, ref_joint = (jnp.sum(x, axis=1) for x in (log_probs_of(*params), ref))
        return -jnp.sum(jnp.exp(joint) * (joint - ref_joint))

    with jax.enable_x64(True):
        ref = log_probs_of(jnp.asarray(ref_first), jnp.asarray(ref_second))
        params = (jnp.asarray(first), jnp.asarray(second))
        gradient = jax.grad(loss)(params)
        # The loss goes down where the reward goes up.
        expected = jax.grad(lambda p: -minus_divergence(p))(params)
        assert min(np.abs(x).max() for x in expected) > 0.05
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14), gradient, expected
        )


# ------------------------------------------------------------------------------------------ exact KL
exact_value_and_grad = jax.jit(jax.value_and_grad(lambda x, y: jnp.sum(kl_exact(x, y))))
LOGITS = hnp.arrays(np.float64, (3, V), elements=st.floats(-20, 20))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LOGITS, LOGITS)
def test_exact_kl_is_the_loop(logits, ref_logits):
    terms = [oracle.kl_exact(list(z), list(q)) for z, q in zip(logits, ref_logits, strict=True)]
    with jax.enable_x64(True):
        value, gradient = exact_value_and_grad(jnp.asarray(logits), jnp.asarray(ref_logits))
        np.testing.assert_allclose(value, sum(v for v, _ in terms), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gradient, [g for _, g in terms], rtol=1e-12, atol=1e-12)
        each = kl_exact(jnp.asarray(logits), jnp.asarray(ref_logits))
        np.testing.assert_allclose(each, [v for v, _ in terms], rtol=1e-12, atol=1e-12)
    value, gradient = exact_value_and_grad(np.float32(logits), np.float32(ref_logits))
    np.testing.assert_allclose(value, sum(v for v, _ in terms), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(gradient, [g for _, g in terms], rtol=1e-4, atol=1e-4)


def test_exact_kl_of_impossible_tokens():
    """-inf is a masked vocabulary: probability 0, of pi or of both; its logit gets no gradient."""
    logits = np.array([0.3, -np.inf, 0.9, -np.inf, -0.4], np.float32)
    for ref_logits in (REFERENCE, np.where(np.isinf(logits), -np.inf, REFERENCE)):
        value, gradient = exact_value_and_grad(logits, np.float32(ref_logits))
        expected, slopes = oracle.kl_exact(list(map(float, logits)), list(ref_logits))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, slopes, atol=1e-6)
        assert gradient[1] == gradient[3] == 0
    # What pi may draw and the reference may not is infinitely far.
    assert exact_value_and_grad(np.float32(REFERENCE), logits)[0] == np.inf


def test_exact_kl_is_zero_at_the_reference_and_depends_on_no_constant():
    logits = jnp.array([THETA, REFERENCE])
    np.testing.assert_allclose(kl_exact(logits, logits + 3.0), 0, atol=1e-6)
    np.testing.assert_allclose(exact_value_and_grad(logits, logits - 7.0)[1], 0, atol=1e-6)
    value, gradient = exact_value_and_grad(jnp.array([1e4, 0.0]), jnp.array([0.0, 1e4]))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    with shape_checks.off(), pytest.raises(AssertionError):
        kl_exact(logits, logits[:1])


# --------------------------------------------------------------------------------- the moving coefficient
@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (0.1, 0.5),  # at the target
        (0.11, 0.5 * 1.01),  # a tenth above it, gain 0.1
        (0.09, 0.5 * 0.99),
        (0.12, 0.5 * 1.02),  # the edge of the clip
        (9.0, 0.5 * 1.02),
        (0.08, 0.5 * 0.98),
        (0.0, 0.5 * 0.98),
        (-1.0, 0.5 * 0.98),  # k1 may be negative
        (float("nan"), 0.5),
        (float("inf"), 0.5),
        (-float("inf"), 0.5),
    ],
)
def test_adapt_kl_coef_by_value(measured, expected):
    for function in (adapt_kl_coef, jax.jit(adapt_kl_coef)):
        np.testing.assert_allclose(function(0.5, measured, kl_target=0.1), expected, rtol=1e-6)
        half = expected if expected == 0.5 else 0.5 + (expected - 0.5) / 2
        np.testing.assert_allclose(
            function(0.5, measured, kl_target=0.1, kl_adaptation=0.05), half, rtol=1e-6
        )
    assert adapt_kl_coef(0.5, measured, kl_target=0.1, kl_adaptation=0.0) == 0.5


def test_adapt_kl_coef_stays_above_zero():
    """At the start KL is 0 and the coefficient falls; a coefficient of 0 would never rise again."""
    for kl_adaptation, steps in [(0.1, 2000), (4.9, 15)]:
        kl_coef = jnp.float32(0.1)
        for _ in range(steps):
            kl_coef = adapt_kl_coef(kl_coef, 0.0, kl_target=0.1, kl_adaptation=kl_adaptation)
        assert 0 < kl_coef < 1e-15
        assert adapt_kl_coef(kl_coef, 1.0, kl_target=0.1, kl_adaptation=kl_adaptation) > kl_coef


@pytest.mark.parametrize("start", [1e-3, 10.0])
def test_adapt_kl_coef_converges_to_the_target(start):
    """A categorical that wants reward and pays kl_coef * KL: what is best for it has a closed form."""
    rewards, ref, target = jnp.array([1.0, 0.0, 0.3, 0.9, 0.1]), jnp.asarray(REFERENCE), 0.3

    @jax.jit
    def kl_of_the_best(kl_coef):  # pi = softmax(log ref + r / kl_coef)
        return kl_exact(ref + rewards / kl_coef, ref)

    kl_coef = start
    for _ in range(1000):
        kl_coef = adapt_kl_coef(kl_coef, kl_of_the_best(kl_coef), kl_target=target)
    np.testing.assert_allclose(kl_of_the_best(kl_coef), target, rtol=1e-3)


# ------------------------------------------------------------------------------------- the estimators
@pytest.mark.parametrize("estimator", KL_ESTIMATORS.values())
def test_zero_at_the_reference(estimator):
    log_probs = jnp.log(jnp.array([0.5, 1e-6, 1.0]))
    assert (np.asarray(estimator(log_probs, log_probs)) == 0).all()
    if estimator is not kl_k1:
        assert (np.asarray(jax.grad(lambda x: jnp.sum(estimator(x, log_probs)))(log_probs)) == 0).all()


def test_k2_and_k3_are_not_negative():
    log_probs, ref_log_probs = -jnp.abs(jax.random.normal(jax.random.key(0), (2, 1000))) * 4
    assert (np.asarray(kl_k2(log_probs, ref_log_probs)) >= 0).all()
    # k3 is a difference of numbers near 1 where the two agree: below 0 by rounding only.
    assert (np.asarray(kl_k3(log_probs, ref_log_probs)) >= -1e-6).all()
    assert (np.asarray(kl_k1(log_probs, ref_log_probs)) < 0).any()


@pytest.mark.parametrize("difference", [1e4, -1e4, 200.0, -200.0])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS.values())
def test_runaway_tokens_stay_finite(estimator, difference):
    for function in (estimator, jax.jit(estimator)):
        value, gradient = jax.value_and_grad(function)(jnp.float32(difference), jnp.float32(0))
        assert np.isfinite(value) and np.isfinite(gradient)


def test_bounded_exp():
    x = jnp.array([-1e4, -1.0, 0.0, 3.0, MAX_LOG_RATIO - 1, MAX_LOG_RATIO + 1, 1e4])
    np.testing.assert_allclose(bounded_exp(x)[:5], np.exp(np.float64(x[:5])), rtol=1e-5)
    assert np.isfinite(bounded_exp(x)).all()
    slopes = jax.vmap(jax.grad(bounded_exp))(x)
    assert (np.asarray(slopes[-2:]) == 0).all() and (np.asarray(slopes[1:5]) > 0).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS.values())
def test_shapes(estimator, shape):
    chex.assert_shape(estimator(jnp.zeros(shape), jnp.ones(shape)), shape)
    chex.assert_shape(jax.jit(estimator)(jnp.zeros(shape), jnp.ones(shape)), shape)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("estimator", KL_ESTIMATORS.values())
def test_shapes_must_agree(estimator):
    for shape in ((), (3,), (2, 3), (2, 3, 4)):
        with pytest.raises(AssertionError):
            estimator(jnp.zeros(shape), jnp.ones((5, *shape)))


def test_registry():
    assert {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3} == KL_ESTIMATORS
