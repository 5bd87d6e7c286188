"""Metrics by definition. Names are TRL's where TRL has one.

    name                            definition
    ------------------------------  -----------------------------------------------------------------
    loss                            sum(weights * (surrogate + kl_coef * kl))
    policy_loss                     sum(weights * surrogate); near 0 on-policy, as advantages are centred
    kl                              token mean of the KL estimate to the reference, nats
    entropy                         token mean of the policy's entropy over the vocabulary, nats
    ratio/mean, ratio/max           token mean and largest of pi / pi_old (sequence ratios at that level)
    clip_ratio/low_mean             share of tokens whose gradient the clip cuts at a ratio below 1
    clip_ratio/high_mean            the same above 1
    clip_ratio/region_mean          the sum of both
    grad_norm                       global norm of the gradient before clipping
    learning_rate                   of this update
    skipped_updates                 updates skipped so far because loss or gradient was not finite
    reward, reward_std              mean of the valid rewards; mean over groups of their std (ddof 1)
    rewards/<name>/mean, /std       mean and std (ddof 1) of one reward function over its values
    frac_reward_zero_std            share of groups without a signal (all valid rewards equal)
    completions/mean_length         tokens, the eos included; also min_length and max_length
    completions/clipped_ratio       share of completions that hit the limit without an eos
    completions/mean_terminated_length   mean length of those that did not; 0 if there are none
    sampling/logp_difference_max    largest |sampler's - scorer's log-prob| of a sampled token
    sampling/kept_mass              token mean of the probability that top-k/top-p/min-p left
    num_tokens                      prompt and completion tokens processed since the start of the run

A token mean is over all completion tokens of the optimizer batch.
"""

import jax.numpy as jnp

from grpo_jax.advantages import informative_groups
from grpo_jax.losses import LossMetrics
from grpo_jax.types import Array, Rollout

Metrics = dict[str, Array]


def token_mean(values: Array, mask: Array) -> Array:
    """Returns the mean [] of values [B,T] over masked-in tokens; 0 if there are none."""
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def merge_loss_metrics(parts: LossMetrics) -> LossMetrics:
    """Joins the LossMetrics of the slices of one batch, stacked on axis 0, as if it were one slice.

    `policy_loss` adds up (its weights are those of the whole batch), means are weighed by tokens.
    """
    tokens = parts.num_tokens
    share = tokens / jnp.maximum(jnp.sum(tokens), 1)
    return LossMetrics(
        policy_loss=jnp.sum(parts.policy_loss),
        kl=jnp.sum(share * parts.kl),
        ratio_mean=jnp.sum(share * parts.ratio_mean),
        ratio_max=jnp.max(parts.ratio_max),
        clip_low=jnp.sum(share * parts.clip_low),
        clip_high=jnp.sum(share * parts.clip_high),
        stale=jnp.sum(share * parts.stale),
        num_tokens=jnp.sum(tokens),
    )


def loss_metrics_dict(metrics: LossMetrics) -> Metrics:
    """Names the fields of LossMetrics as they are logged."""
    return {
        "policy_loss": metrics.policy_loss,
        "kl": metrics.kl,
        "ratio/mean": metrics.ratio_mean,
        "ratio/max": metrics.ratio_max,
        "clip_ratio/low_mean": metrics.clip_low,
        "clip_ratio/high_mean": metrics.clip_high,
        "clip_ratio/region_mean": metrics.clip_low + metrics.clip_high,
        "stale_tokens": metrics.stale,
    }


def reward_metrics(rewards: Array, valid: Array) -> Metrics:
    """Computes the reward metrics of rewards [N,G], of which valid [N,G] are there."""
    rewards = jnp.where(valid, rewards, 0)
    counts = jnp.sum(valid, axis=1)
    means = jnp.sum(rewards, axis=1) / jnp.maximum(counts, 1)
    informative = informative_groups(rewards, valid=valid)
    squares = jnp.sum(jnp.where(valid, rewards - means[:, None], 0) ** 2, axis=1)
    stds = jnp.where(informative, jnp.sqrt(squares / jnp.maximum(counts - 1, 1)), 0)
    return {
        "reward": jnp.sum(rewards) / jnp.maximum(jnp.sum(valid), 1),
        "reward_std": jnp.sum(stds) / jnp.maximum(jnp.sum(counts > 0), 1),
        "frac_reward_zero_std": 1.0 - jnp.mean(informative),
    }


def rollout_metrics(rollout: Rollout, scored_log_probs: Array) -> Metrics:
    """Computes the completion and sampling metrics of a rollout, scored again as [B,T]."""
    lengths = jnp.sum(rollout.mask, axis=1)
    finished = rollout.finished
    difference = jnp.abs(jnp.where(rollout.mask, rollout.log_probs - scored_log_probs, 0))
    return {
        "completions/mean_length": jnp.mean(lengths),
        "completions/min_length": jnp.min(lengths),
        "completions/max_length": jnp.max(lengths),
        "completions/clipped_ratio": 1.0 - jnp.mean(finished),
        "completions/mean_terminated_length": jnp.sum(lengths * finished) / jnp.maximum(jnp.sum(finished), 1),
        "sampling/logp_difference_max": jnp.max(difference),
        "sampling/kept_mass": token_mean(rollout.kept_mass, rollout.mask),
    }
