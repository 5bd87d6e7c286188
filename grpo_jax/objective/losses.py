"""The policy loss: ratio level x surrogate x KL estimator x reduction, each a pure function.

Every loss is ``sum(weights * per_token_loss)`` with weights [B,T] computed once from the mask of the
whole optimizer batch (`loss_weights`), so slicing the batch and adding up the slices changes nothing.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Real

from grpo_jax.objective.kl import bounded_exp, kl_k3
from grpo_jax.objective.surrogates import *  # noqa: F403  the surrogates are part of the losses
from grpo_jax.objective.surrogates import RATIO_LEVELS as RATIO_LEVELS
from grpo_jax.objective.surrogates import (
    MaskLike,
    Rows,
    Tokens,
    TokensLike,
    check_shapes,
    clipped_surrogate,
    log_ratios,
    with_mask,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossMetrics:
    """What `grpo_loss` saw, per call. `metrics.merge_loss_metrics` joins the slices of a batch.

    All are [], or [M] of M slices. Means and shares are over masked-in tokens, 0 if there are none.

    Args:
        policy_loss: sum(weights * surrogate).
        kl: mean estimate of KL(pi || ref) in nats, 0 without a reference.
        ratio_mean: mean importance ratio.
        ratio_max: largest importance ratio.
        clip_low: share of tokens whose gradient the surrogate stops at a ratio below 1.
        clip_high: the same at a ratio above 1.
        stale: share of tokens in sequences dropped as stale.
        num_tokens: number of masked-in tokens.
    """

    policy_loss: Real[ArrayLike, "*slices"]
    kl: Real[ArrayLike, "*slices"]
    ratio_mean: Real[ArrayLike, "*slices"]
    ratio_max: Real[ArrayLike, "*slices"]
    clip_low: Real[ArrayLike, "*slices"]
    clip_high: Real[ArrayLike, "*slices"]
    stale: Real[ArrayLike, "*slices"]
    num_tokens: Real[ArrayLike, "*slices"]

    replace = dataclasses.replace


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """What a reduction may know about the optimizer batch besides its mask."""

    num_rows: int | Int[Array, ""]  # B, without rows of padding. It is traced where padding was added.
    max_length: int  # completion limit in tokens
    num_microbatches: int  # M, the number of equal slices of consecutive rows


def sequence_weights(counted: Tokens, lengths: Rows, sizes: BatchSizes) -> Tokens:
    """Returns 1 / (B n_i): the mean over sequences of their mean over tokens. GRPO, equation 3."""
    return counted / jnp.maximum(lengths, 1) / sizes.num_rows


def token_weights(counted: Tokens, lengths: Rows, sizes: BatchSizes) -> Tokens:
    """Returns 1 / sum_i n_i: the mean over all tokens of the batch. DAPO, equation 8."""
    return counted / jnp.maximum(jnp.sum(lengths), 1)


def constant_weights(counted: Tokens, lengths: Rows, sizes: BatchSizes) -> Tokens:
    """Returns 1 / (B max_length), which has no length bias. Dr. GRPO, section 3.2."""
    return counted / (sizes.num_rows * sizes.max_length)


def sequence_sum_weights(counted: Tokens, lengths: Rows, sizes: BatchSizes) -> Tokens:
    """Returns 1 / B: the mean over sequences of their sum over tokens. RLOO."""
    return counted / sizes.num_rows


def local_token_weights(counted: Tokens, lengths: Rows, sizes: BatchSizes) -> Tokens:
    """Returns 1 / (M sum n_i of the row's micro-batch): the mean over M micro-batches of their token means.

    TRL calls it "bnpo". By definition it depends on how the batch is split.
    """
    rows = counted.shape[0]
    slices = sizes.num_microbatches
    if rows % slices:
        raise ValueError(f"{rows} rows do not divide into {slices} micro-batches")
    totals = jnp.sum(lengths.reshape(slices, -1), axis=1)
    per_row = jnp.repeat(totals, rows // slices)[:, None]
    return counted / jnp.maximum(per_row, 1) / slices


# name -> f(counted, lengths, sizes). `counted` is 1.0 at the tokens that count and 0.0 elsewhere.
# `lengths` are its row sums.
REDUCTIONS: dict[str, Callable[[Tokens, Rows, BatchSizes], Tokens]] = {
    "sequence": sequence_weights,
    "token": token_weights,
    "constant": constant_weights,
    "sequence_sum": sequence_sum_weights,
    "local_token": local_token_weights,
}


def loss_weights(
    mask: MaskLike,
    *,
    reduction: str = "sequence",
    max_length: int | None = None,
    num_sequences: Int[ArrayLike, ""] | None = None,
    num_microbatches: int = 1,
) -> Tokens:
    """Turns a reduction into per-token weights. The loss is ``sum(weights * per_token_loss)``.

        sequence      1 / (B n_i)         mean over sequences of the mean over tokens (GRPO)
        token         1 / sum_i n_i       mean over all tokens of the batch (DAPO, equation 8)
        constant      1 / (B max_length)  no length bias (Dr. GRPO, section 3.2)
        sequence_sum  1 / B               mean over sequences of the sum over tokens (RLOO)
        local_token   1 / (M sum_(i in slice) n_i)  mean over M micro-batches of their token means ("bnpo"
            in TRL). It is the one reduction that depends, by definition, on how the batch is split.

    Args:
        mask: [B,T] bool of the *whole* optimizer batch, never of a micro-batch.
        reduction: a key of `REDUCTIONS`.
        max_length: completion limit in tokens, used by "constant" only. None means T.
        num_sequences: B of the formulas. None means the number of rows. Give it when rows of padding were
            added, which must not count.
        num_microbatches: M, used by "local_token" only. The slices are B / M consecutive rows.

    Returns:
        float32 [B,T] (float64 if x64 is on), 0 where masked. A fully masked batch gives all zeros.

    Raises:
        ValueError: the reduction is unknown, or the B rows do not divide into M slices.

    >>> loss_weights(jnp.array([[1, 1], [1, 0]], bool)).tolist()
    [[0.25, 0.25], [0.5, 0.0]]
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    chex.assert_rank(mask, 2)
    counted = jnp.asarray(mask, bool).astype(jnp.result_type(float))
    lengths = jnp.sum(counted, axis=-1, keepdims=True)
    sizes = BatchSizes(
        num_rows=mask.shape[0] if num_sequences is None else jnp.maximum(num_sequences, 1),
        max_length=mask.shape[1] if max_length is None else max_length,
        num_microbatches=num_microbatches,
    )
    return REDUCTIONS[reduction](counted, lengths, sizes)


def grpo_loss(
    log_probs: TokensLike,
    old_log_probs: TokensLike,
    advantages: Float[ArrayLike, " B"],
    mask: MaskLike,
    weights: TokensLike,
    *,
    ref_log_probs: TokensLike | None = None,
    ratio_level: str = "token",
    surrogate: Callable[..., Array] = clipped_surrogate,
    kl_estimator: Callable[[Array, Array], Array] | None = kl_k3,
    kl_coef: Real[ArrayLike, ""] = 0.0,
    kl_ratio_corrected: bool = False,
    kls: TokensLike | None = None,
    at_reference: MaskLike | None = None,
    entropies: TokensLike | None = None,
    entropy_coef: Real[ArrayLike, ""] = 0.0,
    penalty_weights: TokensLike | None = None,
    max_staleness: Real[ArrayLike, ""] | None = None,
) -> tuple[Float[Array, ""], LossMetrics]:
    """Computes the GRPO loss, https://arxiv.org/abs/2402.03300, equation 3, and its whole family.

    ``sum_it weights_it * surrogate_it + penalty_weights_it * (kl_coef * kl_it - entropy_coef * entropy_it)``

    Args:
        log_probs: [B,T], log-probs of the sampled tokens under the policy being trained, the gradient's path.
        old_log_probs: [B,T], log-probs under the policy that sampled.
        advantages: [B].
        mask: [B,T] bool, True on completion tokens, the first eos included. No value at a masked position,
            NaN and inf included, changes the loss or its gradient.
        weights: [B,T], from `loss_weights` over the whole optimizer batch.
        ref_log_probs: [B,T], log-probs under the frozen reference. None means that there is no KL term.
        ratio_level: a key of `RATIO_LEVELS`, see `log_ratios`.
        surrogate: ``f(log_ratios [B,T], log_probs [B,T], advantages [B,1]) -> [B,T]``, see
            `grpo_jax.objective.surrogates`. Set its clip keywords with `functools.partial`.
        kl_estimator: ``f(log_probs, ref_log_probs) -> [...]``, see `grpo_jax.objective.kl`.
        kl_coef: weight of the KL term, not negative. Above 0 it needs ref_log_probs or kls.
        kl_ratio_corrected: whether the estimator is multiplied by the importance ratio (of the ratio level,
            and differentiated). At the token level that is unbiased for the current policy, with the
            gradient of KL(pi || ref).
        kls: [B,T], exact KL(pi || ref) of every position's distribution (`kl_exact`), with the gradient's
            path. It is used instead of the estimator.
        at_reference: [B,T] bool, True where the policy is known to be the reference. The KL of those tokens
            and its gradient are exactly 0, where two programs would leave their rounding. None means
            nowhere.
        entropies: [B,T], entropy of every position's distribution, with the gradient's path.
        entropy_coef: weight of the entropy bonus. It needs entropies.
        penalty_weights: [B,T], weights of the KL term and of the entropy bonus. None means `weights`.
        max_staleness: number of nats. Sequences with a negative advantage whose mean log-prob has fallen by
            more than that since they were sampled lose their policy term. This is the "off-policy sequence
            masking" of DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 3.1. None turns it off.

    Returns:
        (loss [], LossMetrics). On-policy (ratio 1) the value of the policy loss is close to 0 because
        advantages are centred. What matters is the gradient, which is not 0.

    Raises:
        ValueError: a mask is not bool, weights are no floats, or kl_coef is above 0 without a reference.

    >>> log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.5]]))
    >>> mask = jnp.array([[True, True], [True, False]])
    >>> advantages = jnp.array([1.0, -1.0])
    >>> loss = lambda x: grpo_loss(x, log_probs, advantages, mask, loss_weights(mask))[0]
    >>> jax.grad(loss)(log_probs).tolist()  # the good row shall become more likely
    [[-0.25, -0.25], [0.5, 0.0]]
    """
    check_shapes(
        log_probs=log_probs,
        old_log_probs=old_log_probs,
        mask=mask,
        weights=weights,
        ref_log_probs=ref_log_probs,
        kls=kls,
        at_reference=at_reference,
        entropies=entropies,
        penalty_weights=penalty_weights,
    )
    chex.assert_shape(advantages, log_probs.shape[:1], custom_message="advantages [B]")
    _check_masks(mask=mask, at_reference=at_reference)
    _check_floats(weights=weights, penalty_weights=penalty_weights)
    if kls is None and ref_log_probs is None:
        _check_no_kl(kl_coef)
    mask = jnp.asarray(mask, bool)
    log_probs = jnp.where(mask, log_probs, 0)
    penalty_weights = weights if penalty_weights is None else penalty_weights
    old_log_probs, advantages, weights, penalty_weights = jax.lax.stop_gradient(
        (old_log_probs, advantages[:, None], weights, penalty_weights)
    )
    log_rho = log_ratios(log_probs, old_log_probs, mask, level=ratio_level)
    surrogate = with_mask(surrogate, mask)
    stale = _stale_rows(log_probs, old_log_probs, advantages, mask, max_staleness)
    surrogates = jnp.where(mask & ~stale, surrogate(log_rho, log_probs, advantages), 0)
    policy_loss = jnp.sum(weights * surrogates)
    loss = policy_loss
    apart = mask if at_reference is None else mask & ~at_reference
    kls = _kls(kls, log_probs, ref_log_probs, log_rho, apart, kl_estimator, kl_ratio_corrected)
    if kls is not None:
        loss = loss + kl_coef * jnp.sum(penalty_weights * kls)
    if entropies is not None:
        loss = loss - entropy_coef * jnp.sum(penalty_weights * jnp.where(mask, entropies, 0))
    clipped = _clipped_tokens(surrogate, log_rho, log_probs, advantages)
    return loss, _loss_metrics(policy_loss, kls, log_rho, clipped, stale, mask)


def _check_masks(**masks: ArrayLike | None) -> None:
    for name, mask in masks.items():
        if mask is not None and jnp.result_type(mask) != jnp.bool_:
            raise ValueError(
                f"{name}: its dtype is {jnp.result_type(mask)}; give a bool [B,T], such as {name} != 0. "
                "Positional order: log_probs, old_log_probs, advantages, mask, weights"
            )


def _check_floats(**weights: ArrayLike | None) -> None:
    for name, values in weights.items():
        if values is not None and not jnp.issubdtype(jnp.result_type(values), jnp.floating):
            raise ValueError(
                f"{name}: their dtype is {jnp.result_type(values)}; give floats [B,T], such as "
                "loss_weights(mask)"
            )


def _check_no_kl(kl_coef: Real[ArrayLike, ""]) -> None:
    if not isinstance(kl_coef, jax.core.Tracer) and kl_coef > 0:  # under jit nobody knows its value
        raise ValueError(
            f"kl_coef={float(kl_coef):g} needs a reference: give ref_log_probs [B,T], log-probs under the "
            "frozen model (or kls), or kl_coef=0"
        )


def _kls(kls, log_probs, ref_log_probs, log_rho, mask, kl_estimator, kl_ratio_corrected) -> Array | None:
    """Returns the KL term of every token [B,T], 0 where masked, or None without a reference."""
    if kls is None and ref_log_probs is None:
        return None
    if kls is None:
        ref_log_probs = jax.lax.stop_gradient(jnp.where(mask, ref_log_probs, 0))
        kls = kl_estimator(log_probs, ref_log_probs)
    chex.assert_equal_shape([log_probs, kls])
    return jnp.where(mask, kls * bounded_exp(log_rho) if kl_ratio_corrected else kls, 0)


def _stale_rows(log_probs, old_log_probs, advantages, mask, max_staleness) -> Array:
    """Says which rows are dropped: bool [B,1]."""
    if max_staleness is None:
        return jnp.zeros((mask.shape[0], 1), bool)
    fallen = -log_ratios(jax.lax.stop_gradient(log_probs), old_log_probs, mask, level="sequence")
    return (advantages < 0) & jnp.any(fallen > max_staleness, axis=1, keepdims=True)


def _clipped_tokens(surrogate, log_rho, log_probs, advantages) -> Array:
    """Says where the surrogate lets no gradient through although the advantage is not zero: bool [B,T].

    The derivative of the sum of all losses with respect to each token tells. That needs no knowledge of a
    surrogate's clip keywords and holds where a surrogate couples the tokens of a row, too.
    """

    def total(inputs):
        return jnp.sum(surrogate(*inputs, advantages))

    by_ratio, by_log_prob = jax.grad(total)(jax.lax.stop_gradient((log_rho, log_probs)))
    return (by_ratio + by_log_prob == 0) & (advantages != 0)


def _loss_metrics(policy_loss, kls, log_rho, clipped, stale, mask) -> LossMetrics:
    num_tokens = jnp.sum(mask)

    def mean(values):
        return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(num_tokens, 1)

    rho = bounded_exp(log_rho)
    metrics = LossMetrics(
        policy_loss=policy_loss,
        kl=mean(jnp.zeros_like(rho) if kls is None else kls),
        ratio_mean=mean(rho),
        ratio_max=jnp.max(jnp.where(mask, rho, 0)),
        clip_low=mean(clipped & (rho < 1)),
        clip_high=mean(clipped & (rho > 1)),
        stale=mean(jnp.broadcast_to(stale, mask.shape)),
        num_tokens=num_tokens,
    )
    return jax.lax.stop_gradient(metrics)
