import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax.kl import KL_ESTIMATORS, MAX_LOG_RATIO, bounded_exp, kl_k1, kl_k2, kl_k3
from grpo_jax.losses import grpo_loss

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


def test_values_in_expectation():
    with jax.enable_x64(True):
        exact = divergence(THETA, REFERENCE)
        np.testing.assert_allclose(expected_estimate(THETA, kl_k1), exact, rtol=1e-12)
        np.testing.assert_allclose(expected_estimate(THETA, kl_k3), exact, rtol=1e-12)
        assert abs(expected_estimate(THETA, kl_k2) - exact) > 1e-3  # biased


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_mean_gradients_as_a_loss(jit):
    with jax.enable_x64(True):

        def gradient(estimator):
            function = jax.grad(lambda theta: expected_estimate(theta, estimator))
            return (jax.jit(function) if jit else function)(THETA)

        forward = jax.grad(divergence)(THETA, REFERENCE)  # of KL(pi || ref)
        backward = jax.grad(divergence, argnums=1)(REFERENCE, THETA)  # of KL(ref || pi)
        assert np.abs(forward - backward).max() > 0.05
        np.testing.assert_allclose(gradient(kl_k1), 0, atol=1e-15)
        np.testing.assert_allclose(gradient(kl_k2), forward, rtol=1e-12)
        np.testing.assert_allclose(gradient(kl_k3), backward, rtol=1e-12)


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
    with pytest.raises(AssertionError):
        estimator(jnp.zeros(shape), jnp.ones((5, *shape)))


def test_registry():
    assert {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3} == KL_ESTIMATORS
