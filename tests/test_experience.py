"""From judged completions to an Experience: rewards, advantages and weights by value."""

import numpy as np
import pytest

from grpo_jax.experience import combine


def test_combine_is_the_weighted_sum_over_what_is_there():
    nan = np.nan
    scores = np.array([[1, 2], [nan, 2], [1, nan], [nan, nan], [0, 0]], np.float32)
    rewards, valid = combine(scores, [1.0, 0.5])
    assert rewards.dtype == np.float32 and valid.dtype == bool
    np.testing.assert_array_equal(rewards, np.array([2, 1, 1, 0, 0], np.float32))
    np.testing.assert_array_equal(valid, [True, True, True, False, True])


def test_combine_against_a_loop():
    rng = np.random.default_rng(0)
    scores, weights = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=5)
    scores[rng.random((40, 5)) < 0.4] = np.nan
    rewards, valid = combine(scores, weights)
    for row, total, ok in zip(scores, rewards, valid, strict=True):
        there = [(s, w) for s, w in zip(row, weights, strict=True) if s == s]
        assert ok == bool(there)
        assert total == pytest.approx(sum(float(s) * w for s, w in there), abs=1e-5)


def test_equal_scores_give_exactly_equal_rewards():
    rewards, _ = combine(np.tile(np.float32([0.35, 0.95, 0.1]), (101, 1)), [0.3, 0.7, 1 / 3])
    assert len(set(rewards.tolist())) == 1


def test_combine_checks_its_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\), weights are 2"):
        combine(np.zeros((2, 3)), [1, 1])
