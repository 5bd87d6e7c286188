"""The policy term of the loss, per token: one function per surrogate objective, all to be minimised.

Every surrogate has the signature ``f(log_ratios [B,T], log_probs [B,T], advantages [B,1], **clip keywords)
-> [B,T]``. One that couples the tokens of a row also has a keyword `mask` [B,T] and is given the mask. The
others work element by element, so they take any shape: in the annotations it is `*BT`. `log_ratios` makes the
ratios of a level that a surrogate gets.
"""

import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Real

from grpo_jax.objective.kl import bounded_exp

TokensLike = Float[ArrayLike, "B T"]  # a caller may give NumPy arrays
MaskLike = Bool[ArrayLike, "B T"]
Tokens = Float[Array, "B T"]
Mask = Bool[Array, "B T"]
Rows = Float[Array, "B 1"]


def clipped_surrogate(
    log_ratios: Float[ArrayLike, "*BT"],
    log_probs: Float[ArrayLike, "*BT"] | None,
    advantages: Float[ArrayLike, "*#BT"],
    *,
    clip_range: Real[ArrayLike, ""] = 0.2,
    clip_range_high: Real[ArrayLike, ""] | None = None,
    delta: Real[ArrayLike, ""] | None = None,
    dual_clip: Real[ArrayLike, ""] | None = None,
) -> Float[Array, "*BT"]:
    """Computes PPO's clipped objective, to be minimised.

    It is ``-min(rho A, clip(rho, 1 - clip_range, 1 + clip_range_high) A)``, as in PPO,
    https://arxiv.org/abs/1707.06347, equation 7. With clip_range_high > clip_range it is the "clip-higher"
    of DAPO, https://arxiv.org/abs/2503.14476, equation 10.

    Args:
        log_ratios: [B,T], log(pi / pi_old).
        log_probs: [B,T], not used. Every surrogate has the same arguments.
        advantages: [B,1], or anything that broadcasts to [B,T].
        clip_range: distance below 1 to which the ratio may fall before the gradient stops, in [0, 1].
        clip_range_high: distance above 1 to which it may rise. None means the same as clip_range.
        delta: upper bound of rho in the first term, above 1 + clip_range_high. It acts for A < 0 only. This
            is the two-sided clipping of INTELLECT-2, https://arxiv.org/abs/2505.07291, section 3.4.
        dual_clip: number c > 1. For A < 0 the loss is at most -c A, https://arxiv.org/abs/1912.09729,
            equation 5.

    Returns:
        [B,T] losses. The gradient is exactly zero outside the clip on the side that A favours.
    """
    del log_probs
    ratios = bounded_exp(log_ratios)
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = jnp.clip(ratios, 1.0 - clip_range, 1.0 + high)
    capped = ratios if delta is None else jnp.minimum(ratios, delta)
    losses = -jnp.minimum(capped * advantages, clipped * advantages)
    if dual_clip is not None:
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -dual_clip * advantages), losses)
    return losses


def cispo_surrogate(
    log_ratios: Float[ArrayLike, "*BT"],
    log_probs: Float[ArrayLike, "*BT"],
    advantages: Float[ArrayLike, "*#BT"],
    *,
    cap: Real[ArrayLike, ""] = 5.0,
) -> Float[Array, "*BT"]:
    """Computes CISPO's objective, to be minimised: ``-sg(min(rho, cap)) A log pi``.

    These are https://arxiv.org/abs/2506.13585, equations 4 and 5, without a lower bound, as in the paper's
    runs. The importance weight is capped and constant, so no token ever loses its gradient.

    Args:
        log_ratios: [B,T], log(pi / pi_old). No gradient flows through it.
        log_probs: [B,T], log pi, the gradient's path.
        advantages: [B,1], or anything that broadcasts to [B,T].
        cap: largest importance weight, an absolute ratio (not a distance from 1), above 0.

    Returns:
        [B,T] losses.
    """
    weights = jax.lax.stop_gradient(jnp.minimum(bounded_exp(log_ratios), cap))
    return -weights * advantages * log_probs


def sapo_surrogate(
    log_ratios: Float[ArrayLike, "*BT"],
    log_probs: Float[ArrayLike, "*BT"] | None,
    advantages: Float[ArrayLike, "*#BT"],
    *,
    tau: Real[ArrayLike, ""] = 1.0,
    tau_negative: Real[ArrayLike, ""] = 1.05,
) -> Float[Array, "*BT"]:
    """Computes SAPO's softly gated objective, to be minimised: ``-(4/tau) sigmoid(tau (rho - 1)) A``.

    See https://arxiv.org/abs/2511.20347, equations 4 to 6. The gradient is that of REINFORCE at ratio 1 and
    fades smoothly on both sides, faster for negative advantages.

    Args:
        log_ratios: [B,T], log(pi / pi_old).
        log_probs: [B,T], not used. Every surrogate has the same arguments.
        advantages: [B,1], or anything that broadcasts to [B,T].
        tau: sharpness of the gate for A > 0, above 0.
        tau_negative: sharpness of the gate for A <= 0, above 0.

    Returns:
        [B,T] losses.
    """
    del log_probs
    taus = jnp.where(advantages > 0, tau, tau_negative)
    # The value of jax.nn.sigmoid, but its derivative is gate * exp(-x - softplus(-x)), not gate * (1 - gate),
    # which loses its digits as the gate nears 1. In float32 it is off by 1e-3 at ratio 12, and 0 from 18 on.
    gates = jnp.exp(jax.nn.log_sigmoid(taus * (bounded_exp(log_ratios) - 1.0)))
    return -4.0 / taus * gates * advantages


def gmpo_surrogate(
    log_ratios: Float[ArrayLike, "*BT"],
    log_probs: Float[ArrayLike, "*BT"] | None,
    advantages: Float[ArrayLike, "*#BT"],
    *,
    mask: Bool[ArrayLike, "*BT"],
    log_clip_range: Real[ArrayLike, ""] = 0.4,
    log_clip_range_high: Real[ArrayLike, ""] | None = None,
) -> Float[Array, "*BT"]:
    """Computes GMPO's objective, to be minimised: ``-A`` times the geometric mean of the clipped ratios.

    By https://arxiv.org/abs/2507.20673, equation 3, it clips token by token in log space before it takes the
    mean, on the side that A favours: ``min(d, high)`` where A > 0, ``max(d, -low)`` where it is not.

    Args:
        log_ratios: [B,T], log(pi / pi_old) of the tokens, 0 at masked positions.
        log_probs: [B,T], not used. Every surrogate has the same arguments.
        advantages: [B,1], or anything that broadcasts to [B,T] and is constant along T.
        mask: [B,T] bool, True at the tokens of each row's mean.
        log_clip_range: `low`, the distance below 0 to which a log ratio may fall, not negative. The paper's
            ratios lie in (exp(-0.4), exp(0.4)), section 4.1.
        log_clip_range_high: `high`, the distance above 0. None means the same as log_clip_range.

    Returns:
        [B,T] losses, the same at every token of a row.
    """
    del log_probs
    high = log_clip_range if log_clip_range_high is None else log_clip_range_high
    clipped = jnp.where(
        advantages > 0, jnp.minimum(log_ratios, high), jnp.maximum(log_ratios, -log_clip_range)
    )
    lengths = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(log_ratios.dtype)
    mean = jnp.sum(jnp.where(mask, clipped, 0), axis=-1, keepdims=True) / lengths
    return jnp.broadcast_to(-bounded_exp(mean) * advantages, log_ratios.shape)


def reinforce_surrogate(
    log_ratios: Float[ArrayLike, "*BT"] | None,
    log_probs: Float[ArrayLike, "*BT"],
    advantages: Float[ArrayLike, "*#BT"],
) -> Float[Array, "*BT"]:
    """Returns ``-A log pi``, whose gradient is the policy gradient of Williams (1992).

    See https://doi.org/10.1007/BF00992696. It uses no ratio, so use it with one pass over a fresh rollout.

    Args:
        log_ratios: [B,T], not used. Every surrogate has the same arguments.
        log_probs: [B,T], log pi.
        advantages: [B,1], or anything that broadcasts to [B,T].

    Returns:
        [B,T] losses.
    """
    del log_ratios
    return -advantages * log_probs


SURROGATES: dict[str, Callable[..., Array]] = {
    "clipped": clipped_surrogate,
    "cispo": cispo_surrogate,
    "sapo": sapo_surrogate,
    "gmpo": gmpo_surrogate,
    "reinforce": reinforce_surrogate,
}

__all__ = ["SURROGATES", *(surrogate.__name__ for surrogate in SURROGATES.values())]


def with_mask(surrogate: Callable[..., Array], mask: Bool[ArrayLike, "B T"]) -> Callable[..., Array]:
    """Returns f(log_ratios, log_probs, advantages), the surrogate with the mask if it takes one."""
    if "mask" not in inspect.signature(surrogate).parameters:
        return surrogate
    return lambda log_ratios, log_probs, advantages: surrogate(log_ratios, log_probs, advantages, mask=mask)


def clip_keywords(surrogate: Callable[..., Array]) -> tuple[str, ...]:
    """Lists the numbers that a surrogate can be given, such as `clip_range`."""
    parameters = inspect.signature(surrogate).parameters.items()
    return tuple(n for n, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and n != "mask")


def check_shapes(**arrays: ArrayLike | None) -> None:
    """Raises AssertionError if arrays [B,T] differ in shape; it names the argument and both shapes.

    Args:
        arrays: arrays by the name of their argument. `None` stands for one that is not given.
    """
    (name, first), *others = arrays.items()
    chex.assert_rank(first, 2, custom_message=f"{name} [B,T]")
    for other, array in others:
        if array is not None:
            chex.assert_shape(array, first.shape, custom_message=f"{other} [B,T], the shape of {name}")


def token_log_ratios(differences: Tokens, log_probs: Tokens, mask: Mask) -> Tokens:
    """Returns each token's own log ratio, as PPO and GRPO have it."""
    return differences


def sequence_log_ratios(differences: Tokens, log_probs: Tokens, mask: Mask) -> Tokens:
    """Returns the mean of the row's log ratios. GSPO, https://arxiv.org/abs/2507.18071, equation 7."""
    return jnp.where(mask, _row_means(differences, mask), 0)


def sequence_token_log_ratios(differences: Tokens, log_probs: Tokens, mask: Mask) -> Tokens:
    """Returns that mean with the gradient of the token's own log-prob. GSPO-token, equation 14."""
    means = jax.lax.stop_gradient(_row_means(differences, mask))
    return jnp.where(mask, means + log_probs - jax.lax.stop_gradient(log_probs), 0)


def _row_means(differences: Tokens, mask: Mask) -> Rows:
    """Returns the mean [B,1] of each row's masked-in values. The other values have to be 0."""
    lengths = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(differences.dtype)
    return jnp.sum(differences, axis=-1, keepdims=True) / lengths


# name -> f(differences, log_probs, mask). The differences are log(pi / pi_old) of the tokens. Both are 0 at
# masked positions, and so is the result.
RATIO_LEVELS: dict[str, Callable[[Tokens, Tokens, Mask], Tokens]] = {
    "token": token_log_ratios,
    "sequence": sequence_log_ratios,
    "sequence_token": sequence_token_log_ratios,
}


def log_ratios(
    log_probs: TokensLike, old_log_probs: TokensLike, mask: MaskLike, *, level: str = "token"
) -> Tokens:
    """Computes the log importance ratios log(pi / pi_old) at one of the `RATIO_LEVELS`.

        token           each token's own ratio (PPO, GRPO)
        sequence        one ratio per row, the mean over its tokens (GSPO, equation 7)
        sequence_token  that value with the gradient of the token's own (GSPO-token, equation 14)

    Args:
        log_probs: [B,T], log-probs under the policy being trained.
        old_log_probs: [B,T], log-probs under the policy that sampled. No gradient flows into it.
        mask: [B,T] bool. Values at masked positions, inf and NaN included, have no influence.
        level: a key of `RATIO_LEVELS`.

    Returns:
        [B,T], 0 at masked positions.

    Raises:
        ValueError: the level is unknown.
    """
    if level not in RATIO_LEVELS:
        raise ValueError(f"level: {level!r}; choose one of {', '.join(RATIO_LEVELS)}")
    check_shapes(log_probs=log_probs, old_log_probs=old_log_probs, mask=mask)
    mask = jnp.asarray(mask, bool)
    # Mask before any arithmetic, because exp of an extreme padded value gives 0 * inf = NaN in the gradient.
    log_probs = jnp.where(mask, log_probs, 0)
    differences = log_probs - jax.lax.stop_gradient(jnp.where(mask, old_log_probs, 0))
    return RATIO_LEVELS[level](differences, log_probs, mask)
