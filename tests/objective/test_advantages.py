"""The advantage axis by loops, exact zeros, missing rewards, and several reward functions."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax.objective.advantages import (
    ADVANTAGES,
    MISSING,
    effective_weights,
    group_advantages,
    group_stds,
    grow,
    informative_groups,
    leave_one_out_advantages,
    normalize_then_sum,
    scale_by_batch,
    shrink_factor,
)

FAST = settings(max_examples=150, deadline=None, derandomize=True)
SCALES = ("std", "batch", "none", "leave_one_out")
N, G = 3, 5


def function_of(scale, **kwargs):
    if scale == "leave_one_out":
        return leave_one_out_advantages
    return functools.partial(group_advantages, scale=scale, **kwargs)


def weighted_sum(rewards, valid, scale):
    """A sum with weights, so that a gradient is not zero by symmetry."""
    weights = jnp.arange(1.0, 1 + rewards.size).reshape(rewards.shape)
    return jnp.sum(function_of(scale)(rewards, valid=valid) * weights)


JITTED = {scale: jax.jit(lambda r, v, s=scale: function_of(s)(r, valid=v)) for scale in SCALES}
GRADIENTS = {scale: jax.jit(jax.grad(functools.partial(weighted_sum, scale=scale))) for scale in SCALES}

# Rewards as verifiers give them (few distinct values, so whole groups are equal) and as models give them,
# in steps of 1/64: groups that differ by rounding only are noise by nature, and no loop agrees on noise.
REWARDS = st.one_of(
    hnp.arrays(np.float32, (N, G), elements=st.sampled_from([0.0, 1.0, 0.35, 0.95, 0.1, -0.5])),
    hnp.arrays(np.float32, (N, G), elements=st.integers(-640, 640).map(lambda i: i / 64)),
)
VALID = hnp.arrays(bool, (N, G))


@FAST
@given(REWARDS, VALID, st.sampled_from(SCALES))
def test_matches_the_loop(rewards, valid, scale):
    result = JITTED[scale](rewards, valid)
    chex.assert_shape(result, (N, G))
    expected = oracle.advantages(rewards, valid, scale=scale)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
    assert (np.asarray(result)[~valid] == 0).all()


@FAST
@given(REWARDS, VALID, st.sampled_from(SCALES))
def test_gradients_are_finite(rewards, valid, scale):
    assert np.isfinite(GRADIENTS[scale](rewards, valid)).all()


@FAST
@given(REWARDS, VALID, st.sampled_from(SCALES), st.randoms(use_true_random=False))
def test_order_of_rows_and_groups_does_not_matter(rewards, valid, scale, random):
    rows, columns = random.sample(range(N), N), random.sample(range(G), G)
    index = np.ix_(rows, columns)
    np.testing.assert_allclose(
        JITTED[scale](rewards[index], valid[index]),
        np.asarray(JITTED[scale](rewards, valid))[index],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [3, 8, 1000])
def test_equal_rewards_give_exactly_zero(dtype, size):
    values = np.array([0.35, 0.95, 0.1, 1 / 3, -0.7, 1e-20, 1e8, 0.0], dtype)
    with jax.enable_x64(dtype == np.float64):
        rewards = jnp.asarray(np.repeat(values[:, None], size, axis=1))
        assert rewards.dtype == dtype
        for scale in SCALES:
            result = JITTED[scale](rewards, None)
            assert result.dtype == dtype
            assert (np.asarray(result) == 0).all()
            gradient = GRADIENTS[scale](rewards, None)
            assert np.isfinite(gradient).all()
        assert not np.asarray(informative_groups(rewards)).any()


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_of_one_group_stay_zero_beside_live_groups(scale):
    rewards = jnp.array([[0.35] * 8, [0.0, 1.0] * 4, [0.95] * 8])
    result = np.asarray(function_of(scale)(rewards))
    assert (result[[0, 2]] == 0).all() and (result[1] != 0).all()
    chex.assert_tree_all_finite(jax.grad(lambda r: jnp.sum(function_of(scale)(r)[..., 0]))(rewards))


def test_shrunk_rewards_grow_back():
    rewards = jnp.array([[3e30, -3e30], [0.35, 7.0]])
    shrink = shrink_factor(rewards, axis=-1)
    assert shrink.tolist() == [[2.0**-80], [1.0]]
    np.testing.assert_array_equal(grow(rewards * shrink, shrink), rewards)
    largest = np.finfo(np.float32).max
    too_large = jnp.array([[largest, -largest], [1.0, 1.0]])
    np.testing.assert_array_equal(grow(too_large, shrink), [[largest, -largest], [1.0, 1.0]])


@pytest.mark.parametrize("scale", ["std", "batch"])
def test_equal_rewards_without_epsilon(scale):
    rewards = jnp.array([[0.5, 0.5], [0.5, 0.5]])
    loss = lambda r: jnp.sum(group_advantages(r, scale=scale, epsilon=0.0) * jnp.arange(4.0).reshape(2, 2))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(rewards)
    assert value == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize("scale", SCALES)
def test_invalid_rewards_have_no_influence(scale):
    rewards = np.array([[1.0, 2.0, 4.0, 0.0], [0.3, 0.3, 7.0, 0.3], [5.0, 1.0, 1.0, 1.0]], np.float32)
    valid = np.array([[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 0, 0]], bool)
    clean = JITTED[scale](rewards, valid)
    for junk in (np.nan, np.inf, -np.inf, 1e30):
        dirty = np.where(valid, rewards, np.float32(junk))
        np.testing.assert_array_equal(JITTED[scale](dirty, valid), clean)
        gradient = np.asarray(GRADIENTS[scale](dirty, valid))
        assert np.isfinite(gradient).all() and (gradient[~valid] == 0).all()
    # A group that is equal among its valid rewards, or has one only, is dead.
    assert (np.asarray(clean)[1:] == 0).all() and (np.asarray(clean)[0, :3] != 0).any()
    np.testing.assert_array_equal(informative_groups(rewards, valid=valid), [True, False, False])


def test_nothing_valid():
    rewards, valid = np.full((N, G), np.nan, np.float32), np.zeros((N, G), bool)
    for scale in SCALES:
        assert (np.asarray(JITTED[scale](rewards, valid)) == 0).all()
        assert np.isfinite(GRADIENTS[scale](rewards, valid)).all()
    assert not np.asarray(informative_groups(rewards, valid=valid)).any()


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["std", "batch"])
def test_ddof_and_epsilon(scale, ddof):
    rewards = np.array([[0.0, 1.0, 3.0], [2.0, 2.0, 5.0]], np.float32)
    for epsilon in (1e-4, 0.5):
        result = group_advantages(rewards, scale=scale, ddof=ddof, epsilon=epsilon)
        np.testing.assert_allclose(
            result, oracle.advantages(rewards, scale=scale, ddof=ddof, epsilon=epsilon), rtol=1e-6
        )


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (3, 1)])
def test_shapes(shape):
    rewards = jax.random.normal(jax.random.key(0), shape)
    for scale in SCALES:
        result = JITTED[scale](rewards, None)
        chex.assert_shape(result, shape)
        if shape[-1] == 1:  # a group of one has nothing to compare with
            assert (np.asarray(result) == 0).all()
    chex.assert_shape(informative_groups(rewards), shape[:-1])


@pytest.mark.parametrize("scale", SCALES)
def test_eager_is_jitted(scale):
    rewards, valid = jax.random.normal(jax.random.key(0), (N, G)), np.arange(N * G).reshape(N, G) % 4 > 0
    eager = function_of(scale)(rewards, valid=valid)
    chex.assert_shape(eager, (N, G))
    np.testing.assert_allclose(eager, JITTED[scale](rewards, valid), rtol=1e-6, atol=1e-6)


def test_advantages_are_centred_and_of_unit_scale():
    rewards = jax.random.normal(jax.random.key(1), (16, 64))
    result = np.asarray(group_advantages(rewards))
    np.testing.assert_allclose(result.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(result.std(axis=1, ddof=1), 1, atol=1e-3)


def test_integers_become_float32():
    result = group_advantages(jnp.array([[0, 1, 1, 0]]), scale="none")
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, [[-0.5, 0.5, 0.5, -0.5]])
    assert leave_one_out_advantages(jnp.array([[True, False]])).tolist() == [[1.0, -1.0]]


def test_choices_by_name():
    rewards, valid = jax.random.normal(jax.random.key(0), (N, G)), np.arange(N * G).reshape(N, G) % 4 > 0
    assert tuple(ADVANTAGES) == SCALES
    for scale, function in ADVANTAGES.items():
        np.testing.assert_allclose(
            function(rewards, valid=valid),
            oracle.advantages(rewards, valid, scale=scale),
            rtol=1e-4,
            atol=1e-6,
        )


# ------------------------------------------------------------------------- several reward functions
R = 3
WEIGHTS = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), min_size=R, max_size=R)
SCORES = hnp.arrays(np.float32, (N, G, R), elements=st.sampled_from([0.0, 1.0, 0.35, 0.95, -2.0, 10.0]))
SCORES_VALID = st.one_of(st.just(np.ones((N, G, R), bool)), hnp.arrays(bool, (N, G, R)))


@FAST
@given(SCORES_VALID, WEIGHTS, st.sampled_from(MISSING))
def test_effective_weights_are_the_loop(valid, weights, missing):
    rows = [
        oracle.reward_weights(row, weights, missing=missing, group=group) for group in valid for row in group
    ]
    for array in (np.asarray, jnp.asarray):  # the same code for both
        row_weights, row_valid = effective_weights(array(valid), array(weights, np.float32), missing=missing)
        assert type(row_weights) is type(row_valid) is type(array(valid))
        np.testing.assert_allclose(row_weights.reshape(-1, R), [w for w, _ in rows], rtol=1e-6)
        np.testing.assert_array_equal(row_valid.reshape(-1), [v for _, v in rows])


def test_effective_weights_policy_by_policy():
    weights, valid = np.array([1.0, 3.0, -2.0]), np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0]], bool)
    drop, skip, renormalize = (effective_weights(valid, weights, missing=policy) for policy in MISSING)
    np.testing.assert_allclose(skip[0], [[1, 3, -2], [1, 0, -2], [0, 0, 0]])
    np.testing.assert_allclose(renormalize[0], [[1, 3, -2], [2, 0, -4], [0, 0, 0]])  # 6 in absolute value
    np.testing.assert_allclose(drop[0], [[1, 3, -2], [0, 0, 0], [0, 0, 0]])
    assert skip[1].tolist() == renormalize[1].tolist() == [True, True, False]
    assert drop[1].tolist() == [True, False, False]
    # A function that gave nothing to any of a group does not apply to it, and the others decide.
    silent = valid & [[True, False, True]]
    np.testing.assert_allclose(effective_weights(silent, weights)[0], [[1, 0, -2], [1, 0, -2], [0, 0, 0]])
    both = np.stack([valid, silent])
    np.testing.assert_array_equal(effective_weights(both, weights)[1], [[1, 0, 0], [1, 1, 0]])
    # A function of weight 0 decides nothing.
    _, kept = effective_weights(valid, np.array([1.0, 0.0, 2.0]), missing="drop")
    assert kept.tolist() == [True, True, False]


@functools.partial(jax.jit, static_argnames=("scale", "missing"))
def jitted_normalize_then_sum(scores, weights, valid, *, scale, missing):
    return normalize_then_sum(scores, weights, valid=valid, advantage_fn=ADVANTAGES[scale], missing=missing)


@FAST
@given(SCORES, SCORES_VALID, WEIGHTS, st.sampled_from(SCALES), st.sampled_from(MISSING))
def test_normalize_then_sum_is_the_loop(scores, valid, weights, scale, missing):
    choices = {"scale": scale, "missing": missing}
    result = jitted_normalize_then_sum(scores, np.float32(weights), valid, **choices)
    chex.assert_shape(result, (N, G))
    expected = oracle.normalize_then_sum(scores, weights, valid, **choices)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
    # What stands where there is no score has no influence.
    dirty = np.where(valid, scores, np.float32(np.nan))
    np.testing.assert_array_equal(
        jitted_normalize_then_sum(dirty, np.float32(weights), valid, **choices), result
    )
    scaled = scale_by_batch(result, valid=valid.any(axis=-1))
    np.testing.assert_allclose(
        scaled, oracle.scale_by_batch(np.asarray(result), valid.any(axis=-1)), rtol=1e-4, atol=1e-4
    )


def test_normalize_then_sum_eagerly_in_float64():
    rng = np.random.default_rng(0)
    scores, valid = rng.standard_normal((N, G, R)), rng.random((N, G, R)) < 0.8
    weights = [1.0, 0.5, 2.0]
    with jax.enable_x64(True):
        for missing in MISSING:
            result = normalize_then_sum(scores, weights, valid=valid, missing=missing)
            expected = oracle.normalize_then_sum(scores, weights, valid, missing=missing)
            np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)
            there = np.array(
                [
                    [oracle.reward_weights(v, weights, missing=missing, group=row)[1] for v in row]
                    for row in valid
                ]
            )
            np.testing.assert_allclose(
                scale_by_batch(result, valid=there), oracle.scale_by_batch(expected, there), rtol=1e-12
            )


def test_normalize_then_sum_is_what_gdpo_is_for():
    """Sum first: (1, 0) and (0, 1) are one reward, and the function of larger scale hides the other."""
    scores = jnp.array([[[0.0, 0.0], [1.0, 0.0], [0.0, 100.0], [1.0, 100.0]]])
    alone = normalize_then_sum(scores, [1.0, 1.0])
    np.testing.assert_allclose(alone[0, 1], alone[0, 2], atol=1e-3)
    summed = group_advantages(jnp.sum(scores, axis=-1))
    assert summed[0, 2] - summed[0, 1] > 1.5
    # One function: the two orders are the same.
    one = scores[..., :1]
    np.testing.assert_allclose(normalize_then_sum(one, [1.0]), group_advantages(one[..., 0]), rtol=1e-6)


def test_several_dead_functions_give_exactly_nothing():
    scores = jnp.broadcast_to(jnp.array([0.35, 0.95, 0.1]), (N, G, R))
    for advantage_fn in ADVANTAGES.values():
        result = normalize_then_sum(scores, [1.0, 0.3, 2.0], advantage_fn=advantage_fn)
        for value in (result, scale_by_batch(result), scale_by_batch(result, epsilon=0.0)):
            assert (np.asarray(value) == 0).all()
    nothing = normalize_then_sum(scores, [1.0, 0.3, 2.0], valid=jnp.zeros((N, G, R), bool))
    assert (np.asarray(nothing) == 0).all()


def test_scale_by_batch():
    values = np.array([[1.0, -1.0, np.nan], [4.0, -4.0, 0.0]], np.float32)
    valid = ~np.isnan(values)
    for function in (scale_by_batch, jax.jit(scale_by_batch)):
        result = np.asarray(function(values, valid=valid))
        np.testing.assert_allclose(result, oracle.scale_by_batch(values, valid), rtol=1e-6)
        assert result[0, 2] == result[1, 2] == 0
    np.testing.assert_allclose(np.std(result[valid], ddof=1), 1, rtol=1e-4)
    # The size of the rewards, and with it the number of functions, no longer matters.
    np.testing.assert_allclose(scale_by_batch(1000 * values, valid=valid), result, rtol=1e-4)


# --------------------------------------------------------------------------- any finite rewards
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6, 1e7, 1.6e7, -1.6e7])
@pytest.mark.parametrize("scale", SCALES)
def test_an_offset_moves_no_advantage(scale, offset):
    rewards = np.array([[1, 0, 0, 1], [0, 1, 1, 1]], np.float32)
    expected = oracle.advantages(rewards, scale=scale)
    np.testing.assert_allclose(JITTED[scale](rewards + np.float32(offset), None), expected, rtol=1e-4)
    # One group alone: its offset counts for `batch` only.
    shifted = rewards + np.array([[0], [offset]], np.float32)
    result = np.asarray(JITTED[scale](shifted, None))
    np.testing.assert_allclose(result, oracle.advantages(shifted, scale=scale), rtol=1e-4)
    np.testing.assert_allclose(result.sum(axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1e15, 1.1e15, 1e18, 1e19, 2e19, 1e30, 3e38])
@pytest.mark.parametrize("scale", SCALES)
def test_rewards_of_any_size(scale, size):
    rewards = np.array([[1, 0, 0, -1], [0, 1, 0.5, 1]], np.float32) * np.float32(size)
    result = np.asarray(JITTED[scale](rewards, None))
    expected = np.clip(oracle.advantages(rewards, scale=scale), *np.finfo(np.float32).max * np.array([-1, 1]))
    np.testing.assert_allclose(result, expected, rtol=1e-4)
    assert np.isfinite(result).all() and np.isfinite(GRADIENTS[scale](rewards, None)).all()
    np.testing.assert_allclose(group_stds(rewards), np.std(rewards.astype(float), axis=1, ddof=1), rtol=1e-5)


def test_one_huge_group_leaves_the_others_alone():
    rewards = np.array([[1, 0, 0, 1], [1e30, 0, 0, 1e30]], np.float32)
    for scale in ("std", "none", "leave_one_out"):
        np.testing.assert_allclose(
            JITTED[scale](rewards, None)[0], oracle.advantages(rewards[:1], scale=scale)[0], rtol=1e-5
        )


def test_short_floats_become_float32():
    result = group_advantages(jnp.array([[300.0, 0, 0, 300]], jnp.float16))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, [[0.866, -0.866, -0.866, 0.866]], atol=1e-3)


def test_group_stds():
    rewards, valid = np.array([[1, 2, 4, 9], [3, 3, 3, 1]], np.float32), np.ones((2, 4), bool)
    valid[0, 3] = valid[1, 3] = False
    np.testing.assert_allclose(group_stds(rewards, valid=valid), [np.std([1, 2, 4], ddof=1), 0], rtol=1e-6)


@pytest.mark.usefixtures("no_shape_checks")
def test_errors():
    with pytest.raises(ValueError, match="'group'; choose 'std', 'batch' or 'none'"):
        group_advantages(jnp.zeros((2, 2)), scale="group")
    with pytest.raises(AssertionError):
        group_advantages(jnp.zeros((2, 2)), valid=jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match="missing: 'zero'; choose one of drop, skip, renormalize"):
        effective_weights(np.ones((2, 2), bool), np.ones(2), missing="zero")
    with pytest.raises(ValueError, match="missing: 'zero'"):
        normalize_then_sum(jnp.zeros((2, 2, 1)), [1.0], missing="zero")
    with pytest.raises(AssertionError):
        normalize_then_sum(jnp.zeros((2, 2, 1)), [1.0], valid=jnp.ones((2, 2), bool))


def test_a_function_applies_group_by_group():
    # The second function gave nothing to the first group, so the first decides there.
    valid = np.array([[[True, False], [True, False]], [[True, True], [True, False]]])
    row_weights, row_valid = effective_weights(valid, np.array([1.0, 2.0]), missing="drop")
    np.testing.assert_array_equal(row_valid, [[True, True], [True, False]])
    np.testing.assert_array_equal(row_weights, [[[1, 0], [1, 0]], [[1, 2], [0, 0]]])


def test_the_smallest_difference_is_a_signal():
    """A signal is decided by equality: rewards may be graded as finely as float32 can."""
    rewards = jnp.array([[0.5, 0.5, jnp.nextafter(jnp.float32(0.5), jnp.float32(1.0))], [0.5, 0.5, 0.5]])
    assert informative_groups(rewards).tolist() == [True, False]
    advantages = group_advantages(rewards, scale="none")
    assert (advantages[0] != 0).any() and (advantages[1] == 0).all()
