"""The decoder's cache: keys and values of each prompt, once for its group, and of each row's own tokens.

Its arrays are [N, heads, G, slots, head_dim], so that what one matrix product reads lies together.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecoderCache:
    """Keys and values of the tokens seen: those of each prompt once, and those of each row since.

    There are n prompts (rows n*g to n*g+g-1 continue prompt n), b = n*g rows, k key-value heads, s prompt
    slots and t slots of each row's own. d is head_dim.
    """

    prefix: tuple[tuple[Array, Array], ...] | None  # per layer (keys, values) [n,k,s,d]
    own: tuple[tuple[Array, Array], ...]  # per layer (keys, values) [n,k,g,t,d]
    size: Array  # [] int32, own slots in use

    replace = dataclasses.replace


def init_cache(
    batch: int, max_length: int, *, num_layers: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> DecoderCache:
    """Makes an empty cache for `batch` rows of max_length tokens that share no prompt."""
    shape = (batch, num_kv_heads, 1, max_length, head_dim)
    own = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(num_layers))
    return DecoderCache(prefix=None, own=own, size=jnp.int32(0))


def fork_cache(cache: DecoderCache, group_size: int) -> DecoderCache:
    """Turns the full cache of N prompts into the shared prefix of N*group_size rows without slots yet."""

    def no_slots(x):
        n, heads, _, _, width = x.shape
        return jnp.zeros((n, heads, group_size, 0, width), x.dtype)

    return DecoderCache(
        prefix=jax.tree.map(lambda x: x[:, :, 0], cache.own),
        own=jax.tree.map(no_slots, cache.own),
        size=jnp.int32(0),
    )


def grow_cache(cache: DecoderCache, max_length: int) -> DecoderCache:
    """Makes room for max_length tokens, the prefix included."""
    slots = max_length - (0 if cache.prefix is None else cache.prefix[0][0].shape[2])

    def pad(x):
        return jnp.pad(x, [(0, 0)] * 3 + [(0, slots - x.shape[3]), (0, 0)])

    return cache.replace(own=jax.tree.map(pad, cache.own))


def take_cache(cache: DecoderCache, rows: Array) -> DecoderCache:
    """Keeps the rows [b'] of a cache, each with a copy of its prompt."""

    def own(x):
        n, heads, g, slots, width = x.shape
        return jnp.swapaxes(x, 1, 2).reshape(n * g, heads, slots, width)[rows][:, :, None]

    group_size = jax.tree.leaves(cache.own)[0].shape[2]
    prefix = None if cache.prefix is None else jax.tree.map(lambda x: x[rows // group_size], cache.prefix)
    return DecoderCache(prefix=prefix, own=jax.tree.map(own, cache.own), size=cache.size)


def sharing(cache: DecoderCache | None, tokens: Array, mask: Array) -> tuple[int, int]:
    """Returns (number of prompts, slots of each) that the rows of a call share.

    Raises:
        ValueError: the mask does not fit the cache.
    """
    rows, slots = tokens.shape
    num_prompts = rows
    prefix_length = 0
    if cache is not None:
        slots = cache.own[0][0].shape[3]
        if cache.prefix is not None:
            num_prompts, _, prefix_length, _ = cache.prefix[0][0].shape
    if mask.shape[1] != prefix_length + slots:
        raise ValueError(
            f"the mask covers {mask.shape[1]} tokens, tokens and cache have room for {prefix_length + slots}"
        )
    return num_prompts, prefix_length


def layers_of(cache: DecoderCache | None, num_layers: int) -> list[tuple]:
    """Returns each layer's (prefix, own, size), with None for what is missing."""
    if cache is None:
        return [(None, None, None)] * num_layers
    prefixes = [None] * num_layers if cache.prefix is None else cache.prefix
    return [(prefix, own, cache.size) for prefix, own in zip(prefixes, cache.own, strict=True)]
