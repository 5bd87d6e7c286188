"""Teacher-forced log-probs and entropies of completions, without ever making [B, L, V]."""

import functools
import math

import chex
import jax
import jax.numpy as jnp

from grpo_jax.decoding import fork, positions_from_mask, prefill
from grpo_jax.kl import kl_exact
from grpo_jax.sampling import scale_logits
from grpo_jax.types import Array, Experience, Params, Policy, Prompts, Rollout

CHUNK_SIZE = 1024  # tokens whose logits exist at a time, unless said otherwise


def completion_hidden(
    policy: Policy, params: Params, rollout: Rollout | Experience, *, group_size: int = 1
) -> Array:
    """Runs prompts and completions through the model; each prompt once, however many completions it has.

    With a group size above 1 the prompts fill a cache that is forked to their completions, as in `generate`,
    and gradients flow back through it: the work on the prompts falls by that factor.

    Args:
        policy: the model's functions.
        params: its parameters.
        rollout: anything with prompt_tokens [B,S], prompt_mask, tokens [B,T] and mask.
        group_size: that many consecutive rows have the same prompt; a divisor of B.

    Returns:
        hidden [B,T,D]; position t is the state that predicts completion token t.
    """
    prompt_length = rollout.prompt_tokens.shape[1]
    # The last completion token predicts nothing we need.
    tokens, mask = rollout.tokens[:, :-1], rollout.mask[:, :-1]
    whole_mask = jnp.concatenate([rollout.prompt_mask, mask], axis=1)
    positions = positions_from_mask(whole_mask)
    if group_size == 1:
        whole = jnp.concatenate([rollout.prompt_tokens, tokens], axis=1)
        hidden, _ = policy.forward(params, whole, whole_mask, positions, None)
        return hidden[:, prompt_length - 1 :]
    prompts = Prompts(tokens=rollout.prompt_tokens[::group_size], mask=rollout.prompt_mask[::group_size])
    last, cache = fork(prefill(policy, params, prompts, max_length=whole_mask.shape[1]), group_size)
    if tokens.shape[1] == 0:
        return last[:, None]
    hidden, _ = policy.forward(params, tokens, whole_mask, positions[:, prompt_length:], cache)
    return jnp.concatenate([last[:, None], hidden], axis=1)


def token_log_probs(
    policy: Policy,
    params: Params,
    hidden: Array,
    tokens: Array,
    *,
    temperature: float | Array = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, Array]:
    """Computes log-probs of tokens and entropies from hidden states, chunk_size tokens at a time.

    The logits of one chunk [chunk_size, V] are all that exists at a time, in the backward pass too,
    where they are computed again.

    Args:
        policy: the model's functions.
        params: its parameters.
        hidden: [B,T,D].
        tokens: [B,T] int32.
        temperature: the logits are divided by it; 0 counts as 1, as in `generate`.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        (log_probs [B,T], entropies [B,T]), float32, of softmax(logits / temperature); nats.
    """
    chex.assert_equal_shape_prefix([hidden, tokens], 2)

    def one_chunk(params, hidden, tokens):
        return _of_logits(scale_logits(policy.unembed(params, hidden), temperature), tokens)

    return _over_chunks(one_chunk, params, (hidden, tokens), chunk_size)


def token_log_probs_and_kls(
    policy: Policy,
    params: Params,
    ref_params: Params,
    hidden: Array,
    ref_hidden: Array,
    tokens: Array,
    *,
    temperature: float | Array = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, Array, Array]:
    """Computes what `token_log_probs` does, and the exact KL(pi || ref) of every position's distribution.

    Args:
        policy: the model's functions.
        params: its parameters.
        ref_params: parameters of the reference; no gradient flows into them.
        hidden: [B,T,D], under params.
        ref_hidden: [B,T,D], under ref_params.
        tokens: [B,T] int32.
        temperature: as in `token_log_probs`; of both distributions.
        chunk_size: tokens whose two sets of logits exist at a time.

    Returns:
        (log_probs [B,T], entropies [B,T], kls [B,T]), float32 nats.
    """
    chex.assert_equal_shape_prefix([hidden, ref_hidden, tokens], 2)
    ref_params, ref_hidden = jax.lax.stop_gradient((ref_params, ref_hidden))

    def one_chunk(params, hidden, ref_hidden, tokens):
        logits = scale_logits(policy.unembed(params, hidden), temperature)
        ref_logits = scale_logits(policy.unembed(ref_params, ref_hidden), temperature)
        return *_of_logits(logits, tokens), kl_exact(logits, ref_logits)

    return _over_chunks(one_chunk, params, (hidden, ref_hidden, tokens), chunk_size)


def _of_logits(logits: Array, tokens: Array) -> tuple[Array, Array]:
    """Returns (log-probs of tokens [...], entropies [...]) of logits [..., V]."""
    log_probs = jax.nn.log_softmax(logits)
    entropies = -jnp.sum(jnp.exp(log_probs) * jnp.maximum(log_probs, -1e30), axis=-1)
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0], entropies


def _over_chunks(one_chunk, params: Params, arrays: tuple[Array, ...], chunk_size: int) -> tuple[Array, ...]:
    """Calls one_chunk(params, *chunks) on chunk_size tokens of arrays [B,T,...] at a time: arrays [B,T]."""
    shape = arrays[0].shape[:2]
    count = shape[0] * shape[1]
    chunk_size = min(chunk_size, count)
    num_chunks = -(-count // chunk_size)
    padding = num_chunks * chunk_size - count

    def cut(x):
        x = jnp.pad(x.reshape(count, *x.shape[2:]), ((0, padding), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(num_chunks, chunk_size, *x.shape[1:])

    one_chunk = jax.checkpoint(one_chunk)
    chunks = jax.tree.map(cut, arrays)
    if num_chunks == 1:
        results = one_chunk(params, *(x[0] for x in chunks))
    else:
        results = jax.lax.map(lambda chunk: one_chunk(params, *chunk), chunks)
    return tuple(x.reshape(-1)[:count].reshape(shape) for x in results)


@functools.partial(jax.jit, static_argnames=("group_size", "num_microbatches", "chunk_size"))
def completion_log_probs(
    policy: Policy,
    params: Params,
    rollout: Rollout,
    *,
    temperature: float | Array = 1.0,
    group_size: int = 1,
    num_microbatches: int = 1,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, Array]:
    """Scores the completions of a rollout. Compiled once per shape.

    Args:
        policy: the model's functions.
        params: its parameters.
        rollout: B rows; prompts left-padded, completions right-padded.
        temperature: the temperature it was sampled with; traced.
        group_size: see `completion_hidden`; each prompt is then run once per slice.
        num_microbatches: slices run one after the other; memory falls, the result stays.
        chunk_size: see `token_log_probs`.

    Returns:
        (log_probs [B,T], entropies [B,T]), float32 nats, 0 where masked.
    """
    chex.assert_rank([rollout.prompt_tokens, rollout.tokens, rollout.mask], 2)

    shared = shared_rows(rollout.mask.shape[0], group_size, num_microbatches)

    def score(part):
        hidden = completion_hidden(policy, params, part, group_size=shared)
        return token_log_probs(
            policy, params, hidden, part.tokens, temperature=temperature, chunk_size=chunk_size
        )

    if num_microbatches == 1:
        log_probs, entropies = score(rollout)
    else:
        parts = split_rows(rollout, num_microbatches)
        log_probs, entropies = (x.reshape(rollout.mask.shape) for x in jax.lax.map(score, parts))
    return jnp.where(rollout.mask, log_probs, 0), jnp.where(rollout.mask, entropies, 0)


def shared_rows(num_rows: int, group_size: int, num_microbatches: int) -> int:
    """Returns how many consecutive rows of every slice surely have the same prompt."""
    return math.gcd(num_rows // num_microbatches, group_size)


def split_rows(batch, num_parts: int):
    """Cuts every array [B, ...] of a pytree into [num_parts, B / num_parts, ...], rows in order.

    Raises:
        ValueError: B does not divide.
    """

    def split(x):
        if x.shape[0] % num_parts:
            raise ValueError(
                f"{x.shape[0]} rows do not divide into {num_parts} equal micro-batches; "
                "choose num_microbatches among the divisors of the batch size"
            )
        return x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])

    return jax.tree.map(split, batch)
