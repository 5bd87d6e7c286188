from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.objective.shaping import importance_weights, kl_penalty, overlong_penalty, top_entropy_mask

FAST = settings(max_examples=150, deadline=None, derandomize=True)
B, T = 6, 5
JUNK = (np.nan, np.inf, -np.inf, 1e30)
# Share and cap are traced.
jitted_kl_penalty, jitted_top_entropy_mask, jitted_importance_weights = map(
    jax.jit, (kl_penalty, top_entropy_mask, importance_weights)
)


def random_rows(seed):
    """Two arrays of log-probs [B,T] and a mask with empty rows and holes."""
    rng = np.random.default_rng(seed)
    log_probs = -rng.exponential(1.0, (B, T)).astype(np.float32)
    other = log_probs + rng.choice([0.01, 0.5, 3.0]) * rng.standard_normal((B, T)).astype(np.float32)
    mask = np.arange(T) < rng.integers(0, T + 1, (B, 1))
    return log_probs, other.astype(np.float32), mask & (rng.random((B, T)) < rng.choice([0.7, 1.0]))


# ---------------------------------------------------------------------------------- overlong_penalty
@pytest.mark.parametrize(("max_length", "buffer"), [(10, 4), (10, 1), (10, 10), (64, 13), (1, 1)])
def test_overlong_penalty_is_the_loop(max_length, buffer):
    lengths = np.arange(max_length + 3)  # beyond the limit too: the third case of equation 13
    expected = [oracle.overlong(int(n), max_length=max_length, buffer=buffer) for n in lengths]
    for function in (overlong_penalty, jax.jit(overlong_penalty, static_argnames=("max_length", "buffer"))):
        result = function(lengths, max_length=max_length, buffer=buffer)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_overlong_penalty_with_the_numbers_of_the_paper():
    """DAPO, section 4.1: 16,384 tokens are expected, 4,096 more are the buffer."""
    lengths = jnp.array([[0, 16_384, 16_385], [18_432, 20_480, 30_000]])
    result = overlong_penalty(lengths, max_length=20_480, buffer=4096)
    np.testing.assert_array_equal(result, [[0, 0, -1 / 4096], [-0.5, -1, -1]])


@pytest.mark.parametrize("buffer", [0, -1, 11])
def test_overlong_penalty_refuses_a_buffer_outside_the_limit(buffer):
    with pytest.raises(ValueError, match=f"buffer: {buffer}; between 1 and max_length, 10 tokens"):
        overlong_penalty(jnp.array([3]), max_length=10, buffer=buffer)


# ---------------------------------------------------------------------------------------- kl_penalty
@FAST
@given(st.integers(0, 10**6))
def test_kl_penalty_is_the_loop(seed):
    log_probs, ref_log_probs, mask = random_rows(seed)
    result = jitted_kl_penalty(log_probs, ref_log_probs, mask)
    chex.assert_shape(result, (B,))
    np.testing.assert_allclose(
        result, oracle.kl_in_reward(log_probs, ref_log_probs, mask), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(kl_penalty(log_probs, ref_log_probs, mask), result, rtol=1e-6, atol=1e-6)
    for junk in JUNK:
        dirty = [np.where(mask, x, np.float32(junk)) for x in (log_probs, ref_log_probs)]
        np.testing.assert_array_equal(jitted_kl_penalty(*dirty, mask), result)


# ---------------------------------------------------------------------------------- top_entropy_mask
SHARES = st.one_of(
    st.integers(1, 100).map(lambda i: Fraction(i, 100)),
    st.sampled_from([Fraction(1, 3), Fraction(1, 7), Fraction(1, 10**6)]),
)


@FAST
@given(st.integers(0, 10**6), SHARES, st.booleans())
def test_top_entropy_mask_is_the_loop(seed, share, with_ties):
    _, entropies, mask = random_rows(seed)
    entropies = np.abs(entropies)
    entropies = np.round(entropies) if with_ties else entropies
    expected = np.zeros((B, T), bool)
    for row, column in oracle.top_entropies(entropies, mask, share) if mask.any() else ():
        expected[row, column] = True
    for function in (top_entropy_mask, jitted_top_entropy_mask):
        result = function(entropies, mask, share=float(share))
        assert result.dtype == bool
        np.testing.assert_array_equal(result, expected)
    for junk in JUNK:
        dirty = np.where(mask, entropies, np.float32(junk))
        np.testing.assert_array_equal(jitted_top_entropy_mask(dirty, mask, share=float(share)), expected)
    padded = jitted_top_entropy_mask(np.pad(entropies, 1), np.pad(mask, 1), share=float(share))
    np.testing.assert_array_equal(padded, np.pad(expected, 1))


def test_the_number_of_tokens_is_exact_in_float32():
    """0.6 * 105 is more than 63 in float32; a share is a share for every number of tokens up to 2,000."""
    entropies = jnp.arange(2000.0)[None]
    masks = jnp.tril(jnp.ones((2000, 2000), bool))
    counts = jax.jit(
        jax.vmap(lambda mask, share: jnp.sum(top_entropy_mask(entropies, mask[None], share=share)), (0, None))
    )
    for percent in (1, 9, 20, 33, 60, 72, 90):
        expected = [-(-percent * n // 100) for n in range(1, 2001)]
        np.testing.assert_array_equal(counts(masks, percent / 100), expected)


def test_a_share_of_one_keeps_every_token():
    _, entropies, mask = random_rows(0)
    np.testing.assert_array_equal(top_entropy_mask(entropies, mask, share=1.0), mask)
    assert not top_entropy_mask(entropies, np.zeros_like(mask), share=0.5).any()


# -------------------------------------------------------------------------------- importance_weights
@FAST
@given(st.integers(0, 10**6), st.sampled_from([1.0, 2.0, 5.0]))
def test_importance_weights_are_the_loop(seed, cap):
    log_probs, sampler_log_probs, mask = random_rows(seed)
    result = np.asarray(jitted_importance_weights(log_probs, sampler_log_probs, mask, cap=cap))
    for i in range(B):
        for t in range(T):
            expected = 1.0
            if mask[i, t]:
                expected = oracle.importance(float(log_probs[i, t]), float(sampler_log_probs[i, t]), cap)
            np.testing.assert_allclose(result[i, t], expected, rtol=1e-5)
    np.testing.assert_allclose(
        importance_weights(log_probs, sampler_log_probs, mask, cap=cap), result, rtol=1e-6
    )
    for junk in JUNK:
        dirty = [np.where(mask, x, np.float32(junk)) for x in (log_probs, sampler_log_probs)]
        np.testing.assert_array_equal(jitted_importance_weights(*dirty, mask, cap=cap), result)


def test_importance_weights_of_the_same_sampler_are_exactly_one():
    log_probs, _, mask = random_rows(1)
    assert (np.asarray(importance_weights(log_probs, log_probs, mask, cap=2.0)) == 1).all()


@pytest.mark.parametrize(("difference", "expected"), [(1e4, 2.0), (-1e4, 0.0)])
def test_runaway_importance_weights_are_capped(difference, expected):
    zeros, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    assert importance_weights(zeros + difference, zeros, mask, cap=2.0).item() == expected


# --------------------------------------------------------------------------------------- contracts
@pytest.mark.usefixtures("no_shape_checks")
def test_shapes_must_agree():
    ones = jnp.ones((2, 3))
    for wrong in (
        lambda: kl_penalty(ones, ones[:1], ones),
        lambda: kl_penalty(ones, ones, ones[:, :2]),
        lambda: top_entropy_mask(ones, ones[:1], share=0.5),
        lambda: importance_weights(ones, ones, ones[:1], cap=2.0),
    ):
        with pytest.raises(AssertionError):
            wrong()
