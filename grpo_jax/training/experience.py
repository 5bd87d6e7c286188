"""Rewards, advantages and weights of judged completions, which make an Experience, as the recipe says."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from grpo_jax.objective.advantages import (
    effective_weights,
    informative_groups,
    normalize_then_sum,
    scale_by_batch,
)
from grpo_jax.objective.recipes import Recipe
from grpo_jax.objective.shaping import importance_weights, kl_penalty, overlong_penalty, top_entropy_mask
from grpo_jax.types import Experience, Judged, Totals

RewardWeights = Sequence[float] | Float[ArrayLike, " R"]

_LARGEST = float(np.finfo(np.float32).max)


def combine(
    scores: Float[ArrayLike, "B R"],
    weights: RewardWeights,
    *,
    missing: str = "drop",
    group_size: int | None = None,
) -> tuple[Float[np.ndarray, " B"], Bool[np.ndarray, " B"]]:
    """Adds up the rewards of every completion.

    Args:
        scores: [B, R], NaN where a function gave none.
        weights: R factors.
        missing: the policy for completions that miss some rewards, see `effective_weights`.
        group_size: G, a divisor of B. So many consecutive rows are a group. None means that all rows are one.

    Returns:
        (rewards [B] float32, valid [B] bool). A reward is the weighted sum over the functions that gave a
        value, clipped to what float32 holds. Where nothing counts, valid is False and the reward is 0.
    """
    scores = np.asarray(scores, np.float64)
    weights = np.asarray(weights, np.float64)
    if scores.ndim != 2 or scores.shape[1] != len(weights):
        raise ValueError(f"scores have the shape {scores.shape}, weights are {len(weights)}")
    groups = scores.reshape(-1, group_size or len(scores) or 1, len(weights))
    factors, valid = effective_weights(~np.isnan(groups), weights, missing=missing)
    total = np.zeros(len(scores))
    # Every row adds its columns in the same order, so equal scores give equal rewards.
    for column, factor in zip(np.nan_to_num(scores).T, factors.reshape(scores.shape).T, strict=True):
        total += column * factor
    return np.clip(total, -_LARGEST, _LARGEST).astype(np.float32), valid.reshape(-1)


def add_up_rewards(
    scores: Float[ArrayLike, "B R"],
    lengths: Int[ArrayLike, " B"],
    finished: Bool[ArrayLike, " B"],
    recipe: Recipe,
    *,
    reward_weights: RewardWeights,
    max_length: int,
    group_size: int,
) -> Totals:
    """Adds up what the reward functions gave to whole groups, without any KL. Every round is added up once.

    A group has a signal if the rewards of its completions that train differ. Where each reward function is
    normalised alone, it is enough that the values of one function differ.

    Args:
        scores: [B,R], NaN where a function gave none.
        lengths: [B], numbers of completion tokens.
        finished: [B] bool.
        recipe: the objective.
        reward_weights: [R].
        max_length: T, the completion limit in tokens.
        group_size: G.
    """
    penalty = _length_penalty(lengths, recipe, max_length)

    def add_up(given: Float[ArrayLike, "B R"]) -> tuple[Float[np.ndarray, " B"], Bool[np.ndarray, " B"]]:
        sums, valid = combine(given, reward_weights, missing=recipe.missing, group_size=group_size)
        return np.where(valid, sums + penalty, 0), valid

    rewards, valid = add_up(scores)
    train_rewards = rewards
    train_valid = valid
    if recipe.mask_truncated:
        # A function that judged only rows that do not train decides nothing either.
        trains = _training_rows(finished, recipe)
        train_rewards, train_valid = add_up(np.where(trains[:, None], scores, np.nan))
    compared = train_rewards[:, None]
    counts = train_valid[:, None]
    if recipe.aggregation != "sum_then_normalize":
        compared = np.column_stack([scores, penalty])
        counts = ~np.isnan(compared) & counts & (np.array([*reward_weights, 1.0]) != 0)
    compared, counts = (x.T.reshape(x.shape[1], -1, group_size) for x in (compared, counts))
    signal = np.asarray(informative_groups(compared, valid=counts)).any(axis=0)
    return Totals(
        rewards=rewards,
        valid=valid,
        penalty=penalty,
        train_rewards=train_rewards,
        train_valid=train_valid,
        signal=np.repeat(signal, group_size),
    )


def _length_penalty(
    lengths: Int[ArrayLike, " B"], recipe: Recipe, max_length: int
) -> Float[np.ndarray, " B"]:
    """Returns the recipe's `overlong_penalty` of lengths [B] in tokens: [B], 0 if the recipe has none."""
    buffer = recipe.overlong_tokens(max_length)
    if not buffer:
        return np.zeros(len(lengths), np.float32)
    return np.asarray(overlong_penalty(lengths, max_length=max_length, buffer=buffer))


def _training_rows(finished: Bool[ArrayLike, " B"], recipe: Recipe) -> Bool[np.ndarray, " B"]:
    """Says which rows train, bool [B]. The other rows have no part in the statistics of their group."""
    finished = np.asarray(finished, bool)
    return finished if recipe.mask_truncated else np.ones_like(finished)


def make_experience(
    judged: Judged,
    recipe: Recipe,
    *,
    reward_weights: RewardWeights,
    group_size: int,
    prompt_length: int,
    max_length: int,
    num_live: int | None = None,
    num_minibatches: int = 1,
    num_microbatches: int = 1,
) -> Experience:
    """Turns whole groups of judged completions into the Experience of one rollout.

    Args:
        judged: B rows with their totals, which are num_minibatches optimizer batches.
        recipe: the objective.
        reward_weights: [R].
        group_size: G.
        prompt_length: S of the result. The rollout's prompts are padded to it.
        max_length: T, the completion limit in tokens.
        num_live: number of groups, from the first on, that count. The others only fill the shape. None means
            that all groups count.
        num_minibatches: number of optimizer batches in the rollout. Each has the same number of consecutive
            rows, and weights of its own.
        num_microbatches: number of slices of each optimizer batch, for reductions that are local to them.
    """
    rollout = judged.rollout
    rows = rollout.tokens.shape[0]
    live = np.arange(rows) < (rows if num_live is None else num_live * group_size)
    mask = jnp.asarray(rollout.mask) & live[:, None]
    training = _training_rows(rollout.finished, recipe)
    signal = judged.totals.signal & live
    weights = []
    penalty_weights = []
    for part in np.split(np.arange(rows), num_minibatches):
        trained = mask[part] & training[part, None]
        base = recipe.weights(
            trained,
            max_length=max_length,
            num_microbatches=num_microbatches,
            num_sequences=int(live[part].sum()),
        )
        weights.append(base * _policy_factors(judged, recipe, trained, part))
        penalty_weights.append(base if recipe.kl_on_dead_groups else base * signal[part, None])
    padding = ((0, 0), (prompt_length - rollout.prompt_tokens.shape[1], 0))
    return Experience(
        prompt_tokens=jnp.pad(rollout.prompt_tokens, padding),
        prompt_mask=jnp.pad(rollout.prompt_mask, padding),
        tokens=jnp.asarray(rollout.tokens),
        mask=mask,
        advantages=_advantages(
            judged, recipe, live, signal, reward_weights=reward_weights, group_size=group_size
        ),
        weights=jnp.concatenate(weights),
        old_log_probs=None if judged.old_log_probs is None else jnp.asarray(judged.old_log_probs),
        ref_log_probs=None if judged.ref_log_probs is None else jnp.asarray(judged.ref_log_probs),
        penalty_weights=jnp.concatenate(penalty_weights) if recipe.separate_penalty else None,
        sampler_log_probs=jnp.asarray(rollout.log_probs) if judged.old_log_probs is None else None,
    )


def _policy_factors(
    judged: Judged, recipe: Recipe, trained: Bool[ArrayLike, "rows T"], part: Int[np.ndarray, " rows"]
) -> Float[Array, "rows T"] | Float[Array, ""]:
    """Returns the factors of the weights of the policy term in the rows `part`: [rows,T], or 1."""
    factors = jnp.ones((), jnp.float32)
    if recipe.top_entropy is not None:
        factors = factors * top_entropy_mask(judged.entropies[part], trained, share=recipe.top_entropy)
    if recipe.importance_cap is not None:
        sampler = judged.rollout.log_probs[part]
        scorer = judged.old_log_probs[part]
        factors = factors * importance_weights(scorer, sampler, trained, cap=recipe.importance_cap)
    return factors


def _advantages(
    judged: Judged,
    recipe: Recipe,
    live: Bool[np.ndarray, " B"],
    signal: Bool[ArrayLike, " B"],
    *,
    reward_weights: RewardWeights,
    group_size: int,
) -> Float[Array, " B"]:
    """Computes the advantages [B]. A KL in the reward, where the recipe wants it, enters here."""
    totals = judged.totals
    valid = totals.train_valid & live
    penalty = np.zeros(len(valid), np.float32)
    if recipe.kl_placement == "reward" and judged.ref_log_probs is not None:
        kls = kl_penalty(judged.old_log_probs, judged.ref_log_probs, judged.rollout.mask)
        penalty = -np.asarray(recipe.kl_coef * kls)
        penalty = penalty if recipe.kl_on_dead_groups else penalty * signal
    groups = (-1, group_size)
    if recipe.aggregation == "sum_then_normalize":
        rewards = np.where(valid, totals.train_rewards + penalty, 0)
        return recipe.advantage(rewards.reshape(groups), valid=valid.reshape(groups)).reshape(-1)
    scores = np.asarray(judged.scores)
    given = ~np.isnan(scores) & valid[:, None]
    advantages = normalize_then_sum(
        np.where(given, scores, 0).reshape(*groups, scores.shape[1]),
        np.asarray(reward_weights, np.float32),
        valid=given.reshape(*groups, scores.shape[1]),
        advantage_fn=recipe.advantage,
        missing=recipe.missing,
    )
    # What is added to the sum of rewards is one more function here, of weight 1 whatever is missing.
    added = (totals.penalty + penalty).reshape(groups)
    advantages = advantages + recipe.advantage(added, valid=valid.reshape(groups))
    if recipe.aggregation == "gdpo":
        advantages = scale_by_batch(advantages, valid=valid.reshape(groups))
    return advantages.reshape(-1)
