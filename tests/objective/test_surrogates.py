"""Each surrogate against the loop, token by token or row by row, and where it lets a gradient through."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.objective.surrogates import (
    SURROGATES,
    check_shapes,
    cispo_surrogate,
    clip_keywords,
    clipped_surrogate,
    gmpo_surrogate,
    reinforce_surrogate,
    sapo_surrogate,
    with_mask,
)

ADVANTAGE = pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])


# ---------------------------------------------------------------------------------- token by token
@ADVANTAGE
@pytest.mark.parametrize(
    "clip",
    [
        {},
        {"clip_range": 0.1},
        {"clip_range_high": 0.28},
        {"delta": 1.6},
        {"dual_clip": 2.0},
        {"clip_range": 0.2, "clip_range_high": 0.28, "delta": 1.6, "dual_clip": 1.4},
    ],
    ids=str,
)
def test_clipped_is_the_loop(advantage, clip):
    ratios = np.array([0.01, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 1.5, 1.7, 5.0])
    with jax.enable_x64(True):
        loss, slope = jax.vmap(jax.value_and_grad(lambda d: clipped_surrogate(d, None, advantage, **clip)))(
            jnp.log(ratios)
        )
        expected = [oracle.clipped(rho, advantage, **clip) for rho in ratios]
        np.testing.assert_allclose(loss, [value for value, _ in expected], rtol=1e-12)
        np.testing.assert_allclose(slope, [s for _, s in expected], rtol=1e-12)


@ADVANTAGE
@pytest.mark.parametrize(
    ("surrogate", "name", "clip"),
    [
        (cispo_surrogate, "cispo", {"cap": 5.0}),
        (cispo_surrogate, "cispo", {"cap": 0.6}),
        (sapo_surrogate, "sapo", {"tau": 1.0, "tau_negative": 1.05}),
        (sapo_surrogate, "sapo", {"tau": 3.0, "tau_negative": 0.5}),
        (reinforce_surrogate, "reinforce", {}),
    ],
)
def test_others_are_the_loop(surrogate, name, clip, advantage):
    ratios = np.array([0.01, 0.5, 0.61, 0.99, 1.0, 1.01, 2.0, 4.99, 5.01, 30.0])
    log_probs = -np.linspace(0.1, 3.0, len(ratios))
    with jax.enable_x64(True):
        loss, slopes = jax.vmap(
            jax.value_and_grad(lambda d, x: surrogate(d, x, advantage, **clip), argnums=(0, 1))
        )(jnp.log(ratios), jnp.asarray(log_probs))
        pairs = zip(ratios, log_probs, strict=True)
        expected = [oracle.surrogate(name, rho, x, advantage, **clip) for rho, x in pairs]
        for result, column in zip((loss, *slopes), np.transpose(expected), strict=True):
            np.testing.assert_allclose(result, column, rtol=1e-12, atol=1e-15)
    if name != "cispo" or clip["cap"] > 1:  # at ratio 1 every one of them is the policy gradient
        np.testing.assert_allclose(slopes[0][4] + slopes[1][4], -advantage, rtol=1e-12)
    if advantage:  # and none cuts a gradient
        assert (np.sign(slopes[0] + slopes[1]) == -np.sign(advantage)).all()


@ADVANTAGE
@pytest.mark.parametrize("clip", [{}, {"tau": 5.0, "tau_negative": 7.0}, {"tau": 0.1}], ids=str)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_sapo_keeps_its_digits_in_float32(transform, clip, advantage):
    """The gradient relative to itself, however small, where the gate is shut and where it is almost open."""
    log_ratios = np.log(np.array([1e-4, 0.01, 0.3, 1.0, 1.5, 3.0, 6.0, 9.0, 12.0])).astype(np.float32)
    slope = transform(jax.vmap(jax.grad(lambda d: sapo_surrogate(d, None, advantage, **clip))))
    clip = {"tau": 1.0, "tau_negative": 1.05} | clip
    expected = [
        oracle.surrogate("sapo", np.exp(d), 0.0, advantage, **clip)[1] for d in np.float64(log_ratios)
    ]
    # exp(-x) turns the rounding of x, which is 77 at most here, into a relative error of about 77 * 2^-24.
    np.testing.assert_allclose(slope(log_ratios), expected, rtol=1e-5)


# -------------------------------------------------------------------------------------- row by row
B, T = 6, 5


def random_rows(seed):
    """Log ratios on a grid, so that none stands at a clip border; 0 where masked."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(0, T + 1, (B, 1))
    mask &= rng.random((B, T)) < rng.choice([0.7, 1.0])
    log_ratios = np.round(rng.choice([0.1, 0.5, 2.0]) * rng.standard_normal((B, T)) * 2**10) / 2**10
    advantages = np.where(rng.random(B) < 0.2, 0, rng.standard_normal(B))
    return np.where(mask, log_ratios, 0), advantages, mask, rng.random((B, T))


@jax.jit
def weighted_gmpo(log_ratios, advantages, mask, weights, clip):
    def loss(log_ratios):
        losses = gmpo_surrogate(log_ratios, None, advantages[:, None], mask=mask, **clip)
        return jnp.sum(jnp.where(mask, weights * losses, 0))

    return jax.value_and_grad(loss)(log_ratios)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from([{}, {"log_clip_range": 0.1}, {"log_clip_range": 0.3, "log_clip_range_high": 1.1}]),
)
def test_gmpo_is_the_loop(seed, clip):
    """With weights that differ inside a row too, which no reduction gives but which the loss allows."""
    log_ratios, advantages, mask, weights = random_rows(seed)
    expected, expected_gradient = 0.0, np.zeros((B, T))
    for i in range(B):
        tokens = [t for t in range(T) if mask[i, t]]
        if tokens:
            value, slopes = oracle.gmpo([float(log_ratios[i, t]) for t in tokens], advantages[i], **clip)
            total = sum(weights[i, t] for t in tokens)
            expected += total * value
            expected_gradient[i, tokens] = [total * slope for slope in slopes]
    with jax.enable_x64(True):
        data = [jnp.asarray(x) for x in (log_ratios, advantages, mask, weights)]
        value, gradient = weighted_gmpo(*data, clip)
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
        # The same value at every token of a row, masked ones too.
        losses = np.asarray(gmpo_surrogate(data[0], None, data[1][:, None], mask=data[2], **clip))
        assert losses.shape == (B, T) and (losses == losses[:, :1]).all()


def test_gmpo_by_hand():
    """Three tokens of ratios 1/2, 1, 8 and one beyond the end: the geometric mean, clipped in log space."""
    log_ratios = jnp.log(jnp.array([[0.5, 1.0, 8.0, 1.0]]))
    mask = jnp.array([[True, True, True, False]])

    def row(advantage, low, high):
        clip = {"log_clip_range": np.log(low), "log_clip_range_high": np.log(high)}
        return gmpo_surrogate(log_ratios, None, jnp.array([[advantage]]), mask=mask, **clip)[0, 0]

    np.testing.assert_allclose(row(1.0, 100.0, 100.0), -((0.5 * 8) ** (1 / 3)), rtol=1e-6)
    np.testing.assert_allclose(row(1.0, 100.0, 2.0), -((0.5 * 2) ** (1 / 3)), rtol=1e-6)  # 8 -> 2
    np.testing.assert_allclose(row(1.0, 1.25, 100.0), -((0.5 * 8) ** (1 / 3)), rtol=1e-6)  # only A < 0
    np.testing.assert_allclose(row(-1.0, 1.25, 2.0), (0.8 * 8) ** (1 / 3), rtol=1e-6)  # 1/2 -> 0.8


def test_gmpo_of_an_empty_row_is_finite():
    zeros, mask = jnp.zeros((1, 3)), jnp.zeros((1, 3), bool)
    assert (np.asarray(gmpo_surrogate(zeros, None, jnp.ones((1, 1)), mask=mask)) == -1).all()  # and weighs 0
    for log_ratio in (1e4, -1e4):
        for advantage in (1.0, -1.0):
            value, gradient = jax.value_and_grad(
                lambda d, a=advantage: jnp.sum(gmpo_surrogate(d, None, jnp.full((1, 1), a), mask=~mask))
            )(zeros + log_ratio)
            assert np.isfinite(value) and np.isfinite(gradient).all()


# --------------------------------------------------------------------------------- what all have in common
@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_has_the_one_signature(name):
    mask = jnp.ones((2, 3), bool)
    surrogate = with_mask(SURROGATES[name], mask)
    log_ratios, log_probs = jnp.zeros((2, 3)), jnp.full((2, 3), -1.0)
    for function in (surrogate, jax.jit(surrogate)):
        losses = function(log_ratios, log_probs, jnp.array([[2.0], [-1.0]]))
        assert losses.shape == (2, 3)
        gradient = jax.grad(lambda d, x: jnp.sum(function(d, x, jnp.array([[2.0], [-1.0]]))), argnums=(0, 1))  # noqa: B023
        by_ratio, by_log_prob = gradient(log_ratios, log_probs)
        # At ratio 1 each is the policy gradient, to be minimised.
        np.testing.assert_allclose(by_ratio + by_log_prob, [[-2.0] * 3, [1.0] * 3], rtol=1e-6)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_is_its_loop(name, advantage):
    """A new surrogate needs a row of the oracle and no test of its own. Its numbers are the defaults."""
    rng = np.random.default_rng(0)
    log_ratios, log_probs, weights = 0.4 * rng.normal(size=(3, 12)) - [[0], [2], [-3]]
    function = SURROGATES[name]
    clip = {key: inspect.signature(function).parameters[key].default for key in clip_keywords(function)}
    with jax.enable_x64(True):
        surrogate = with_mask(function, jnp.ones((1, 12), bool))
        total, slopes = jax.value_and_grad(
            lambda d, x: jnp.sum(weights * surrogate(d, x, jnp.full((1, 1), advantage))), argnums=(0, 1)
        )(jnp.asarray(log_ratios[None]), jnp.asarray(log_probs[None]))
        expected, *loops, _ = oracle.row_surrogate(name, log_ratios, log_probs, advantage, weights, **clip)
        np.testing.assert_allclose(total, expected, rtol=1e-12)
        for slope, loop in zip(slopes, loops, strict=True):
            np.testing.assert_allclose(slope[0], loop, rtol=1e-12, atol=1e-15)


def test_with_mask_gives_the_mask_to_those_that_name_it():
    mask = jnp.array([[True, False]])
    for name, surrogate in SURROGATES.items():
        assert (with_mask(surrogate, mask) is surrogate) == (name != "gmpo")
    # Through functools.partial too, which is how the clip keywords arrive.
    partial = functools.partial(gmpo_surrogate, log_clip_range=0.1)
    log_ratios = jnp.array([[0.5, -0.3]])
    result = with_mask(partial, mask)(log_ratios, None, jnp.ones((1, 1)))
    np.testing.assert_allclose(result, -np.exp(0.1), rtol=1e-6)  # the second token is not in the mean


@pytest.mark.usefixtures("no_shape_checks")
def test_a_shape_that_differs_is_named_with_its_argument():
    rows = np.zeros((2, 3))
    check_shapes(log_probs=rows, old_log_probs=None, mask=rows)
    with pytest.raises(
        AssertionError, match=r"\(2, 4\) but expected \(2, 3\).*\[mask \[B,T\], the shape of log_probs"
    ):
        check_shapes(log_probs=rows, mask=np.zeros((2, 4)))
    with pytest.raises(AssertionError, match=r"log_probs \[B,T\]"):
        check_shapes(log_probs=np.zeros(3), mask=rows)
