"""Metrics by definition: every name that a run logs. Names are TRL's where it has one for the same thing.

Shapes are those of `grpo_jax.types`. In the formulas, ``sum_it`` runs over the n completion tokens of one
optimizer batch, those of weight 0 included. Only rows that fill a batch for which dynamic sampling found too
few groups are left out. ``mean_it`` is that sum over n, and ``[...]`` is 1 where the condition holds, else 0.
Without any token all of them are 0. w [B,T] are the weights, v [B,T] the penalty weights (w, unless the
recipe has two kinds), A [B] the advantages, rho [B,T] the ratios pi / pi_old at the recipe's ratio level.

The update, in every row (`train_step`):

    loss                        policy_loss + sum_it v_it (kl_coef kl_it - entropy_coef H_it), without the KL
                                term where KL is in the reward
    policy_loss                 sum_it w_it surrogate_it, without stale rows. Near 0 on-policy with centred A
    kl                          mean_it(kl_it), nats, of the recipe's estimator (times rho, if it is
                                corrected), or the exact KL(pi || ref). It is 0 without a reference, and
                                exactly 0 where the policy equals the reference
    entropy                     mean_it(H_it), H = -sum_v pi_v log pi_v over the vocabulary, nats
    ratio/mean, ratio/max       mean_it(rho_it), max_it(rho_it)
    clip_ratio/low_mean         mean_it([A_i != 0, rho_it < 1 and the surrogate's gradient is 0 there])
    clip_ratio/high_mean        the same with rho_it > 1
    clip_ratio/region_mean      the sum of both
    stale_tokens                mean_it([row i was dropped as stale, see max_staleness])
    grad_norm                   Euclidean norm of the gradient of loss, before max_grad_norm clips it
    skipped_updates             updates so far that changed nothing because loss or gradient was not finite
    skipped_updates_in_a_row    the same since the last one that was finite
    idle_updates                updates so far that changed nothing because the gradient was exactly 0
    learning_rate               schedule(c), c the updates before this one that were neither skipped nor idle
    kl_coef                     the coefficient of this update, which kl_target moves between updates
    num_tokens                  prompt and completion tokens of everything sampled since the run began

The rollout, in the row of every update that is made from it (`collect`). B and N count everything sampled for
it. With dynamic sampling these are all rounds, whether a group trains or not. r [N,G] is the weighted sum of
the rewards plus the overlong penalty, without any KL. It is valid where `missing` lets it count:

    reward                      mean of the valid r
    reward_std                  mean over the groups with a valid r of their standard deviation (ddof 1, 0 for
                                a single one), whatever the advantages are divided by
    frac_reward_zero_std        share of the N groups without a signal. In the rows that train all valid r
                                are equal, or, where aggregation normalises first, all valid values of every
                                function (and penalties) are
    rewards/<name>/mean         mean of the values that one function gave, without its weight
    rewards/<name>/std          their standard deviation over the B completions (ddof 1, and 0 for a single
                                one). Both are absent if it gave none
    rewards/<name>/missing      share of the B completions for which it gave none
    rewards/<name>/timeouts     with a timeout, share of the B completions whose call ran over it or killed
                                its worker. They are missing as well
    completions/mean_length     mean over the B completions of their tokens, the eos included
    completions/min_length      the shortest
    completions/max_length      the longest
    completions/clipped_ratio   share of the B completions that hit the limit without an end
    completions/mean_terminated_length  mean length of the others, or 0 if there are none
    sampling/logp_difference_max  max_it |sampler's - scorer's log-prob| of the sampled tokens, nats. Where
                                one update is made from a rollout, the update is the scorer, and the tokens
                                are those that it trains on. Then it is absent with lora.dropout, which makes
                                a difference of its own
    sampling/kept_mass          mean_it of the probability that top-k, top-p and min-p left to sample from
    sampling/importance_mean    with importance_cap: mean_it(min(q_it, importance_cap)), q = scorer / sampler
    sampling/importance_capped  with importance_cap: mean_it([q_it > importance_cap])
    dynamic_sampling/rounds     with dynamic_sampling: rounds of N prompts that were sampled
    dynamic_sampling/missing_groups  groups with a signal that the batch lacks. Masked groups fill their place
    dynamic_sampling/leftover_groups  groups with a signal beyond the batch, kept for the next rollout

Seconds. The first three are 0 where an earlier rollout is used again:

    time/generate               sampling, and decoding to text, of all rounds
    time/reward                 in the reward functions, while the device computes log-probs
    time/score                  waiting for old and reference log-probs, and making the Experience
    time/update                 in `train_step`
    step_time                   all of the step, without logging, evaluation and checkpoints
    compilations                programs of `generate`, `completion_log_probs` and `train_step` that training
                                has compiled or read from the cache in this process. The plan bounds them

Evaluation, in rows of its own. evaluation.correct says when a completion is correct (`verdicts`):

    eval/greedy_accuracy        share of the held-out prompts whose greedy completion is correct
    eval/mean@k                 share of correct ones among all k samples of every prompt
    eval/pass@k                 share of the prompts with a correct one among k samples. For k = 2, 4, ...
                                below their number it is the mean over all choices of k of them
    eval/reward                 mean over the valid samples of the weighted sum, without overlong penalty
    eval/rewards/<name>/mean    as above, of the samples, functions of evaluation.rewards included
    eval/rewards/<name>/missing  share of the samples for which it gave none, where that is above 0
    eval/mean_length            mean tokens of the samples, the eos included
    eval/clipped_ratio          share of the samples that hit the limit without an end
    eval/<category>/greedy_accuracy  with evaluation.category: the same of the prompts of that category
    eval/<category>/mean@k      likewise
    eval/<category>/pass@k      likewise
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Real, Shaped

from grpo_jax.objective.advantages import group_stds, grow, informative_groups, shrink_factor
from grpo_jax.objective.losses import LossMetrics
from grpo_jax.objective.shaping import importance_weights
from grpo_jax.types import Rollout


def token_mean(values: Shaped[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]) -> Float[Array, ""]:
    """Returns the mean [] of values [B,T] over masked-in tokens, or 0 without any."""
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def logp_difference_max(
    sampler_log_probs: Float[ArrayLike, "B T"],
    log_probs: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
) -> Float[Array, ""]:
    """Returns the largest difference [] between two log-probs [B,T] of the same token, nats."""
    return jnp.max(jnp.abs(jnp.where(mask, sampler_log_probs - log_probs, 0)))


def merge_loss_metrics(parts: LossMetrics) -> LossMetrics:
    """Joins the LossMetrics of the slices of one batch, stacked on axis 0, as if it were one slice.

    `policy_loss` is a sum, since its weights are those of the whole batch. Means are weighed by tokens.
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


def loss_metrics_dict(metrics: LossMetrics) -> dict[str, Real[ArrayLike, ""]]:
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


def reward_metrics(
    rewards: Real[ArrayLike, "N G"], valid: Bool[ArrayLike, "N G"]
) -> dict[str, Float[Array, ""]]:
    """Computes the reward metrics of rewards [N,G], of which only the valid ones [N,G] count."""
    valid = jnp.asarray(valid, bool)
    rewards = jnp.where(valid, rewards, 0)
    shrink = shrink_factor(rewards, axis=None)  # A sum of float32 may be more than a float32 holds.
    has_valid = jnp.any(valid, axis=1)
    means = jnp.sum(rewards * shrink) / jnp.maximum(jnp.sum(valid), 1)
    stds = jnp.sum(group_stds(rewards, valid=valid) * shrink) / jnp.maximum(jnp.sum(has_valid), 1)
    return {
        "reward": grow(means, shrink)[0, 0],
        "reward_std": grow(stds, shrink)[0, 0],
        "frac_reward_zero_std": 1.0 - jnp.mean(informative_groups(rewards, valid=valid)),
    }


def reward_means(
    names: Sequence[str], scores: Float[np.ndarray, "B R"], num_lost: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Computes the metrics of each reward function alone.

    Args:
        names: names of the R reward functions.
        scores: [B,R], NaN where a function gave none.
        num_lost: rows lost to the timeout, by name, of those functions that have one.

    Returns:
        rewards/<name>/mean and /std (ddof 1) over the values that each function gave, absent if it gave none,
        and /missing, the share of the rows without one. /timeouts is the share of the lost rows.
    """
    metrics = {}
    num_lost = num_lost or {}
    for name, column in zip(names, scores.astype(np.float64).T, strict=True):
        values = column[~np.isnan(column)]
        if values.size:
            metrics[f"rewards/{name}/mean"] = float(values.mean())
            metrics[f"rewards/{name}/std"] = float(values.std(ddof=1)) if values.size > 1 else 0.0
        metrics[f"rewards/{name}/missing"] = 1.0 - values.size / column.size
        if name in num_lost:
            metrics[f"rewards/{name}/timeouts"] = num_lost[name] / column.size
    return metrics


def rollout_metrics(
    rollout: Rollout,
    scored_log_probs: Float[ArrayLike, "B T"] | None,
    *,
    importance_cap: Real[ArrayLike, ""] | None = None,
) -> dict[str, Real[Array, ""]]:
    """Computes the completion and sampling metrics of a rollout.

    Args:
        rollout: B completions.
        scored_log_probs: [B,T], their log-probs as computed again, or None.
        importance_cap: largest importance weight, see `importance_weights`. None means that there are none.
    """
    lengths = jnp.sum(rollout.mask, axis=1)
    finished = rollout.finished
    metrics = {
        "completions/mean_length": jnp.mean(lengths),
        "completions/min_length": jnp.min(lengths),
        "completions/max_length": jnp.max(lengths),
        "completions/clipped_ratio": 1.0 - jnp.mean(finished),
        "completions/mean_terminated_length": jnp.sum(lengths * finished) / jnp.maximum(jnp.sum(finished), 1),
        "sampling/kept_mass": token_mean(rollout.kept_mass, rollout.mask),
    }
    if scored_log_probs is not None:
        metrics["sampling/logp_difference_max"] = logp_difference_max(
            rollout.log_probs, scored_log_probs, rollout.mask
        )
    if importance_cap is not None:
        ratios = importance_weights(scored_log_probs, rollout.log_probs, rollout.mask, cap=jnp.inf)
        metrics["sampling/importance_mean"] = token_mean(jnp.minimum(ratios, importance_cap), rollout.mask)
        metrics["sampling/importance_capped"] = token_mean(ratios > importance_cap, rollout.mask)
    return metrics
