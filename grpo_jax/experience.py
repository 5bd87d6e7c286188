"""From judged completions to an Experience: rewards, advantages and weights, as the recipe says."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import informative_groups, normalize_then_sum, reward_weights, scale_by_batch
from grpo_jax.recipes import Recipe
from grpo_jax.shaping import importance_weights, kl_penalty, overlong_penalty, top_entropy_mask
from grpo_jax.types import Array, Experience, Judged


def combine(
    scores: np.ndarray, weights: Sequence[float], *, missing: str = "skip"
) -> tuple[np.ndarray, np.ndarray]:
    """Adds up the rewards of every completion.

    Args:
        scores: [B, R], NaN where a function gave none.
        weights: R factors.
        missing: what becomes of a completion that misses some rewards, see `reward_weights`.

    Returns:
        (rewards [B] float32, the weighted sum over the functions that gave a value; valid [B] bool, False
        with reward 0 where nothing counts).
    """
    scores, weights = np.asarray(scores, np.float64), np.asarray(weights, np.float64)
    if scores.ndim != 2 or scores.shape[1] != len(weights):
        raise ValueError(f"scores have the shape {scores.shape}, weights are {len(weights)}")
    factors, valid = reward_weights(~np.isnan(scores), weights, missing=missing)
    total = np.zeros(len(scores))
    # Column by column: the same order of additions in every row, so equal scores give equal rewards.
    for column, factor in zip(np.nan_to_num(scores).T, factors.T, strict=True):
        total += column * factor
    return total.astype(np.float32), valid


def shaped_rewards(
    judged: Judged, recipe: Recipe, *, reward_weights: Sequence[float], max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Adds up the rewards of every completion: weighted sum and overlong penalty, without any KL.

    Args:
        judged: B completions.
        recipe: the objective.
        reward_weights: [R].
        max_length: T, the completion limit in tokens.

    Returns:
        (rewards [B] float32; valid [B] bool, False where the recipe's policy for missing rewards drops it).
    """
    rewards, valid = combine(judged.scores, reward_weights, missing=recipe.missing)
    return np.where(valid, rewards + _overlong(judged, recipe, max_length), 0), valid


def has_signal(
    judged: Judged, recipe: Recipe, *, reward_weights: Sequence[float], max_length: int, group_size: int
) -> np.ndarray:
    """Says which groups teach something, bool [N]: those whose rewards differ (KL aside).

    Where each reward function is normalised alone, those in which any function's values differ.
    """
    rewards, valid = shaped_rewards(judged, recipe, reward_weights=reward_weights, max_length=max_length)
    columns, there = rewards[:, None], valid[:, None]
    if recipe.aggregation != "sum_then_normalize":
        scores = np.asarray(judged.scores)
        columns = np.column_stack([scores, _overlong(judged, recipe, max_length)])
        counts = np.array([*reward_weights, 1.0]) != 0
        there = ~np.isnan(columns) & valid[:, None] & counts
    columns, there = (x.T.reshape(x.shape[1], -1, group_size) for x in (columns, there))
    return np.asarray(informative_groups(columns, valid=there)).any(axis=0)


def make_experience(
    judged: Judged,
    recipe: Recipe,
    *,
    reward_weights: Sequence[float],
    group_size: int,
    prompt_length: int,
    max_length: int,
    num_live: int | None = None,
    num_minibatches: int = 1,
    num_microbatches: int = 1,
) -> Experience:
    """Turns whole groups of judged completions into the Experience of one rollout.

    Args:
        judged: B rows; B is num_minibatches optimizer batches.
        recipe: the objective.
        reward_weights: [R].
        group_size: G.
        prompt_length: S of the result; the rollout's prompts are padded up to it.
        max_length: T, the completion limit in tokens.
        num_live: only the first num_live groups count; the others are there to fill the shape. None: all.
        num_minibatches: optimizer batches in the rollout, equal numbers of consecutive rows. Weights are
            those of each.
        num_microbatches: slices of each optimizer batch, for reductions that are local to them.
    """
    rollout, rows = judged.rollout, judged.rollout.tokens.shape[0]
    live = np.arange(rows) < (rows if num_live is None else num_live * group_size)
    mask = jnp.asarray(rollout.mask) & live[:, None]
    settings = {"reward_weights": reward_weights, "max_length": max_length, "group_size": group_size}
    signal = None  # of each row; only a KL that spares dead groups asks
    if not recipe.kl_on_dead_groups:
        signal = np.repeat(has_signal(judged, recipe, **settings), group_size) & live
    weights, penalty_weights = [], []
    for part in np.split(np.arange(rows), num_minibatches):
        trained = mask[part] & (rollout.finished[part, None] | (not recipe.mask_truncated))
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
        advantages=_advantages(judged, recipe, live, signal, **settings),
        weights=jnp.concatenate(weights),
        old_log_probs=None if judged.old_log_probs is None else jnp.asarray(judged.old_log_probs),
        ref_log_probs=None if judged.ref_log_probs is None else jnp.asarray(judged.ref_log_probs),
        penalty_weights=jnp.concatenate(penalty_weights) if recipe.separate_penalty else None,
        sampler_log_probs=jnp.asarray(rollout.log_probs) if judged.old_log_probs is None else None,
    )


def _overlong(judged: Judged, recipe: Recipe, max_length: int) -> np.ndarray:
    lengths, buffer = np.asarray(judged.rollout.mask).sum(axis=1), recipe.overlong_tokens(max_length)
    if not buffer:
        return np.zeros(len(lengths), np.float32)
    return np.asarray(overlong_penalty(lengths, max_length=max_length, buffer=buffer))


def _policy_factors(judged: Judged, recipe: Recipe, trained: Array, part: np.ndarray) -> Array:
    """Returns what multiplies the weights of the policy term in the rows `part`: [rows,T], or 1."""
    factors = jnp.ones((), jnp.float32)
    if recipe.top_entropy is not None:
        factors = factors * top_entropy_mask(judged.entropies[part], trained, share=recipe.top_entropy)
    if recipe.importance_cap is not None:
        sampler = judged.rollout.log_probs[part]
        scorer = judged.old_log_probs[part]
        factors = factors * importance_weights(scorer, sampler, trained, cap=recipe.importance_cap)
    return factors


def _advantages(judged, recipe, live, signal, *, reward_weights, max_length, group_size) -> Array:
    """Computes the advantages [B]; KL in the reward, where the recipe wants it, enters here."""
    rewards, valid = shaped_rewards(judged, recipe, reward_weights=reward_weights, max_length=max_length)
    valid = valid & live
    penalty = np.zeros(len(rewards), np.float32)
    if recipe.kl_placement == "reward" and judged.ref_log_probs is not None:
        kls = kl_penalty(judged.old_log_probs, judged.ref_log_probs, judged.rollout.mask)
        penalty = -np.asarray(recipe.kl_coef * kls)
        penalty = penalty if recipe.kl_on_dead_groups else penalty * signal
    groups = (-1, group_size)
    if recipe.aggregation == "sum_then_normalize":
        totals = np.where(valid, rewards + penalty, 0)
        return recipe.advantages(totals.reshape(groups), valid=valid.reshape(groups)).reshape(-1)
    scores = np.asarray(judged.scores)
    there = ~np.isnan(scores) & valid[:, None]
    advantages = normalize_then_sum(
        np.nan_to_num(scores).reshape(*groups, scores.shape[1]),
        np.asarray(reward_weights, np.float32),
        valid=there.reshape(*groups, scores.shape[1]),
        advantage_fn=recipe.advantage,
        missing=recipe.missing,
    )
    # What is added to the sum of rewards is one more function here, of weight 1 whatever is missing.
    added = (_overlong(judged, recipe, max_length) + penalty).reshape(groups)
    advantages = advantages + recipe.advantages(added, valid=valid.reshape(groups))
    if recipe.aggregation == "gdpo":
        advantages = scale_by_batch(advantages, valid=valid.reshape(groups))
    return advantages.reshape(-1)
