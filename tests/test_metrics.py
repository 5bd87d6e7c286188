"""Metrics: every definition by value, and slices that join into the whole."""

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.losses import LossMetrics, grpo_loss, loss_weights
from grpo_jax.metrics import (
    loss_metrics_dict,
    merge_loss_metrics,
    reward_metrics,
    rollout_metrics,
    token_mean,
)
from grpo_jax.types import Rollout

B, T = 8, 5
MASK = np.arange(T) < np.array([[5, 3, 0, 1, 2, 5, 0, 4]]).T


def floats(metrics) -> dict[str, float]:
    chex.assert_shape(list(metrics.values()), ())
    return {name: float(value) for name, value in metrics.items()}


def test_token_mean_counts_real_tokens_only():
    values = np.where(MASK, np.arange(B * T).reshape(B, T), np.nan)
    np.testing.assert_allclose(token_mean(jnp.asarray(values), jnp.asarray(MASK)), np.nanmean(values))
    assert token_mean(jnp.ones((B, T)), jnp.zeros((B, T), bool)) == 0


# Slices


@pytest.fixture(scope="module")
def batch():
    """Arguments of grpo_loss whose clipping acts on both sides."""
    rng = np.random.default_rng(0)
    old, log_probs, ref = -2 + rng.normal(size=(3, B, T)).astype(np.float32)
    advantages = rng.normal(size=B).astype(np.float32)
    return tuple(map(jnp.asarray, (log_probs, old, advantages, MASK, loss_weights(MASK), ref)))


@jax.jit
def evaluate(log_probs, old, advantages, mask, weights, ref) -> LossMetrics:
    return grpo_loss(log_probs, old, advantages, mask, weights, ref_log_probs=ref, kl_coef=0.1)[1]


@pytest.mark.parametrize("cuts", [[0, 8], [0, 4, 8], [0, 2, 3, 6, 7, 8], [0, 1, 8]], ids=str)
def test_joined_slices_are_the_whole(batch, cuts):
    # Slices of unequal size, and rows 2 and 6 alone: a slice without a token.
    parts = [evaluate(*(x[start:stop] for x in batch)) for start, stop in itertools.pairwise(cuts)]
    merged = merge_loss_metrics(jax.tree.map(lambda *x: jnp.stack(x), *parts))
    whole = evaluate(*batch)
    chex.assert_trees_all_close(merged, whole, rtol=1e-5, atol=1e-6)
    assert whole.clip_low > 0 and whole.clip_high > 0 and whole.num_tokens == MASK.sum()


def test_slices_without_any_token_give_finite_zeros(batch):
    empty = evaluate(*batch[:3], jnp.zeros((B, T), bool), jnp.zeros((B, T)), batch[5])
    merged = merge_loss_metrics(jax.tree.map(lambda x: jnp.stack([x, x]), empty))
    for value in jax.tree.leaves(merged):
        assert value == 0


def test_every_field_has_its_logged_name():
    fields = LossMetrics(
        policy_loss=1.0,
        kl=2.0,
        ratio_mean=3.0,
        ratio_max=4.0,
        clip_low=0.25,
        clip_high=0.5,
        stale=0.125,
        num_tokens=9,
    )
    assert loss_metrics_dict(fields) == {
        "policy_loss": 1.0,
        "kl": 2.0,
        "ratio/mean": 3.0,
        "ratio/max": 4.0,
        "clip_ratio/low_mean": 0.25,
        "clip_ratio/high_mean": 0.5,
        "clip_ratio/region_mean": 0.75,
        "stale_tokens": 0.125,
    }
    assert len(dataclasses.fields(fields)) == 8  # a new field needs a name


# Rewards


def reward_metrics_loop(rewards, valid) -> dict[str, float]:
    groups = [row[ok] for row, ok in zip(rewards, valid, strict=True)]
    stds = [np.std(g, ddof=1) if len(g) > 1 else 0.0 for g in groups if len(g)]
    everything = np.concatenate(groups)
    return {
        "reward": np.mean(everything) if len(everything) else 0.0,
        "reward_std": np.mean(stds) if stds else 0.0,
        "frac_reward_zero_std": np.mean([len(g) == 0 or np.ptp(g) == 0 for g in groups]),
    }


def test_reward_metrics_by_value():
    rewards = np.array([[0.0, 1.0, 1.0, 2.0], [0.5, 0.5, 0.5, 0.5]], np.float32)
    metrics = floats(reward_metrics(jnp.asarray(rewards), jnp.ones((2, 4), bool)))
    assert metrics == pytest.approx(
        {"reward": 0.75, "reward_std": math.sqrt(2 / 3) / 2, "frac_reward_zero_std": 0.5}
    )


def test_missing_rewards_count_nowhere():
    rewards = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    valid = np.array(
        [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool
    )
    rewards[4, :2] = 0.3
    rewards[~valid] = np.nan
    metrics = floats(reward_metrics(jnp.asarray(rewards), jnp.asarray(valid)))
    assert metrics == pytest.approx(reward_metrics_loop(rewards, valid), rel=1e-5)
    assert metrics["frac_reward_zero_std"] == pytest.approx(0.5)


def test_no_reward_at_all_gives_finite_zeros():
    metrics = floats(reward_metrics(jnp.full((2, 4), jnp.nan), jnp.zeros((2, 4), bool)))
    assert metrics == {"reward": 0, "reward_std": 0, "frac_reward_zero_std": 1}


@pytest.mark.parametrize("reward", [0.35, 0.95, 1e6 + 0.1])
def test_equal_rewards_have_exactly_no_std(reward):
    # The float32 mean of eight times 0.35 is not 0.35; the definition decides by equality.
    metrics = floats(reward_metrics(jnp.full((3, 8), reward), jnp.ones((3, 8), bool)))
    assert metrics["reward_std"] == 0 and metrics["frac_reward_zero_std"] == 1
    assert metrics["reward"] == pytest.approx(reward)


# Rollouts


def make_rollout(mask, finished) -> Rollout:
    rng = np.random.default_rng(1)
    log_probs, kept = rng.uniform(-3, 0, mask.shape), rng.uniform(0.5, 1, mask.shape)
    return Rollout(
        prompt_tokens=jnp.zeros((len(mask), 2), jnp.int32),
        prompt_mask=jnp.ones((len(mask), 2), bool),
        tokens=jnp.zeros(mask.shape, jnp.int32),
        mask=jnp.asarray(mask),
        log_probs=jnp.asarray(np.where(mask, log_probs, 0), jnp.float32),
        kept_mass=jnp.asarray(np.where(mask, kept, 0), jnp.float32),
        finished=jnp.asarray(finished),
    )


def test_rollout_metrics_by_value():
    mask = np.arange(5) < np.array([[5, 5, 3, 1]]).T
    rollout = make_rollout(mask, [False, True, True, True])  # one row ends at the last position
    scored = np.array(rollout.log_probs)
    scored[1, 4] += 0.5
    scored[0, 0] -= 0.75
    scored[3, 1:] = np.nan  # masked: not a token
    metrics = floats(rollout_metrics(rollout, jnp.asarray(scored)))
    assert metrics == pytest.approx(
        {
            "completions/mean_length": 3.5,
            "completions/min_length": 1,
            "completions/max_length": 5,
            "completions/clipped_ratio": 0.25,
            "completions/mean_terminated_length": 3,
            "sampling/logp_difference_max": 0.75,
            "sampling/kept_mass": np.mean(np.asarray(rollout.kept_mass)[mask]),
        }
    )


def test_when_every_completion_is_cut_off():
    rollout = make_rollout(np.ones((3, 4), bool), [False] * 3)
    metrics = floats(rollout_metrics(rollout, rollout.log_probs))
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["completions/mean_terminated_length"] == 0
    assert metrics["completions/mean_length"] == 4
    assert metrics["sampling/logp_difference_max"] == 0


def test_mean_terminated_length_ignores_rows_that_were_cut_off():
    mask = np.arange(4) < np.array([[4, 4, 1, 2]]).T
    rollout = make_rollout(mask, [False, False, True, True])
    metrics = floats(rollout_metrics(rollout, rollout.log_probs))
    assert metrics["completions/mean_terminated_length"] == 1.5
