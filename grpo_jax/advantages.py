"""Advantages of completions relative to their group. The group is an axis, not a parameter."""

import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
from jax import Array

SCALES = ("std", "batch", "none")
MISSING = ("skip", "renormalize", "drop")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum", "gdpo")


def _prepare(rewards: Array, valid: Array | None) -> tuple[Array, Array, Array]:
    """Returns (rewards with 0 where invalid, valid [...,G], number of valid ones [...,1])."""
    rewards = jnp.asarray(rewards)
    if not jnp.issubdtype(rewards.dtype, jnp.floating):
        rewards = rewards.astype(jnp.float32)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    chex.assert_equal_shape([rewards, valid])
    # An invalid reward is often NaN: select before any arithmetic, or 0 * NaN comes back.
    rewards = jnp.where(valid, rewards, 0)
    count = jnp.sum(valid, axis=-1, keepdims=True).astype(rewards.dtype)
    return rewards, valid, count


def _centered(rewards: Array, valid: Array, count: Array) -> Array:
    """Returns rewards minus their group's mean; 0 where invalid or where all of the group are equal."""
    mean = jnp.sum(rewards, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    alive = informative_groups(rewards, valid=valid)[..., None]
    return jnp.where(valid & alive, rewards - mean, 0)


def _std(centered: Array, count: Array, ddof: int, axis: int | None) -> Array:
    """Returns sqrt(sum(centered^2) / (count - ddof)), 0 where undefined, with finite gradients at 0."""
    variance = jnp.sum(centered**2, axis=axis, keepdims=True) / jnp.maximum(count - ddof, 1)
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def informative_groups(rewards: Array, *, valid: Array | None = None) -> Array:
    """Says which groups carry a learning signal: at least two valid rewards that differ.

    Decided by equality, not by a small standard deviation: the mean of eight times 0.35 is not
    0.35 in floating point, and that noise divided by itself would become an advantage of order one.

    Args:
        rewards: [..., G], any real numbers.
        valid: [..., G] bool, False where the reward is missing; None: all are there.

    Returns:
        bool [...].
    """
    rewards, valid, _ = _prepare(rewards, valid)
    highest = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=-1)
    lowest = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=-1)
    return highest > lowest


def group_advantages(
    rewards: Array, *, valid: Array | None = None, scale: str = "std", ddof: int = 1, epsilon: float = 1e-4
) -> Array:
    """Centres each reward on its group's mean and divides by a standard deviation.

    GRPO, https://arxiv.org/abs/2402.03300, section 4.1.2: ``A = (r - mean(r)) / std(r)``;
    Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.2, drops the division (``scale="none"``).

    Args:
        rewards: [..., G], any real numbers; the last axis is the group. Integers become float32.
        valid: [..., G] bool, False where the reward is missing; None: all are there.
        scale: what divides: "std" of the group; "batch", the standard deviation of all valid rewards
            of the array around their common mean; "none".
        ddof: the divisor of the variance is the number of rewards minus ddof; 1 is unbiased.
        epsilon: added to the standard deviation.

    Returns:
        [..., G]. Exactly 0 in a group whose valid rewards are all equal, in a group with fewer than
        two of them, and at invalid entries. Gradients are finite everywhere.

    Raises:
        ValueError: unknown scale.

    >>> group_advantages(jnp.array([[0., 0., 0., 1.], [.3, .3, .3, .3]]), scale="none").tolist()
    [[-0.25, -0.25, -0.25, 0.75], [0.0, 0.0, 0.0, 0.0]]
    """
    if scale not in SCALES:
        raise ValueError(f"scale: {scale!r}; choose 'std', 'batch' or 'none'")
    rewards, valid, count = _prepare(rewards, valid)
    centered = _centered(rewards, valid, count)
    if scale == "none":
        return centered
    if scale == "std":
        std = _std(centered, count, ddof, axis=-1)
    else:
        total = jnp.sum(count)
        mean = jnp.sum(rewards) / jnp.maximum(total, 1)
        std = _std(jnp.where(valid, rewards - mean, 0), total, ddof, axis=None)
    divisor = std + epsilon
    # Without epsilon the std of a dead group is 0, and its zeros must not become 0 / 0.
    return centered / jnp.where(divisor > 0, divisor, 1)


def leave_one_out_advantages(rewards: Array, *, valid: Array | None = None) -> Array:
    """Subtracts from each reward the mean of the *others* of its group.

    RLOO, https://arxiv.org/abs/2402.14740, section 2.3: ``A_i = r_i - mean_{j != i} r_j``.

    Args:
        rewards: [..., G], any real numbers; the last axis is the group.
        valid: [..., G] bool, False where the reward is missing; None: all are there.

    Returns:
        [..., G]; zeros as in `group_advantages`.

    >>> leave_one_out_advantages(jnp.array([1., 2., 3.])).tolist()
    [-1.5, 0.0, 1.5]
    """
    rewards, valid, count = _prepare(rewards, valid)
    # r_i - (sum - r_i) / (n - 1)  =  (r_i - mean) * n / (n - 1)
    return _centered(rewards, valid, count) * count / jnp.maximum(count - 1, 1)


# The choices of the advantage axis: f(rewards [...,G], *, valid=None) -> [...,G].
ADVANTAGES: dict[str, Callable[..., Array]] = {
    "std": group_advantages,
    "batch": functools.partial(group_advantages, scale="batch"),
    "none": functools.partial(group_advantages, scale="none"),
    "leave_one_out": leave_one_out_advantages,
}


def reward_weights(valid, weights, *, missing: str = "skip"):
    """Decides what each of several reward functions counts in each row, some being missing.

        skip         a missing term is left out of the sum; the others keep their weights
        renormalize  the others are scaled up so that the absolute weights still sum to the same
        drop         a row that misses any of them counts nothing

    Args:
        valid: [..., R] bool, False where a function gave no value.
        weights: [R]; a function of weight 0 decides nothing.
        missing: one of `MISSING`.

    Returns:
        (row_weights [..., R], 0 at missing entries; row_valid [...], False where nothing counts). NumPy
        arrays in, NumPy arrays out; so with jax arrays.

    Raises:
        ValueError: unknown missing.
    """
    if missing not in MISSING:
        raise ValueError(f"missing: {missing!r}; choose one of {', '.join(MISSING)}")
    counts = valid & (weights != 0)
    row_valid = counts.any(axis=-1)
    row_weights = counts * weights
    if missing == "renormalize":
        there = abs(row_weights).sum(axis=-1, keepdims=True)
        row_weights = row_weights * (abs(weights).sum() / (there + (there == 0)))
    if missing == "drop":
        row_valid = row_valid & (valid | (weights == 0)).all(axis=-1)
        row_weights = row_weights * row_valid[..., None]
    return row_weights, row_valid


def normalize_then_sum(
    scores: Array,
    weights: Sequence[float] | Array,
    *,
    valid: Array | None = None,
    advantage_fn: Callable[..., Array] = group_advantages,
    missing: str = "skip",
) -> Array:
    """Computes advantages per reward function and adds them up with weights, as GDPO does.

    https://arxiv.org/abs/2601.05242, section 3: with the sum taken first, rewards that differ can give
    equal advantages, and a function of large scale hides the others. (Sum first is `grpo_jax.rewards.combine`
    and then `group_advantages`.)

    Args:
        scores: [..., G, R], what each of R reward functions gave.
        weights: [R].
        valid: [..., G, R] bool, False where a function gave no value; None: all are there.
        advantage_fn: f(rewards [...,G], *, valid) -> [...,G], applied to each function's values alone.
        missing: see `reward_weights`.

    Returns:
        [..., G]; exactly 0 in a group in which every function's valid values are all equal.

    >>> [round(a, 2) for a in normalize_then_sum(jnp.array([[0., 5.], [1., 5.]]), [1., 1.]).tolist()]
    [-0.71, 0.71]
    """
    scores, weights = jnp.asarray(scores), jnp.asarray(weights)
    valid = jnp.ones(scores.shape, bool) if valid is None else jnp.asarray(valid, bool)
    chex.assert_equal_shape([scores, valid])
    row_weights, _ = reward_weights(valid, weights, missing=missing)
    # A row that is dropped takes no part in any function's statistics.
    each = jax.vmap(lambda column, there: advantage_fn(column, valid=there), in_axes=-1, out_axes=-1)
    return jnp.sum(each(scores, valid & (row_weights != 0)) * row_weights, axis=-1)


def scale_by_batch(advantages: Array, *, valid: Array | None = None, epsilon: float = 1e-4) -> Array:
    """Divides advantages by the standard deviation (ddof 1) of all valid ones of the batch around their mean.

    The last step of GDPO, https://arxiv.org/abs/2601.05242, section 3: keeps the scale of the update the same
    whatever the number of reward functions.

    Args:
        advantages: [..., G], group-centred.
        valid: [..., G] bool; None: all are there.
        epsilon: added to the standard deviation.

    Returns:
        [..., G]; zeros stay exactly 0.
    """
    advantages, valid, count = _prepare(advantages, valid)
    total = jnp.sum(count)
    mean = jnp.sum(advantages) / jnp.maximum(total, 1)
    divisor = _std(jnp.where(valid, advantages - mean, 0), total, 1, axis=None) + epsilon
    return advantages / jnp.where(divisor > 0, divisor, 1)
