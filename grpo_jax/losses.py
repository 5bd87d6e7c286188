"""The policy loss: ratio level x surrogate x KL estimator x reduction, each a pure function.

Every loss is ``sum(weights * per_token_loss)`` with weights [B,T] computed once from the mask of the
whole optimizer batch (`loss_weights`), so slicing the batch and adding up the slices changes nothing.
"""

from collections.abc import Callable

import chex
import flax.struct
import jax
import jax.numpy as jnp

from grpo_jax.kl import bounded_exp, kl_k3
from grpo_jax.types import Array

RATIO_LEVELS = ("token", "sequence", "sequence_token")
REDUCTIONS = ("sequence", "token", "constant")


@flax.struct.dataclass(kw_only=True)
class LossMetrics:
    """What `grpo_loss` saw, per call; `metrics.merge_loss_metrics` joins the slices of a batch.

    Means are over masked-in tokens; a batch without any gives zeros.
    """

    policy_loss: Array  # [] sum(weights * surrogate)
    kl: Array  # [] mean estimate of KL(pi || ref), nats; 0 without a reference
    ratio_mean: Array  # [] mean importance ratio
    ratio_max: Array  # [] largest importance ratio
    clip_low: Array  # [] share of tokens whose gradient the surrogate cuts at a ratio below 1
    clip_high: Array  # [] the same at a ratio above 1
    num_tokens: Array  # [] masked-in tokens


def log_ratios(log_probs: Array, old_log_probs: Array, mask: Array, *, level: str = "token") -> Array:
    """Computes the log importance ratios log(pi / pi_old) at one of three levels.

    token: ``l - o`` (PPO, GRPO). sequence: their mean over the row's tokens, the same at every token,
    i.e. the length-normalised sequence ratio of GSPO, https://arxiv.org/abs/2507.18071, equation 7.
    sequence_token: the value of the sequence ratio with the gradient of the token's own log-prob,
    GSPO-token, equation 14.

    Args:
        log_probs: [B,T], under the policy being trained.
        old_log_probs: [B,T], under the policy that sampled; no gradient flows into it.
        mask: [B,T] bool. What stands at masked positions (inf included) has no influence.
        level: "token", "sequence" or "sequence_token".

    Returns:
        [B,T], 0 at masked positions.

    Raises:
        ValueError: unknown level.
    """
    chex.assert_rank([log_probs, old_log_probs, mask], 2)
    chex.assert_equal_shape([log_probs, old_log_probs, mask])
    mask = jnp.asarray(mask, bool)
    # Mask before any arithmetic: exp of an extreme padded value gives 0 * inf = NaN in the gradient.
    log_probs = jnp.where(mask, log_probs, 0)
    difference = log_probs - jax.lax.stop_gradient(jnp.where(mask, old_log_probs, 0))
    if level == "token":
        return difference
    lengths = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(difference.dtype)
    mean = jnp.sum(difference, axis=-1, keepdims=True) / lengths
    if level == "sequence":
        return jnp.where(mask, mean, 0)
    if level == "sequence_token":
        mean = jax.lax.stop_gradient(mean)
        return jnp.where(mask, mean + log_probs - jax.lax.stop_gradient(log_probs), 0)
    raise ValueError(f"level: {level!r}; choose 'token', 'sequence' or 'sequence_token'")


def clipped_surrogate(
    log_ratios: Array,
    log_probs: Array,
    advantages: Array,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    delta: float | None = None,
    dual_clip: float | None = None,
) -> Array:
    """Computes PPO's clipped objective, to be minimised.

    ``-min(rho A, clip(rho, 1 - clip_range, 1 + clip_range_high) A)``: PPO,
    https://arxiv.org/abs/1707.06347, equation 7; with clip_range_high > clip_range the "clip-higher"
    of DAPO, https://arxiv.org/abs/2503.14476, equation 10.

    Args:
        log_ratios: [B,T], log(pi / pi_old).
        log_probs: [B,T], not used; every surrogate has the same arguments.
        advantages: [B,1], or anything that broadcasts to [B,T].
        clip_range: how far below 1 the ratio may fall before the gradient stops; in [0, 1].
        clip_range_high: how far above 1; None: clip_range.
        delta: two-sided clipping, upper bound of rho in the first term (acts for A < 0 only); above
            1 + clip_range_high. INTELLECT-2, https://arxiv.org/abs/2505.07291, section 3.4.
        dual_clip: c > 1; for A < 0 the loss is at most -c A. https://arxiv.org/abs/1912.09729, equation 5.

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


def cispo_surrogate(log_ratios: Array, log_probs: Array, advantages: Array, *, cap: float = 5.0) -> Array:
    """Computes CISPO's objective, to be minimised: ``-sg(min(rho, cap)) A log pi``.

    https://arxiv.org/abs/2506.13585, equations 4 and 5, without a lower bound as in the paper's runs. The
    importance weight is capped and constant; no token ever loses its gradient.

    Args:
        log_ratios: [B,T], log(pi / pi_old); no gradient flows through it.
        log_probs: [B,T], log pi; the gradient's path.
        advantages: [B,1], or anything that broadcasts to [B,T].
        cap: largest importance weight, an absolute ratio (not a distance from 1); above 0.

    Returns:
        [B,T] losses.
    """
    weights = jax.lax.stop_gradient(jnp.minimum(bounded_exp(log_ratios), cap))
    return -weights * advantages * log_probs


def sapo_surrogate(
    log_ratios: Array, log_probs: Array, advantages: Array, *, tau: float = 1.0, tau_negative: float = 1.05
) -> Array:
    """Computes SAPO's softly gated objective, to be minimised: ``-(4/tau) sigmoid(tau (rho - 1)) A``.

    https://arxiv.org/abs/2511.20347, equations 4 to 6. The gradient is that of REINFORCE at ratio 1 and
    fades smoothly on both sides, faster for negative advantages.

    Args:
        log_ratios: [B,T], log(pi / pi_old).
        log_probs: [B,T], not used; every surrogate has the same arguments.
        advantages: [B,1], or anything that broadcasts to [B,T].
        tau: sharpness of the gate for A > 0; above 0.
        tau_negative: the same for A <= 0.

    Returns:
        [B,T] losses.
    """
    del log_probs
    taus = jnp.where(advantages > 0, tau, tau_negative)
    return -4.0 / taus * jax.nn.sigmoid(taus * (bounded_exp(log_ratios) - 1.0)) * advantages


def reinforce_surrogate(log_ratios: Array, log_probs: Array, advantages: Array) -> Array:
    """Returns ``-A log pi``, whose gradient is the policy gradient of Williams (1992).

    https://doi.org/10.1007/BF00992696. It knows no ratio: use it with one pass over a fresh rollout.

    Args:
        log_ratios: [B,T], not used; every surrogate has the same arguments.
        log_probs: [B,T], log pi.
        advantages: [B,1], or anything that broadcasts to [B,T].

    Returns:
        [B,T] losses.
    """
    del log_ratios
    return -advantages * log_probs


def loss_weights(
    mask: Array,
    *,
    reduction: str = "sequence",
    max_length: int | None = None,
    num_sequences: int | Array | None = None,
) -> Array:
    """Turns a reduction into per-token weights; the loss is ``sum(weights * per_token_loss)``.

        sequence  1 / (B n_i)       mean over sequences of the mean over tokens (GRPO)
        token     1 / sum_i n_i     mean over all tokens of the batch (DAPO, equation 8)
        constant  1 / (B max_length)  no length bias (Dr. GRPO, section 3.1)

    Args:
        mask: [B,T] bool of the *whole* optimizer batch, never of a micro-batch.
        reduction: "sequence", "token" or "constant".
        max_length: the configured completion limit, only for "constant"; None: T.
        num_sequences: B of the formulas; None: the number of rows. Give it when rows of padding were
            added, which must not count.

    Returns:
        float32 [B,T] (float64 if x64 is on), 0 where masked. A fully masked batch gives all zeros.

    Raises:
        ValueError: unknown reduction.

    >>> loss_weights(jnp.array([[1, 1], [1, 0]], bool)).tolist()
    [[0.25, 0.25], [0.5, 0.0]]
    """
    chex.assert_rank(mask, 2)
    mask = jnp.asarray(mask, bool)
    weights = mask.astype(jnp.result_type(float))
    lengths = jnp.sum(weights, axis=-1, keepdims=True)
    rows = mask.shape[0] if num_sequences is None else num_sequences
    if reduction == "sequence":
        return weights / jnp.maximum(lengths, 1) / rows
    if reduction == "token":
        return weights / jnp.maximum(jnp.sum(lengths), 1)
    if reduction == "constant":
        return weights / (rows * (mask.shape[1] if max_length is None else max_length))
    raise ValueError(f"reduction: {reduction!r}; choose 'sequence', 'token' or 'constant'")


def grpo_loss(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    weights: Array,
    *,
    ref_log_probs: Array | None = None,
    ratio_level: str = "token",
    surrogate: Callable[..., Array] = clipped_surrogate,
    kl_estimator: Callable[[Array, Array], Array] = kl_k3,
    kl_coef: float | Array = 0.0,
    kl_ratio_corrected: bool = False,
) -> tuple[Array, LossMetrics]:
    """Computes the GRPO loss, https://arxiv.org/abs/2402.03300, equation 3, and its whole family.

    ``sum_it weights_it * (surrogate_it + kl_coef * kl_estimator_it)``

    Args:
        log_probs: [B,T], of the sampled tokens under the policy being trained; the gradient's path.
        old_log_probs: [B,T], under the policy that sampled.
        advantages: [B].
        mask: [B,T] bool, True on completion tokens, the first eos included. Whatever stands at masked
            positions, NaN and inf included, changes neither the loss nor its gradient.
        weights: [B,T], from `loss_weights` over the whole optimizer batch.
        ref_log_probs: [B,T], under the frozen reference; None: no KL term.
        ratio_level: see `log_ratios`.
        surrogate: ``f(log_ratios [B,T], log_probs [B,T], advantages [B,1]) -> [B,T]``; set its clip
            keywords with `functools.partial`.
        kl_estimator: ``f(log_probs, ref_log_probs) -> [...]``, see `grpo_jax.kl`.
        kl_coef: weight of the KL term, not negative.
        kl_ratio_corrected: multiplies the estimator by the importance ratio (of the ratio level, and
            differentiated). At the token level that is unbiased for the current policy, with the gradient
            of KL(pi || ref).

    Returns:
        (loss [], LossMetrics). On-policy (ratio 1) the value of the policy loss is close to 0 because
        advantages are centred; the gradient is what matters, and it is not.
    """
    chex.assert_rank([log_probs, old_log_probs, mask, weights], 2)
    chex.assert_equal_shape([log_probs, old_log_probs, mask, weights])
    chex.assert_shape(advantages, (log_probs.shape[0],))
    mask = jnp.asarray(mask, bool)
    log_probs = jnp.where(mask, log_probs, 0)
    old_log_probs, advantages, weights = jax.lax.stop_gradient((old_log_probs, advantages[:, None], weights))
    ratios = log_ratios(log_probs, old_log_probs, mask, level=ratio_level)
    surrogates = jnp.where(mask, surrogate(ratios, log_probs, advantages), 0)
    policy_loss = jnp.sum(weights * surrogates)
    loss, kls = policy_loss, jnp.zeros_like(log_probs)
    if ref_log_probs is not None:
        chex.assert_equal_shape([log_probs, ref_log_probs])
        ref_log_probs = jax.lax.stop_gradient(jnp.where(mask, ref_log_probs, 0))
        kls = kl_estimator(log_probs, ref_log_probs)
        kls = jnp.where(mask, kls * bounded_exp(ratios) if kl_ratio_corrected else kls, 0)
        loss = loss + kl_coef * jnp.sum(weights * kls)
    cut = _cut_tokens(surrogate, ratios, log_probs, advantages)
    return loss, _loss_metrics(policy_loss, kls, ratios, cut, mask)


def _cut_tokens(surrogate, log_ratios, log_probs, advantages) -> Array:
    """Says where the surrogate lets no gradient through although the advantage is not zero: bool [B,T].

    A surrogate acts token by token, so one forward derivative along all ones is every token's own.
    This needs no knowledge of any surrogate's clip keywords.
    """
    inputs = jax.lax.stop_gradient((log_ratios, log_probs))
    _, slopes = jax.jvp(
        lambda ratios, log_probs: surrogate(ratios, log_probs, advantages),
        inputs,
        jax.tree.map(jnp.ones_like, inputs),
    )
    return (slopes == 0) & (advantages != 0)


def _loss_metrics(policy_loss, kls, log_ratios, cut, mask) -> LossMetrics:
    num_tokens = jnp.sum(mask)

    def mean(values):
        return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(num_tokens, 1)

    ratios = bounded_exp(log_ratios)
    metrics = LossMetrics(
        policy_loss=policy_loss,
        kl=mean(kls),
        ratio_mean=mean(ratios),
        ratio_max=jnp.max(jnp.where(mask, ratios, 0)),
        clip_low=mean(cut & (ratios < 1)),
        clip_high=mean(cut & (ratios > 1)),
        num_tokens=num_tokens,
    )
    return jax.lax.stop_gradient(metrics)
