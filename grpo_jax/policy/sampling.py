"""From logits to one token: temperature, truncation and sampling. Every setting may be traced."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

_BLOCK = 128  # width of the second level of `sample_token`


def scale_logits(logits: Array, temperature: float | Array) -> Array:
    """Returns float32 logits / temperature. Temperature 0 leaves them as they are.

    Args:
        logits: logits [..., V].
        temperature: number or 0-d array, not negative.

    Returns:
        float32 [..., V].
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    return logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)


def _keep_largest(logits: Array, enough) -> Array:
    """Keeps the smallest set of largest entries for which ``enough(keep) -> bool [..., 1]`` holds.

    It bisects the bits of the float32 logits, whose order is the order of the numbers. That takes 32 passes
    over V and no sort, and it is exact. Entries equal to the smallest kept one are all kept.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    # Negative floats have the reverse order as integers, so negate their magnitude. -0.0 and 0.0 become one
    # key.
    keys = jnp.where(bits < 0, -(bits & jnp.int32(0x7FFFFFFF)), bits)
    # The largest threshold that keeps enough lies in [low, high]. Start with all of int32.
    low = jnp.full((*keys.shape[:-1], 1), jnp.iinfo(jnp.int32).min)
    high = jnp.full_like(low, jnp.iinfo(jnp.int32).max)

    def halve(_, bounds):
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # ceil of the mean, without overflow
        ok = enough(keys >= middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(keys >= low, logits, -jnp.inf)


def _keep_top_k(logits: Array, top_k: Array) -> Array:
    return _keep_largest(logits, lambda keep: jnp.sum(keep, axis=-1, keepdims=True) >= top_k)


def _keep_top_p(logits: Array, top_p: Array) -> Array:
    probs = jax.nn.softmax(logits, axis=-1)
    # Rounding may leave the sum of the whole vocabulary slightly below 1. Nothing is dropped for that.
    target = jnp.minimum(top_p, jnp.sum(probs, axis=-1, keepdims=True))
    return _keep_largest(logits, lambda keep: jnp.sum(probs * keep, axis=-1, keepdims=True) >= target)


def _keep_min_p(logits: Array, min_p: Array) -> Array:
    threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def process_logits(
    logits: Array,
    *,
    temperature: float | Array = 1.0,
    top_k: int | Array = 0,
    top_p: float | Array = 1.0,
    min_p: float | Array = 0.0,
) -> Array:
    """Applies temperature, then top-k, top-p (https://arxiv.org/abs/1904.09751) and min-p
    (https://arxiv.org/abs/2407.01082), each to what the one before has left.

    All settings may be traced, so that changing them causes no recompilation. A filter that is off costs
    nothing. One that is on costs 32 passes over V instead of a sort.

    Args:
        logits: logits [..., V].
        temperature: number, not negative. 0 means greedy, so that only the (first) most likely token is kept.
        top_k: number of most likely tokens that are kept, with all ties of the last one. 0 is off.
        top_p: probability that the smallest set of most likely tokens has at least, which is kept. 1 is off.
        min_p: share of the largest probability below which tokens are dropped. 0 is off.

    Returns:
        float32 [..., V], -inf for dropped tokens. At least one token is kept.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    top_k = jnp.asarray(top_k, jnp.int32)
    top_p = jnp.asarray(top_p, jnp.float32)
    min_p = jnp.asarray(min_p, jnp.float32)
    chex.assert_rank([temperature, top_k, top_p, min_p], 0)
    scaled = scale_logits(logits, temperature)

    def only_if(condition, fn, x):
        return jax.lax.cond(condition, fn, lambda x: x, x)

    def greedy(x):
        best = jnp.argmax(x, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(x.shape[-1]) == best, x, -jnp.inf)

    def truncate(x):
        x = only_if(top_k > 0, lambda x: _keep_top_k(x, top_k), x)
        x = only_if(top_p < 1, lambda x: _keep_top_p(x, top_p), x)
        return only_if(min_p > 0, lambda x: _keep_min_p(x, min_p), x)

    on = (top_k > 0) | (top_p < 1) | (min_p > 0)
    branch = jnp.where(temperature == 0, 2, on.astype(jnp.int32))
    return jax.lax.switch(branch, [lambda x: x, truncate, greedy], scaled)


def _pick(weights: Array, targets: Array) -> tuple[Array, Array]:
    """Returns (index [...], weight before it [...]) of the first positive weight at which the running sum
    of weights [..., K] exceeds targets [...].
    """
    sums = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    hit = positive & (sums > targets[..., None])
    # The target can reach the total by rounding. Then the last token that can be sampled is taken.
    last = weights.shape[-1] - 1 - jnp.argmax(positive[..., ::-1], axis=-1)
    index = jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), last)
    before = jnp.take_along_axis(sums - weights, index[..., None], axis=-1)[..., 0]
    return index, before


def sample_token(logits: Array, uniforms: Array) -> Array:
    """Samples one token per row by inverting the cumulative distribution, in two levels.

    It needs one uniform number per row instead of V Gumbel noises. That number chooses a block of 128 tokens
    by the blocks' sums, and then the token inside it.

    Args:
        logits: logits [..., V], float32, -inf for tokens that must not be sampled. At least one is finite.
        uniforms: uniform numbers [...], float32, in [0, 1).

    Returns:
        int32 [...], never a token of probability 0.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    size = probs.shape[-1]
    blocks = -(-size // _BLOCK)
    probs = jnp.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(0, blocks * _BLOCK - size)])
    probs = probs.reshape(*probs.shape[:-1], blocks, _BLOCK)
    sums = jnp.sum(probs, axis=-1)
    targets = uniforms * jnp.sum(sums, axis=-1)
    block, before = _pick(sums, targets)
    inside = jnp.take_along_axis(probs, block[..., None, None], axis=-2)[..., 0, :]
    token, _ = _pick(inside, targets - before)
    return (block * _BLOCK + token).astype(jnp.int32)


draw = sample_token  # its name until version 0.2
