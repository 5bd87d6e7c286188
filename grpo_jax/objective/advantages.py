"""Advantages of completions relative to their group. The group is an axis, not a parameter."""

import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Real, Shaped

SCALES = ("std", "batch", "none")
MISSING = ("drop", "skip", "renormalize")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum", "gdpo")


def _prepare(
    rewards: Shaped[ArrayLike, "*prompts G"], valid: Bool[ArrayLike, "*prompts G"] | None
) -> tuple[Float[Array, "*prompts G"], Bool[Array, "*prompts G"], Float[Array, "*prompts 1"]]:
    """Returns (rewards with 0 where invalid, valid [...,G], number of valid ones [...,1])."""
    rewards = jnp.asarray(rewards)
    # Promotes integers, and types so short that a square of 300 is infinite.
    rewards = rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32))
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    chex.assert_equal_shape([rewards, valid])
    # An invalid reward is often NaN. Select before any arithmetic, because 0 * NaN is NaN.
    rewards = jnp.where(valid, rewards, 0)
    count = jnp.sum(valid, axis=-1, keepdims=True).astype(rewards.dtype)
    return rewards, valid, count


def shrink_factor(rewards: Float[Array, "..."], axis: int | None) -> Float[Array, "..."]:
    """Returns the power of two, mostly 1, by which rewards are multiplied to keep their squares finite."""
    return jnp.where(jnp.max(jnp.abs(rewards), axis=axis, keepdims=True) > 1e15, 2.0**-80, 1.0)


def grow(advantages: Float[Array, "..."], shrink: Float[Array, "..."]) -> Float[Array, "..."]:
    """Undoes `shrink_factor`. A value that no float can hold becomes the largest float."""
    largest = jnp.finfo(advantages.dtype).max
    return jnp.clip(advantages / shrink, -largest, largest)


def _from_lowest(
    rewards: Float[Array, "*shape"], valid: Bool[Array, "*shape"], axis: int | None
) -> Float[Array, "*shape"]:
    """Returns rewards minus the lowest valid one, 0 where invalid.

    Deviations from a mean do not depend on the offset, but their rounding does: the mean of 10000001 and
    three times 10000000 is not a float32.
    """
    lowest = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=axis, keepdims=True)
    return jnp.where(valid, rewards - jax.lax.stop_gradient(jnp.where(lowest < jnp.inf, lowest, 0)), 0)


def _centered(
    rewards: Float[Array, "*prompts G"], valid: Bool[Array, "*prompts G"], count: Float[Array, "*prompts 1"]
) -> Float[Array, "*prompts G"]:
    """Returns rewards minus their group's mean, 0 where invalid or where the whole group is equal."""
    alive = informative_groups(rewards, valid=valid)[..., None]
    rewards = _from_lowest(rewards, valid, axis=-1)
    mean = jnp.sum(rewards, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(valid & alive, rewards - mean, 0)


def _batch_std(
    values: Float[Array, "*shape"], valid: Bool[Array, "*shape"], ddof: int
) -> Float[Array, "..."]:
    """Returns the standard deviation of all valid values of the array around their common mean."""
    total = jnp.sum(valid).astype(values.dtype)
    values = _from_lowest(values, valid, axis=None)
    mean = jnp.sum(values) / jnp.maximum(total, 1)
    return _std(jnp.where(valid, values - mean, 0), total, ddof, axis=None)


def _std(
    centered: Float[Array, "..."], count: Float[Array, "..."], ddof: int, axis: int | None
) -> Float[Array, "..."]:
    """Returns sqrt(sum(centered^2) / (count - ddof)), 0 where undefined, with finite gradients at 0."""
    variance = jnp.sum(centered**2, axis=axis, keepdims=True) / jnp.maximum(count - ddof, 1)
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def informative_groups(
    rewards: Shaped[ArrayLike, "*prompts G"], *, valid: Bool[ArrayLike, "*prompts G"] | None = None
) -> Bool[Array, "*prompts"]:
    """Says which groups carry a learning signal: at least two valid rewards that differ.

    Equality decides, not a small standard deviation. The mean of eight times 0.35 is not 0.35 in floating
    point, and that noise divided by itself would become an advantage of order one.

    Args:
        rewards: [..., G], any real numbers.
        valid: [..., G] bool, False where the reward is missing. None means that none is missing.

    Returns:
        bool [...].
    """
    rewards, valid, _ = _prepare(rewards, valid)
    highest = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=-1)
    lowest = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=-1)
    return highest > lowest


def group_advantages(
    rewards: Shaped[ArrayLike, "*prompts G"],
    *,
    valid: Bool[ArrayLike, "*prompts G"] | None = None,
    scale: str = "std",
    ddof: int = 1,
    epsilon: Real[ArrayLike, ""] = 1e-4,
) -> Float[Array, "*prompts G"]:
    """Centres each reward on its group's mean and divides by a standard deviation.

    GRPO, https://arxiv.org/abs/2402.03300, section 4.1.2, defines ``A = (r - mean(r)) / std(r)``.
    Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.2, drops the division (``scale="none"``).

    Args:
        rewards: [..., G], any real numbers. The last axis is the group. Integers become float32.
        valid: [..., G] bool, False where the reward is missing. None means that none is missing.
        scale: the divisor: "std", the standard deviation of the group, "batch", that of all valid rewards
            of the array around their common mean, or "none".
        ddof: number subtracted from the number of rewards in the divisor of the variance. 1 is unbiased.
        epsilon: number added to the standard deviation.

    Returns:
        [..., G]. The advantages are exactly 0 in a group whose valid rewards are all equal, in a group with
        fewer than two of them, and at invalid entries. They are centred and finite for any finite rewards,
        whatever offset or scale these have. Gradients are finite everywhere.

    Raises:
        ValueError: unknown scale.

    >>> group_advantages(jnp.array([[0., 0., 0., 1.], [.3, .3, .3, .3]]), scale="none").tolist()
    [[-0.25, -0.25, -0.25, 0.75], [0.0, 0.0, 0.0, 0.0]]
    """
    if scale not in SCALES:
        raise ValueError(f"scale: {scale!r}; choose 'std', 'batch' or 'none'")
    rewards, valid, count = _prepare(rewards, valid)
    shrink = shrink_factor(rewards, axis=None if scale == "batch" else -1)
    rewards = rewards * shrink
    centered = _centered(rewards, valid, count)
    if scale == "none":
        return grow(centered, shrink)
    std = _std(centered, count, ddof, axis=-1) if scale == "std" else _batch_std(rewards, valid, ddof)
    divisor = std + epsilon * shrink
    # Without epsilon the std of a dead group is 0, and its zeros must not become 0 / 0.
    return centered / jnp.where(divisor > 0, divisor, 1)


def group_stds(
    rewards: Shaped[ArrayLike, "*prompts G"], *, valid: Bool[ArrayLike, "*prompts G"] | None = None
) -> Float[Array, "*prompts"]:
    """Computes the standard deviation (ddof 1) of each group.

    Args:
        rewards: [..., G], any real numbers.
        valid: [..., G] bool, False where the value is missing. None means that none is missing.

    Returns:
        [...], 0 in a group without two valid rewards that differ.
    """
    rewards, valid, count = _prepare(rewards, valid)
    shrink = shrink_factor(rewards, axis=-1)
    centered = _centered(rewards * shrink, valid, count)
    return grow(_std(centered, count, 1, axis=-1), shrink)[..., 0]


def leave_one_out_advantages(
    rewards: Shaped[ArrayLike, "*prompts G"], *, valid: Bool[ArrayLike, "*prompts G"] | None = None
) -> Float[Array, "*prompts G"]:
    """Subtracts from each reward the mean of the *others* of its group.

    RLOO, https://arxiv.org/abs/2402.14740, section 2.3: ``A_i = r_i - mean_{j != i} r_j``.

    Args:
        rewards: [..., G], any real numbers. The last axis is the group.
        valid: [..., G] bool, False where the reward is missing. None means that none is missing.

    Returns:
        [..., G], with zeros where `group_advantages` has them.

    >>> leave_one_out_advantages(jnp.array([1., 2., 3.])).tolist()
    [-1.5, 0.0, 1.5]
    """
    rewards, valid, count = _prepare(rewards, valid)
    shrink = shrink_factor(rewards, axis=-1)
    # r_i - (sum - r_i) / (n - 1)  =  (r_i - mean) * n / (n - 1)
    return grow(_centered(rewards * shrink, valid, count) * count / jnp.maximum(count - 1, 1), shrink)


# The choices of the advantage axis: f(rewards [...,G], *, valid=None) -> [...,G].
ADVANTAGES: dict[str, Callable[..., Array]] = {
    "std": group_advantages,
    "batch": functools.partial(group_advantages, scale="batch"),
    "none": functools.partial(group_advantages, scale="none"),
    "leave_one_out": leave_one_out_advantages,
}


def effective_weights(
    valid: Bool[ArrayLike, "*prompts G R"], weights: Shaped[ArrayLike, " R"], *, missing: str = "drop"
) -> tuple[Shaped[ArrayLike, "*prompts G R"], Bool[ArrayLike, "*prompts G"]]:
    """Decides what weight each reward function has in each row, where some rewards are missing.

        drop         a row that misses a reward which a sibling got does not count, and a function that gave
                     no value to any row of a group does not apply to that group, where the others decide
        skip         a missing term is left out of the sum, as if it were 0, and the others keep their weights
        renormalize  the others are scaled up so that the absolute weights still have the same sum

    A missing reward has no influence under `drop` alone. Under the other two, rows of one group are compared
    by different sums.

    Args:
        valid: [..., G, R] bool, False where a function gave no value.
        weights: [R]. A function of weight 0 decides nothing.
        missing: one of `MISSING`.

    Returns:
        (row_weights [..., G, R], 0 at missing entries, and row_valid [..., G], False where nothing counts).
        NumPy arrays give NumPy arrays, and jax arrays give jax arrays.

    Raises:
        ValueError: unknown missing.
    """
    if missing not in MISSING:
        raise ValueError(f"missing: {missing!r}; choose one of {', '.join(MISSING)}")
    counts = valid & (weights != 0)
    row_valid = counts.any(axis=-1)
    row_weights = counts * weights
    if missing == "renormalize":
        kept = abs(row_weights).sum(axis=-1, keepdims=True)
        row_weights = row_weights * (abs(weights).sum() / (kept + (kept == 0)))
    if missing == "drop":
        applies = counts.any(axis=-2, keepdims=True)
        row_valid = row_valid & (valid | ~applies).all(axis=-1)
        row_weights = row_weights * row_valid[..., None]
    return row_weights, row_valid


reward_weights = effective_weights  # its name until version 0.2


def normalize_then_sum(
    scores: Shaped[ArrayLike, "*prompts G R"],
    weights: Sequence[float] | Shaped[ArrayLike, " R"],
    *,
    valid: Bool[ArrayLike, "*prompts G R"] | None = None,
    advantage_fn: Callable[..., Array] = group_advantages,
    missing: str = "drop",
) -> Float[Array, "*prompts G"]:
    """Computes advantages per reward function and adds them up with weights, as GDPO does.

    https://arxiv.org/abs/2601.05242, section 3, gives the reason: if the sum is taken first, rewards that
    differ can give equal advantages, and a function of large scale hides the others. (To sum first, call
    `combine` and then `group_advantages`.)

    Args:
        scores: [..., G, R], the values that each of R reward functions gave.
        weights: [R].
        valid: [..., G, R] bool, False where a function gave no value. None means that none is missing.
        advantage_fn: f(rewards [...,G], *, valid) -> [...,G], applied to each function's values alone.
        missing: one of `MISSING`, see `effective_weights`.

    Returns:
        [..., G], exactly 0 in a group in which every function's valid values are all equal.

    >>> [round(a, 2) for a in normalize_then_sum(jnp.array([[0., 5.], [1., 5.]]), [1., 1.]).tolist()]
    [-0.71, 0.71]
    """
    scores = jnp.asarray(scores)
    weights = jnp.asarray(weights)
    valid = jnp.ones(scores.shape, bool) if valid is None else jnp.asarray(valid, bool)
    chex.assert_equal_shape([scores, valid])
    row_weights, _ = effective_weights(valid, weights, missing=missing)
    # A row that is dropped takes no part in any function's statistics.
    each = jax.vmap(lambda column, mask: advantage_fn(column, valid=mask), in_axes=-1, out_axes=-1)
    return jnp.sum(each(scores, valid & (row_weights != 0)) * row_weights, axis=-1)


def scale_by_batch(
    advantages: Shaped[ArrayLike, "*prompts G"],
    *,
    valid: Bool[ArrayLike, "*prompts G"] | None = None,
    epsilon: Real[ArrayLike, ""] = 1e-4,
) -> Float[Array, "*prompts G"]:
    """Divides advantages by the standard deviation (ddof 1) of all valid ones of the batch around their mean.

    This is the last step of GDPO, https://arxiv.org/abs/2601.05242, section 3. It keeps the scale of the
    update the same whatever the number of reward functions.

    Args:
        advantages: [..., G], group-centred.
        valid: [..., G] bool, False where the value is missing. None means that none is missing.
        epsilon: number added to the standard deviation.

    Returns:
        [..., G]. Zeros stay exactly 0.
    """
    advantages, valid, _ = _prepare(advantages, valid)
    shrink = shrink_factor(advantages, axis=None)
    advantages = advantages * shrink
    divisor = _batch_std(advantages, valid, 1) + epsilon * shrink
    return advantages / jnp.where(divisor > 0, divisor, 1)
