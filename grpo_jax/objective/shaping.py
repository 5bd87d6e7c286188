"""What surrounds the loss: arrays made once per rollout that shape its rewards and its weights.

`overlong_penalty` and `kl_penalty` shape the reward of a completion. `top_entropy_mask` and
`importance_weights` shape the weight of a token. All are pure, and none is differentiated.
"""

import chex
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Real, Shaped

from grpo_jax.objective.kl import bounded_exp


def overlong_penalty(
    lengths: Shaped[ArrayLike, "*shape"], *, max_length: int, buffer: int
) -> Float[Array, "*shape"]:
    """Returns DAPO's soft punishment of long completions, to be added to their rewards.

    By https://arxiv.org/abs/2503.14476, equation 13, it is 0 up to max_length - buffer tokens. From there it
    falls linearly to -1 at max_length.

    Args:
        lengths: [...] integers, numbers of completion tokens, the eos included.
        max_length: the limit of the sampler, in tokens.
        buffer: tokens over which the penalty grows, in [1, max_length].

    Returns:
        [...] float32, in [-1, 0].

    Raises:
        ValueError: the buffer is outside its range.

    >>> overlong_penalty(jnp.array([6, 8, 10]), max_length=10, buffer=4).tolist()
    [0.0, -0.5, -1.0]
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer: {buffer}; between 1 and max_length, {max_length} tokens")
    return jnp.clip((max_length - buffer - jnp.asarray(lengths, jnp.float32)) / buffer, -1.0, 0.0)


def kl_penalty(
    log_probs: Float[ArrayLike, "B T"], ref_log_probs: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]
) -> Float[Array, " B"]:
    """Returns ``sum_t (log pi - log ref)`` of every completion. The reward gets minus kl_coef times this.

    RLOO does so, https://arxiv.org/abs/2402.14740, section 2, and PPO-style recipes did before it,
    https://arxiv.org/abs/1909.08593, equation 2. In expectation over completions it is KL(pi || ref).

    Args:
        log_probs: [B,T], log-probs of the sampled tokens under the policy that sampled.
        ref_log_probs: [B,T], log-probs of the same tokens under the reference.
        mask: [B,T] bool.

    Returns:
        [B], nats, of either sign.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs, mask])
    return jnp.sum(jnp.where(mask, log_probs - ref_log_probs, 0), axis=-1)


def top_entropy_mask(
    entropies: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], *, share: Real[ArrayLike, ""]
) -> Bool[Array, "B T"]:
    """Says which tokens have the highest entropies of the batch. Only those train the policy.

    The method is that of https://arxiv.org/abs/2506.01939, section 5.1 (there the best share is 0.2). The
    paper divides by the number of tokens kept. Here, as in TRL, the other tokens stay in the normaliser.

    Args:
        entropies: [B,T], entropies of the distributions that the tokens were sampled from, nats.
        mask: [B,T] bool, mask of the whole optimizer batch.
        share: share of all masked-in tokens, in (0, 1].

    Returns:
        bool [B,T], True at the ceil(share * number of tokens) highest ones and at those equal to the lowest
        of them, False where masked.
    """
    chex.assert_equal_shape([entropies, mask])
    count = jnp.sum(mask)
    descending = -jnp.sort(-jnp.where(mask, entropies, -jnp.inf).reshape(-1))
    # In float32, 0.6 * 105 exceeds 63 by a relative 6e-8. That must not become 64 tokens.
    last = jnp.clip(jnp.ceil(share * count * (1 - 3e-7)).astype(jnp.int32) - 1, 0, descending.size - 1)
    return mask & (entropies >= descending[last])


def importance_weights(
    log_probs: Float[ArrayLike, "B T"],
    sampler_log_probs: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    cap: Real[ArrayLike, ""],
) -> Float[Array, "B T"]:
    """Returns ``min(scorer / sampler, cap)`` per token. It corrects for a sampler that computes otherwise.

    This is truncated importance sampling between two implementations of the same policy (other kernels,
    another precision), F. Yao et al. 2025, https://fengyao.notion.site/off-policy-rl. It multiplies the
    weights of the policy term.

    Args:
        log_probs: [B,T], log-probs of the sampled tokens under the scorer, at the parameters that sampled.
        sampler_log_probs: [B,T], the same as the sampler recorded them.
        mask: [B,T] bool.
        cap: largest weight, at least 1.

    Returns:
        [B,T], in [0, cap], 1 where masked.
    """
    chex.assert_equal_shape([log_probs, sampler_log_probs, mask])
    difference = jnp.where(mask, log_probs, 0) - jnp.where(mask, sampler_log_probs, 0)
    return jnp.minimum(bounded_exp(difference), cap)
