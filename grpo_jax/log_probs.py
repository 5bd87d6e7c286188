"""Teacher-forced log-probs and entropies of completions, without ever making [B, L, V]."""

import functools

import chex
import jax
import jax.numpy as jnp

from grpo_jax.decoding import positions_from_mask
from grpo_jax.sampling import scale_logits
from grpo_jax.types import Array, Experience, Params, Policy, Rollout

CHUNK_SIZE = 1024  # tokens whose logits exist at a time, unless said otherwise


def completion_hidden(policy: Policy, params: Params, rollout: Rollout | Experience) -> Array:
    """Runs prompts and completions through the model.

    Args:
        policy: the model's functions.
        params: its parameters.
        rollout: anything with prompt_tokens [B,S], prompt_mask, tokens [B,T] and mask.

    Returns:
        hidden [B,T,D]; position t is the state that predicts completion token t.
    """
    prompt_length = rollout.prompt_tokens.shape[1]
    # The last completion token predicts nothing we need.
    tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens[:, :-1]], axis=1)
    mask = jnp.concatenate([rollout.prompt_mask, rollout.mask[:, :-1]], axis=1)
    hidden, _ = policy.forward(params, tokens, mask, positions_from_mask(mask), None)
    return hidden[:, prompt_length - 1 :]


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
    shape, count = tokens.shape, tokens.size
    chunk_size = min(chunk_size, count)
    chunks = -(-count // chunk_size)
    padding = chunks * chunk_size - count
    hidden = jnp.pad(hidden.reshape(count, -1), ((0, padding), (0, 0))).reshape(chunks, chunk_size, -1)
    tokens = jnp.pad(tokens.reshape(count), (0, padding)).reshape(chunks, chunk_size)

    @jax.checkpoint
    def one_chunk(params, hidden, tokens):
        log_probs = jax.nn.log_softmax(scale_logits(policy.unembed(params, hidden), temperature))
        entropies = -jnp.sum(jnp.exp(log_probs) * jnp.maximum(log_probs, -1e30), axis=-1)
        return jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0], entropies

    if chunks == 1:
        results = one_chunk(params, hidden[0], tokens[0])
    else:
        results = jax.lax.map(lambda chunk: one_chunk(params, *chunk), (hidden, tokens))
    return tuple(x.reshape(-1)[:count].reshape(shape) for x in results)


@functools.partial(jax.jit, static_argnames=("num_microbatches", "chunk_size"))
def completion_log_probs(
    policy: Policy,
    params: Params,
    rollout: Rollout,
    *,
    temperature: float | Array = 1.0,
    num_microbatches: int = 1,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, Array]:
    """Scores the completions of a rollout. Compiled once per shape.

    Args:
        policy: the model's functions.
        params: its parameters.
        rollout: B rows; prompts left-padded, completions right-padded.
        temperature: the temperature it was sampled with; traced.
        num_microbatches: slices run one after the other; memory falls, the result stays.
        chunk_size: see `token_log_probs`.

    Returns:
        (log_probs [B,T], entropies [B,T]), float32 nats, 0 where masked.
    """
    chex.assert_rank([rollout.prompt_tokens, rollout.tokens, rollout.mask], 2)

    def score(part):
        hidden = completion_hidden(policy, params, part)
        return token_log_probs(
            policy, params, hidden, part.tokens, temperature=temperature, chunk_size=chunk_size
        )

    if num_microbatches == 1:
        log_probs, entropies = score(rollout)
    else:
        parts = split_rows(rollout, num_microbatches)
        log_probs, entropies = (x.reshape(rollout.mask.shape) for x in jax.lax.map(score, parts))
    return jnp.where(rollout.mask, log_probs, 0), jnp.where(rollout.mask, entropies, 0)


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
