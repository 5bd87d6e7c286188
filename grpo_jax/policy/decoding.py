"""Generates completions. Each prompt is prefilled once, and its cache is forked to the rows of its group."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from grpo_jax.policy.sampling import process_logits, sample_token, scale_logits
from grpo_jax.policy.shapes import decode_stages
from grpo_jax.types import Cache, Params, Policy, Prompts, Rollout


def pad_prompts(sequences: Sequence[Sequence[int]], length: int | None = None) -> Prompts:
    """Left-pads token ids to one length.

    Args:
        sequences: N lists or arrays of token ids.
        length: padded length S. `None` means that of the longest. Each length compiles `generate` again.

    Returns:
        Prompts [N,S] of NumPy arrays. Pads are id 0 under a False mask.

    Raises:
        ValueError: a sequence is longer than `length`.
    """
    if length is None:
        length = max(map(len, sequences), default=0)
    tokens = np.zeros((len(sequences), length), np.int32)
    mask = np.zeros((len(sequences), length), bool)
    for i, sequence in enumerate(sequences):
        if len(sequence) > length:
            raise ValueError(f"prompt {i} has {len(sequence)} tokens, over the length {length}")
        if len(sequence):  # it may be an array
            tokens[i, -len(sequence) :] = sequence
            mask[i, -len(sequence) :] = True
    return Prompts(tokens=tokens, mask=mask)


def positions_from_mask(mask: Array) -> Array:
    """Returns int32 positions [...,L]. They count real tokens only, so left padding shifts nothing."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def prefill(policy: Policy, params: Params, prompts: Prompts) -> tuple[Array, Cache]:
    """Runs the prompts once and fills a cache of exactly their length. `Policy.grow_cache` makes room.

    Args:
        policy: the model's functions.
        params: the model's parameters.
        prompts: prompts [N,S], left-padded.

    Returns:
        (hidden [N,D] at each prompt's last token, cache with N rows).
    """
    hidden, cache = policy.forward(
        params,
        prompts.tokens,
        prompts.mask,
        positions_from_mask(prompts.mask),
        policy.init_cache(*prompts.tokens.shape),
    )
    return hidden[:, -1], cache


def fork(tree: Any, group_size: int) -> Any:
    """Repeats every row of every array of a pytree group_size times, prompt-major."""
    return jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), tree)


def row_keys(key: Array, rows: Array) -> Array:
    """Returns one key per row. Noise depends on the row's index, not on how the batch is split."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Rows:
    """What decoding needs of the b rows that are still running."""

    row: Array  # [b] index among the B rows
    cache: Cache
    cache_mask: Array  # [b,L]
    prompt_size: Array  # [b] number of prompt tokens
    stop_state: Array | None  # [b] rows of the stop table, or None without one
    key: Array  # [b]
    last: Array  # [b] the token sampled last
    done: Array  # [b] bool

    replace = dataclasses.replace


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Decode:
    """What the decoding loop carries."""

    step: Array  # [] number of completion tokens sampled so far
    rows: _Rows
    tokens: Array  # [B,T], like the next three
    mask: Array
    log_probs: Array
    kept_mass: Array
    finished: Array  # [B] bool, kept here because a row that leaves `rows` may be unfinished

    replace = dataclasses.replace


def _sample_and_record(policy, params, carry: _Decode, hidden, eos_ids, stop_table, sampling) -> _Decode:
    """Samples token `carry.step` of every running row from hidden [b,D] and writes it into the carry."""
    logits = policy.unembed(params, hidden)
    rows = carry.rows
    t = carry.step
    live = ~rows.done
    uniforms = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(rows.key)
    processed = process_logits(logits, **sampling)
    tokens = jnp.where(live, sample_token(processed, uniforms), 0)
    scaled = scale_logits(logits, sampling["temperature"])
    log_normalizer = jax.nn.logsumexp(scaled, axis=-1)
    log_probs = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - log_normalizer
    # It is computed from what is dropped, so that it is exactly 1 if nothing is.
    dropped = jnp.where(processed == -jnp.inf, jnp.exp(scaled - log_normalizer[:, None]), 0)
    kept_mass = jnp.clip(1.0 - jnp.sum(dropped, axis=-1), 0, 1)
    done = rows.done | jnp.any(tokens[:, None] == eos_ids, axis=1)
    stop_state = rows.stop_state
    if stop_table is not None:
        stop_state = stop_table[stop_state, tokens]
        done |= stop_state < 0  # A match. What a finished row looks up from then on means nothing.
    return carry.replace(
        step=t + 1,
        rows=rows.replace(stop_state=stop_state, last=tokens, done=done),
        tokens=carry.tokens.at[rows.row, t].set(tokens),
        mask=carry.mask.at[rows.row, t].set(live),
        log_probs=carry.log_probs.at[rows.row, t].set(jnp.where(live, log_probs, 0)),
        kept_mass=carry.kept_mass.at[rows.row, t].set(jnp.where(live, kept_mass, 0)),
        finished=carry.finished.at[rows.row].set(done),
    )


def decoding_params(policy: Policy, params: Params, stages: tuple[tuple[int, int], ...]) -> Params:
    """Returns params as decoding takes them, laid out for the few rows of the last of the `decode_stages`."""
    return params if policy.for_decoding is None else policy.for_decoding(params, stages[-1][0])


def _drop_finished(policy: Policy, rows: _Rows, size: int) -> _Rows:
    """Keeps `size` rows, unfinished ones first. More may be unfinished at the limit, where decoding ends."""
    kept = jnp.argsort(rows.done, stable=True)[:size]
    cache = policy.take_cache(rows.cache, kept)
    return jax.tree.map(lambda x: x[kept], rows.replace(cache=None)).replace(cache=cache)


@functools.partial(jax.jit, static_argnames=("group_size", "max_new_tokens"))
def generate(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    group_size: int,
    max_new_tokens: int,
    eos_ids: Array,
    stop_table: Array | None = None,
    temperature: float | Array = 1.0,
    top_k: int | Array = 0,
    top_p: float | Array = 1.0,
    min_p: float | Array = 0.0,
    first_row: int | Array = 0,
) -> Rollout:
    """Samples group_size completions of each prompt. It is compiled once per (N, S, G, T).

    Args:
        policy: the model's functions.
        params: the model's parameters.
        prompts: prompts [N,S], left-padded.
        key: PRNG key of this step. It is not consumed but folded with each row's index and each position,
            so completion g of prompt n is the same in whatever batch it is generated.
        group_size: number G of completions of each prompt.
        max_new_tokens: limit T of the tokens of a completion.
        eos_ids: ids [E] int32, traced, that end a completion. If it is empty, no id does.
        stop_table: table [states,V] int16, traced, of what each token does to the search for stop strings,
            see `grpo_jax.models.stops.stop_table`. None means that there are no stop strings.
        temperature: temperature of `process_logits`, traced like the next three. 0 is greedy.
        top_k: top_k of `process_logits`.
        top_p: top_p of `process_logits`.
        min_p: min_p of `process_logits`.
        first_row: index of the first row, if these prompts are a slice of a larger batch.

    Returns:
        A Rollout of B = N*G rows, prompt-major. Its log-probs are those of the temperature-scaled
        *full* distribution (at temperature 0, of the unscaled one), whatever the truncation. The first
        eos, or the first token that completes a stop string, is part of the completion, which is then
        `finished`. Tokens after it are 0.

    >>> from grpo_jax import policy_from_apply
    >>> policy = policy_from_apply(lambda params, tokens, mask, positions: params[tokens])
    >>> table = 9 * jnp.eye(4)[jnp.array([1, 2, 3, 0])]  # after token i comes i + 1, and after 3 comes 0
    >>> limits = {"group_size": 2, "max_new_tokens": 3, "eos_ids": jnp.array([3])}
    >>> rollout = generate(policy, table, pad_prompts([[0], [1]], 1), jax.random.key(0), **limits)
    >>> rollout.tokens.tolist(), rollout.finished.tolist()
    ([[1, 2, 3], [1, 2, 3], [2, 3, 0], [2, 3, 0]], [True, True, True, True])
    """
    chex.assert_rank([prompts.tokens, prompts.mask], 2)
    num_prompts, prompt_length = prompts.tokens.shape
    batch = num_prompts * group_size
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    eos_ids = jnp.asarray(eos_ids, jnp.int32).reshape(-1)

    hidden, cache = prefill(policy, params, prompts)
    prompt_tokens, prompt_mask, hidden = fork((prompts.tokens, prompts.mask, hidden), group_size)
    rows = _Rows(
        row=jnp.arange(batch),
        cache=policy.fork_cache(cache, group_size),
        cache_mask=jnp.concatenate([prompt_mask, jnp.ones((batch, max_new_tokens), bool)], axis=1),
        prompt_size=jnp.sum(prompt_mask, axis=1, dtype=jnp.int32),
        stop_state=None if stop_table is None else jnp.zeros(batch, stop_table.dtype),
        key=row_keys(key, first_row + jnp.arange(batch)),
        last=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
    )
    stages = decode_stages(batch, max_new_tokens)
    params = decoding_params(policy, params, stages)
    sample = functools.partial(
        _sample_and_record, policy, params, eos_ids=eos_ids, stop_table=stop_table, sampling=sampling
    )

    def step(carry: _Decode, slots: int) -> _Decode:
        rows = carry.rows
        positions = (rows.prompt_size + carry.step - 1)[:, None]
        mask = rows.cache_mask[:, : prompt_length + slots]
        hidden, cache = policy.forward(params, rows.last[:, None], mask, positions, rows.cache)
        return sample(carry.replace(rows=rows.replace(cache=cache)), hidden[:, -1])

    empty = jnp.zeros((batch, max_new_tokens))
    start = _Decode(
        step=jnp.int32(0),
        rows=rows,
        tokens=empty.astype(jnp.int32),
        mask=empty.astype(bool),
        log_probs=empty,
        kept_mass=empty,
        finished=jnp.zeros(batch, bool),
    )
    # The first token needs no forward of its own, because the prefill was it. None follows the last token.
    carry = sample(start, hidden)
    for size, slots in stages:
        rows = carry.rows if size == carry.rows.row.size else _drop_finished(policy, carry.rows, size)
        carry = carry.replace(rows=rows.replace(cache=policy.grow_cache(rows.cache, prompt_length + slots)))
        # A stage ends when its slots are full, or when fewer rows are enough. That may skip the next stage.
        enough = max((rows for rows, _ in stages if rows < size), default=0)
        carry = jax.lax.while_loop(
            lambda carry, slots=slots, enough=enough: (
                (carry.step <= min(slots, max_new_tokens - 1)) & (jnp.sum(~carry.rows.done) > enough)
            ),
            functools.partial(step, slots=slots),
            carry,
        )
    return Rollout(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        tokens=carry.tokens,
        mask=carry.mask,
        log_probs=carry.log_probs,
        kept_mass=carry.kept_mass,
        finished=carry.finished,
    )
