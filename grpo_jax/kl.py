"""Per-token estimators of KL(pi || pi_ref) from samples of pi (John Schulman's k1, k2, k3).

http://joschu.net/blog/kl-approx.html. As *values* all three estimate the same divergence; as *loss
terms* differentiated token by token they do different things, in expectation on-policy:

    ===  ================================  ============================
    k1   unbiased, high variance           zero: it does not pull at all
    k2   biased, low variance              the gradient of KL(pi || ref)
    k3   unbiased, low variance, never < 0 the gradient of KL(ref || pi)
    rho * k1, rho * k3  (ratio-corrected)  the gradient of KL(pi || ref)
    ===  ================================  ============================

(`tests/test_kl.py` proves each line on an exact categorical.)
"""

import chex
import jax.numpy as jnp

from grpo_jax.types import Array

# exp(40) is far beyond any meaningful ratio, and even the product of two (a ratio times a ratio-corrected
# KL) is a finite float32: a runaway token then gives a huge finite loss with zero gradient, not NaN.
MAX_LOG_RATIO = 40.0


def bounded_exp(x: Array) -> Array:
    """Returns exp(x), with x cut at MAX_LOG_RATIO so that value and gradient stay finite."""
    return jnp.exp(jnp.minimum(x, MAX_LOG_RATIO))


def kl_k1(log_probs: Array, ref_log_probs: Array) -> Array:
    """Returns ``log pi - log ref``: the unbiased estimator, of either sign.

    As a loss its expected gradient is zero whatever the reference is; use it for logging or inside
    the reward, not as a penalty.

    Args:
        log_probs: [...], log pi of the sampled tokens.
        ref_log_probs: [...], log ref of the same tokens.

    Returns:
        [...], nats.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    return log_probs - ref_log_probs


def kl_k2(log_probs: Array, ref_log_probs: Array) -> Array:
    """Returns ``(log pi - log ref)^2 / 2``; as a loss, the gradient of KL(pi || ref).

    Args:
        log_probs: [...], log pi of the sampled tokens.
        ref_log_probs: [...], log ref of the same tokens.

    Returns:
        [...], nats, not negative.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    return 0.5 * (log_probs - ref_log_probs) ** 2


def kl_k3(log_probs: Array, ref_log_probs: Array) -> Array:
    """Returns ``ref/pi - log(ref/pi) - 1``; as a loss, the gradient of KL(ref || pi).

    The estimator of GRPO, https://arxiv.org/abs/2402.03300, equation 4.

    Args:
        log_probs: [...], log pi of the sampled tokens.
        ref_log_probs: [...], log ref of the same tokens.

    Returns:
        [...], nats, not negative.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    difference = ref_log_probs - log_probs
    return bounded_exp(difference) - difference - 1.0


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
