"""Teacher-forced log-probs and entropies of completions, without ever making [B, L, V]."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Literal

from grpo_jax.objective.kl import kl_exact
from grpo_jax.policy.decoding import fork, positions_from_mask, prefill
from grpo_jax.policy.packing import Packing, make_packing
from grpo_jax.policy.sampling import scale_logits
from grpo_jax.policy.shapes import shared_rows, split_rows
from grpo_jax.types import Experience, Params, Policy, Prompts, Rollout

CHUNK_SIZE = 1024  # number of tokens whose logits exist at a time, unless a caller gives another one


def completion_hidden(
    policy: Policy,
    params: Params,
    rollout: Rollout | Experience,
    *,
    group_size: int = 1,
    num_tokens: int | None = None,
) -> Array:
    """Runs prompts and completions through the model, each prompt once, however many completions it has.

    With a group size above 1, completions attend to their prompt's keys and values, which exist once, as in
    `generate`, and gradients flow back through them. The work on the prompts falls by that factor.

    Args:
        policy: the model's functions.
        params: the model's parameters.
        rollout: record with prompt_tokens [B,S], prompt_mask, tokens [B,T] and mask.
        group_size: number of consecutive rows that have the same prompt, a divisor of B.
        num_tokens: upper bound on the number of completion tokens in all. If it is given and prompts are
            shared, a policy that can do so works on that many tokens alone. None means no bound.

    Returns:
        hidden [B,T,D]. Position t is the state that predicts completion token t, if that is real.
    """
    prompt_length = rollout.prompt_tokens.shape[1]
    # What the last completion token predicts is not needed.
    tokens = rollout.tokens[:, :-1]
    mask = rollout.mask[:, :-1]
    whole_mask = jnp.concatenate([rollout.prompt_mask, mask], axis=1)
    positions = positions_from_mask(whole_mask)
    promise = {} if num_tokens is None else {"num_tokens": num_tokens}  # a simple policy takes no bound
    if group_size == 1:
        whole = jnp.concatenate([rollout.prompt_tokens, tokens], axis=1)
        hidden, _ = policy.forward(params, whole, whole_mask, positions, None)
        return hidden[:, prompt_length - 1 :]
    prompts = Prompts(tokens=rollout.prompt_tokens[::group_size], mask=rollout.prompt_mask[::group_size])
    if tokens.shape[1] == 0:
        last, _ = prefill(policy, params, prompts)
        return fork(last, group_size)[:, None]
    if policy.forward_groups is not None:
        last, hidden = policy.forward_groups(params, prompts, tokens, mask, **promise)
    else:
        last, cache = prefill(policy, params, prompts)
        cache = policy.grow_cache(policy.fork_cache(cache, group_size), whole_mask.shape[1])
        hidden, _ = policy.forward(params, tokens, whole_mask, positions[:, prompt_length:], cache, **promise)
    return jnp.concatenate([fork(last, group_size)[:, None], hidden], axis=1)


def token_log_probs(
    policy: Policy,
    params: Params,
    hidden: Array,
    tokens: Array,
    *,
    temperature: float | Array = 1.0,
    chunk_size: int = CHUNK_SIZE,
    packing: Packing | None = None,
) -> tuple[Array, Array]:
    """Computes log-probs of tokens and entropies from hidden states, chunk_size tokens at a time.

    The logits of one chunk [chunk_size, V] are all that exists at a time, in the backward pass too,
    where they are recomputed.

    Args:
        policy: the model's functions.
        params: the model's parameters.
        hidden: hidden states [B,T,D], each of which predicts a token.
        tokens: tokens [B,T] int32.
        temperature: divisor of the logits. 0 counts as 1, as in `generate`.
        chunk_size: number of tokens whose logits exist at a time.
        packing: packing of the [B,T] tokens. Only those it packs get a value, and the others get 0. None
            means that all tokens get one.

    Returns:
        (log_probs [B,T], entropies [B,T]) of softmax(logits / temperature), float32 nats.
    """
    chex.assert_equal_shape_prefix([hidden, tokens], 2)

    unembed, used = _unembedding(policy, params, hidden)

    def one_chunk(used, hidden, tokens):
        return _chunk_log_probs(unembed, used, hidden, tokens, temperature)

    return _over_chunks(one_chunk, used, (hidden, tokens), chunk_size, packing)


def _unembedding(policy, params, hidden) -> tuple[Callable, list[Array]]:
    """Returns unembed(used, hidden) and the parameters that it uses.

    A loop over chunks adds up a gradient of everything it is given, so it should be given no more.
    """
    leaves, tree = jax.tree.flatten(params)
    row = hidden.reshape(-1, hidden.shape[-1])[:1]
    jaxpr = jax.make_jaxpr(lambda *leaves: policy.unembed(jax.tree.unflatten(tree, leaves), row))(
        *leaves
    ).jaxpr
    read = {v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal)} | {*jaxpr.outvars}
    numbers = [i for i, variable in enumerate(jaxpr.invars) if variable in read]

    def unembed(used, hidden):
        filled = [None] * len(leaves)
        for number, leaf in zip(numbers, used, strict=True):
            filled[number] = leaf
        return policy.unembed(jax.tree.unflatten(tree, filled), hidden)

    return unembed, [leaves[i] for i in numbers]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_log_probs(unembed, params, hidden, tokens, temperature) -> tuple[Array, Array]:
    """Returns (log-probs of tokens [C], entropies [C]) of hidden states [C,D].

    Its derivative keeps log-normalizers and entropies instead of logits [C,V]. It computes the gradient of
    the logits in one pass over them. That is g (onehot - p) - h p (log p + H), for gradients g and h of
    log-probs and entropies.
    """
    return _chunk_forward(unembed, params, hidden, tokens, temperature)[0]


def _chunk_forward(unembed, params, hidden, tokens, temperature):
    logits = scale_logits(unembed(params, hidden), temperature)
    log_probs, entropies, log_normalizer = _of_logits(logits, tokens)
    return (log_probs, entropies), (params, hidden, tokens, temperature, log_normalizer, entropies)


def _chunk_backward(unembed, residuals, gradients):
    params, hidden, tokens, temperature, log_normalizer, entropies = residuals
    by_log_prob, by_entropy = (g[:, None] for g in gradients)
    logits, pull_back = jax.vjp(
        lambda params, hidden: scale_logits(unembed(params, hidden), temperature), params, hidden
    )
    log_probs = logits - log_normalizer[:, None]
    probs = jnp.exp(log_probs)
    surprise = jnp.where(probs > 0, log_probs, 0) + entropies[:, None]
    onehot = jnp.arange(logits.shape[1]) == tokens[:, None]
    by_params, by_hidden = pull_back(by_log_prob * (onehot - probs) - by_entropy * probs * surprise)
    return by_params, by_hidden, None, jnp.zeros_like(temperature)


_chunk_log_probs.defvjp(_chunk_forward, _chunk_backward)


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
    packing: Packing | None = None,
) -> tuple[Array, Array, Array]:
    """Computes what `token_log_probs` does, and the exact KL(pi || ref) of every position's distribution.

    Args:
        policy: the model's functions.
        params: the model's parameters.
        ref_params: parameters of the reference. No gradient flows into them.
        hidden: hidden states [B,T,D] under params.
        ref_hidden: hidden states [B,T,D] under ref_params.
        tokens: tokens [B,T] int32.
        temperature: temperature of both distributions, as in `token_log_probs`.
        chunk_size: number of tokens whose two sets of logits exist at a time.
        packing: packing of the tokens, as in `token_log_probs`.

    Returns:
        (log_probs [B,T], entropies [B,T], kls [B,T]), float32 nats.
    """
    chex.assert_equal_shape_prefix([hidden, ref_hidden, tokens], 2)
    ref_params, ref_hidden = jax.lax.stop_gradient((ref_params, ref_hidden))

    def one_chunk(params, hidden, ref_hidden, tokens):
        logits = scale_logits(policy.unembed(params, hidden), temperature)
        ref_logits = scale_logits(policy.unembed(ref_params, ref_hidden), temperature)
        return *_of_logits(logits, tokens)[:2], kl_exact(logits, ref_logits)

    arrays = (hidden, ref_hidden, tokens)
    return _over_chunks(jax.checkpoint(one_chunk), params, arrays, chunk_size, packing)


def _of_logits(logits: Array, tokens: Array) -> tuple[Array, Array, Array]:
    """Returns (log-probs of tokens, entropies, log-normalizers), each [C], of logits [C,V]."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - largest
    exps = jnp.exp(shifted)
    total = jnp.sum(exps, axis=-1)
    log_total = jnp.log(total)
    # Select the zero before the product, so that the derivative of 0 * -inf is never taken.
    surprise = exps * jnp.where(exps > 0, shifted, 0)
    entropies = log_total - jnp.sum(surprise, axis=-1) / total
    picked = jnp.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0]
    return picked - log_total, entropies, largest[:, 0] + log_total


def _over_chunks(
    one_chunk, params: Params, arrays: tuple[Array, ...], chunk_size: int, packing: Packing | None = None
) -> tuple[Array, ...]:
    """Calls one_chunk(params, *chunks) on chunk_size tokens of arrays [B,T,...] at a time.

    Returns:
        arrays [B,T].
    """
    shape = arrays[0].shape[:2]
    if packing is None:
        arrays = tuple(x.reshape(-1, *x.shape[2:]) for x in arrays)
    else:
        arrays = tuple(packing.pack(x) for x in arrays)
    count = arrays[0].shape[0]
    chunk_size = min(chunk_size, count)
    num_chunks = -(-count // chunk_size)
    padding = num_chunks * chunk_size - count

    def into_chunks(x):
        x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_chunks, chunk_size, *x.shape[1:])

    chunks = tuple(into_chunks(x) for x in arrays)
    if num_chunks == 1:
        results = one_chunk(params, *(x[0] for x in chunks))
    else:
        results = jax.lax.map(lambda chunk: one_chunk(params, *chunk), chunks)
    results = (x.reshape(-1)[:count] for x in results)
    return tuple(x.reshape(shape) if packing is None else packing.unpack(x) for x in results)


@functools.partial(jax.jit, static_argnames=("group_size", "num_microbatches", "num_tokens", "chunk_size"))
def completion_log_probs(
    policy: Policy,
    params: Params,
    rollout: Rollout,
    *,
    temperature: float | Array = 1.0,
    group_size: int = 1,
    num_microbatches: int = 1,
    num_tokens: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, Array]:
    """Computes the log-probs of the completions of a rollout. It is compiled once per shape.

    Args:
        policy: the model's functions.
        params: the model's parameters.
        rollout: record of B rows, with prompts left-padded and completions right-padded.
        temperature: the temperature it was sampled with, traced.
        group_size: number of consecutive rows that have the same prompt, which is then run once per slice.
        num_microbatches: number of slices run one after the other. Memory falls, and the result stays.
        num_tokens: upper bound on a slice's tokens, see `tokens_in_use`. None means all B*T.
        chunk_size: number of tokens whose logits exist at a time.

    Returns:
        (log_probs [B,T], entropies [B,T]), float32 nats, 0 where masked.

    >>> from grpo_jax import policy_from_apply
    >>> policy = policy_from_apply(lambda params, tokens, mask, positions: params[tokens])
    >>> rollout = Rollout(
    ...     prompt_tokens=jnp.array([[1, 2]]),
    ...     prompt_mask=jnp.array([[True, True]]),
    ...     tokens=jnp.array([[1, 3]]),
    ...     mask=jnp.array([[True, False]]),
    ...     log_probs=None,  # nothing of the sampler is needed
    ...     kept_mass=None,
    ...     finished=None,
    ... )
    >>> log_probs, entropies = completion_log_probs(policy, jnp.zeros((4, 4)), rollout)
    >>> jnp.exp(log_probs).round(2).tolist(), jnp.exp(entropies).round(2).tolist()  # of four even tokens
    ([[0.25, 1.0]], [[4.0, 1.0]])
    """
    chex.assert_rank([rollout.prompt_tokens, rollout.tokens, rollout.mask], 2)

    shared = shared_rows(rollout.mask.shape[0], group_size, num_microbatches)

    def log_probs_of(part):
        hidden = completion_hidden(policy, params, part, group_size=shared, num_tokens=num_tokens)
        return token_log_probs(
            policy,
            params,
            hidden,
            part.tokens,
            temperature=temperature,
            chunk_size=chunk_size,
            packing=pack_completions(part.mask, num_tokens),
        )

    if num_microbatches == 1:
        log_probs, entropies = log_probs_of(rollout)
    else:
        parts = split_rows(rollout, num_microbatches)
        log_probs, entropies = (x.reshape(rollout.mask.shape) for x in jax.lax.map(log_probs_of, parts))
    return jnp.where(rollout.mask, log_probs, 0), jnp.where(rollout.mask, entropies, 0)


def pack_completions(mask: Array, num_tokens: int | None) -> Packing | None:
    """Returns the packing of the completions of mask [B,T] into num_tokens, or None without a number."""
    return None if num_tokens is None else make_packing(mask, num_tokens)
