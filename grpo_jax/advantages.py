"""Advantages of completions relative to their group. The group is an axis, not a parameter."""

import chex
import jax.numpy as jnp

from grpo_jax.types import Array

SCALES = ("std", "batch", "none")


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
    Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.1, drops the division (``scale="none"``).

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

    RLOO, https://arxiv.org/abs/2402.14740, section 3.2: ``A_i = r_i - mean_{j != i} r_j``.

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
