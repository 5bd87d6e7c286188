"""Per-token estimators of KL(pi || pi_ref) from samples of pi (John Schulman's k1, k2, k3).

See http://joschu.net/blog/kl-approx.html. As *values* all three estimate the same divergence. As *loss
terms* differentiated token by token, on-policy and in expectation, they do different things:

    ===  ================================  ============================
    k1   unbiased, high variance           zero: it does not pull at all
    k2   biased, low variance              the gradient of KL(pi || ref)
    k3   unbiased, low variance, never < 0 the gradient of KL(ref || pi)
    rho * k1, rho * k3  (ratio-corrected)  the gradient of KL(pi || ref)
    exact (no sample, all of the vocabulary)  the gradient of KL(pi || ref)
    ===  ================================  ============================

(`tests/objective/test_kl.py` proves each line on an exact categorical.)
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real

# exp(40) is far beyond any meaningful ratio, and even the product of two (a ratio times a ratio-corrected
# KL) is a finite float32. A runaway token then gives a huge finite loss with zero gradient, not NaN.
MAX_LOG_RATIO = 40.0


def bounded_exp(x: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Returns exp(x), with x capped at MAX_LOG_RATIO so that value and gradient stay finite."""
    return jnp.exp(jnp.minimum(x, MAX_LOG_RATIO))


def kl_k1(
    log_probs: Float[ArrayLike, "*shape"], ref_log_probs: Float[ArrayLike, "*shape"]
) -> Float[ArrayLike, "*shape"]:
    """Returns ``log pi - log ref``, the unbiased estimator. It has either sign.

    As a loss its expected gradient is zero whatever the reference is. Use it for logging or inside
    the reward, not as a penalty.

    Args:
        log_probs: [...], log pi of the sampled tokens.
        ref_log_probs: [...], log ref of the same tokens.

    Returns:
        [...], nats.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    return log_probs - ref_log_probs


def kl_k2(
    log_probs: Float[ArrayLike, "*shape"], ref_log_probs: Float[ArrayLike, "*shape"]
) -> Float[ArrayLike, "*shape"]:
    """Returns ``(log pi - log ref)^2 / 2``. As a loss it has the gradient of KL(pi || ref).

    Args:
        log_probs: [...], log pi of the sampled tokens.
        ref_log_probs: [...], log ref of the same tokens.

    Returns:
        [...], nats, not negative.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    return 0.5 * (log_probs - ref_log_probs) ** 2


def kl_k3(
    log_probs: Float[ArrayLike, "*shape"], ref_log_probs: Float[ArrayLike, "*shape"]
) -> Float[Array, "*shape"]:
    """Returns ``ref/pi - log(ref/pi) - 1``. As a loss it has the gradient of KL(ref || pi).

    This is the estimator of GRPO, https://arxiv.org/abs/2402.03300, equation 4.

    Args:
        log_probs: [...], log pi of the sampled tokens.
        ref_log_probs: [...], log ref of the same tokens.

    Returns:
        [...], nats, not negative.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    difference = ref_log_probs - log_probs
    return bounded_exp(difference) - difference - 1.0


def kl_exact(
    logits: Float[ArrayLike, "*shape V"], ref_logits: Float[ArrayLike, "*shape V"]
) -> Float[Array, "*shape"]:
    """Returns ``sum_v pi_v (log pi_v - log ref_v)`` of two distributions, with its exact gradient.

    It is not an estimator and needs no sample. It needs the logits of both policies, so call it on a chunk
    of positions at a time, as `grpo_jax.policy.log_probs.token_log_probs_and_kls` does. Then no array
    [B,L,V] ever exists.

    Args:
        logits: [..., V], logits of pi. They need not be normalised, and -inf means probability 0.
        ref_logits: [..., V], logits of the reference.

    Returns:
        [...], nats, not negative except for rounding.
    """
    chex.assert_equal_shape([logits, ref_logits])
    log_probs = jax.nn.log_softmax(logits)
    ref_log_probs = jax.nn.log_softmax(ref_logits)
    possible = log_probs > -jnp.inf  # where it is not, 0 * log 0 = 0
    difference = jnp.where(possible, log_probs, 0) - jnp.where(possible, ref_log_probs, 0)
    return jnp.sum(jnp.where(possible, jnp.exp(log_probs), 0) * difference, axis=-1)


def adapt_kl_coef(
    kl_coef: Real[ArrayLike, ""],
    kl: Real[ArrayLike, ""],
    *,
    kl_target: Real[ArrayLike, ""],
    kl_adaptation: Real[ArrayLike, ""] = 0.1,
) -> Float[Array, ""]:
    """Moves the KL coefficient so that the measured KL approaches a target.

    It is the proportional controller of https://arxiv.org/abs/1909.08593, section 2.2:
    ``coef * (1 + adaptation * clip(kl / target - 1, -0.2, 0.2))``.

    Args:
        kl_coef: [], the coefficient of the update just made, above 0.
        kl: [], the KL measured in it, nats per token. A value that is not finite changes nothing.
        kl_target: the target, nats per token, above 0.
        kl_adaptation: gain of the controller, in [0, 5) so that the coefficient stays above 0.

    Returns:
        [], the coefficient of the next update.

    >>> round(float(adapt_kl_coef(0.1, 0.3, kl_target=0.1)), 6)  # far over the target: 2 percent more
    0.102
    """
    error = jnp.clip(kl / kl_target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + kl_adaptation * jnp.where(jnp.isfinite(kl), error, 0.0))


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
