"""Attention over shared prompts: which keys a query sees, and the mixing of values.

The rows of a batch come in groups that continue the same prompt. The keys and values of that prompt are kept
once for the group. A query attends to them and to the keys of its own row.

    prompt n, kept once          row g of that prompt, its own slots
    [ . . p p p p p p ]    +     [ c c c q q . . . ]
      s slots, left-padded         t slots; K of them are queries in this call

    query   [n, k, g, r, K, d]   n prompts, k key-value heads, g rows of a prompt,
                                 r query heads that share one key-value head, K queries of a row, d head_dim
    own     [n, k, g, t, d]      keys (or values) of each row
    prefix  [n, k, s, d]         keys (or values) of each prompt: no axis g, that is the saving

    scores of a query            prefix: [n,k,g,r,K,s] = nkgrqd,nksd    one product for the whole group
                                 own:    [n,k,g,r,K,t] = nkgrqd,nkgtd
    one softmax over both parts, then the same two products with the values

Four records tell who sees what:

    Visible   bool masks that broadcast to the scores, one pair (prefix, own) for each attention window
    Segment   rows [B,K] with B = n*g that attend alike: their shape, positions, Visible and Packing
    Packing   where the real tokens of a segment are, so that dense layers can skip the padding
    Frame     what all layers of one call share: one segment, or the prompts' and the completions' together
              (in `grpo_jax.policy.layers`). Dense layers see all tokens of a frame as one array [R,...].
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.policy.packing import Packing, make_packing

_MASKED = -1e30  # It is finite, so that a row without any visible key gets a mean and not NaN.

KeysValues = tuple[Array, Array]


@dataclass(frozen=True)
class Visible:
    """Says which keys each query sees, by attention window: bool, True where it does."""

    prefix: dict[int | None, Array]  # [n,1,1 or g,1,1 or K,s]
    own: dict[int | None, Array]  # [n,1,g,1,K,t]


@dataclass(frozen=True)
class Segment:
    """Rows of tokens that attend alike.

    Layers that treat every token alike see them side by side, as [R,...].
    """

    shape: tuple[int, int, int, int]  # n prompts, g rows each, K tokens of a row in this call, t own slots
    positions: Array  # [B,K] int32
    visible: Visible
    packing: Packing | None  # None means that nothing is packed and R is B*K

    def flatten(self, x: Array) -> Array:
        """Returns [R,...] of [B,K,...]."""
        return x.reshape(-1, *x.shape[2:]) if self.packing is None else self.packing.pack(x)

    def spread(self, x: Array) -> Array:
        """Returns [B,K,...] of [R,...]. Where tokens are packed, padding gets 0."""
        n, g, queries, _ = self.shape
        return x.reshape(n * g, queries, *x.shape[1:]) if self.packing is None else self.packing.unpack(x)


def make_segment(
    windows: Iterable[int | None],
    mask: Array,
    positions: Array,
    *,
    num_prompts: int,
    prefix_length: int = 0,
    num_tokens: int | None = None,
) -> Segment:
    """Makes the segment of the tokens at `positions`, which says what each of them may see.

    Args:
        windows: attention window of each layer. A query sees the keys at most window - 1 positions back.
            None means that it sees all keys before it.
        mask: mask [B,s+t] bool, True at real tokens and at slots that may be filled. The rows of a group
            agree on the first s.
        positions: positions [B,K] int32 of the queries. They count real tokens, so padding moves nothing.
        num_prompts: number n of prompts, a divisor of B.
        prefix_length: number s of slots of a prompt.
        num_tokens: upper bound on the number of real tokens among the B*K. If it is given, and if the keys
            belong to the same tokens, the tokens are packed. None means no bound.

    Returns:
        the segment.
    """
    rows, length = mask.shape
    queries = positions.shape[1]
    group_size = rows // num_prompts
    slots = length - prefix_length
    key_positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    query_positions = positions.reshape(num_prompts, 1, group_size, 1, queries, 1)

    def split(x, group_size):
        return x.reshape(num_prompts, 1, group_size, 1, 1, -1)

    # The rows of a group agree on the prompt, so that part of the mask exists once for the group.
    prompt_real, prompt_keys = (split(x[::group_size, :prefix_length], 1) for x in (mask, key_positions))
    own_real, own_keys = (split(x[:, prefix_length:], group_size) for x in (mask, key_positions))
    prefix = {}
    own = {}
    for window in dict.fromkeys(windows):
        prefix[window] = prompt_real  # a prompt lies before every query
        own[window] = own_real & (own_keys <= query_positions)
        if window is not None:
            prefix[window] &= query_positions - prompt_keys < window
            own[window] &= query_positions - own_keys < window
    packing = None
    if slots == queries and num_tokens is not None and num_tokens < rows * queries:
        packing = make_packing(mask[:, prefix_length:], num_tokens)
    return Segment(
        shape=(num_prompts, group_size, queries, slots),
        positions=positions,
        visible=Visible(prefix=prefix, own=own),
        packing=packing,
    )


def softcap(x: Array, cap: float | None) -> Array:
    """Returns cap * tanh(x / cap), https://arxiv.org/abs/2408.00118. Without a cap it returns x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: Array,
    own: KeysValues,
    prefix: KeysValues | None,
    visible: Visible,
    window: int | None,
    *,
    scale: float,
    cap: float | None,
) -> Array:
    """Mixes values by one softmax of the scores over own and shared keys. It computes in float32.

    Args:
        query: queries [n,k,g,r,K,d].
        own: keys and values of each row, each [n,k,g,t,d].
        prefix: keys and values of each prompt, each [n,k,s,d]. None means that there is no shared prompt.
        visible: masks of the segment.
        window: attention window of the layer, a key of the masks.
        scale: factor of the scores.
        cap: cap of the scaled scores, see `softcap`.

    Returns:
        [n,k,g,r,K,d].
    """

    def scores(spec, keys, seen):
        raw = jnp.einsum(spec, query, keys, preferred_element_type=jnp.float32) * scale
        return jnp.where(seen, softcap(raw, cap), _MASKED)

    # One softmax over both parts: they share the maximum and the sum, but are never put side by side.
    parts = [scores("nkgrqd,nkgtd->nkgrqt", own[0], visible.own[window])]
    if prefix is not None:
        parts.append(scores("nkgrqd,nksd->nkgrqs", prefix[0], visible.prefix[window]))
    largest = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x in parts))
    largest = jax.lax.stop_gradient(largest)  # the softmax does not depend on it
    parts = [jnp.exp(x - largest) for x in parts]
    total = functools.reduce(jnp.add, (jnp.sum(x, axis=-1, keepdims=True) for x in parts))

    def mix(spec, weights, values):
        return jnp.einsum(spec, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    mixed = mix("nkgrqt,nkgtd->nkgrqd", parts[0], own[1])
    if prefix is not None:
        mixed = mixed + mix("nkgrqs,nksd->nkgrqd", parts[1], prefix[1])
    # The division comes last, so that it is of [.., d] and not of the scores.
    return (mixed / total).astype(query.dtype)


def attend_flash(
    query: Array,
    own: KeysValues,
    prefix: KeysValues | None,
    visible: Visible,
    window: int | None,
    *,
    scale: float,
    cap: float | None,
    implementation: str = "cudnn",
) -> Array:
    """Does what `attend` does with `jax.nn.dot_product_attention`, whose cuDNN kernel keeps no scores.

    Each row gets a copy of its prompt's keys and values. Memory is then linear in the length of a row, where
    the scores of `attend` grow with its square. A single query per row, as in decoding, gains nothing, and
    soft-capped scores have no such kernel, so both are left to `attend`.

    Args:
        implementation: kernel of `jax.nn.dot_product_attention`: `cudnn` (NVIDIA, bfloat16), or `xla`.

    Returns:
        [n,k,g,r,K,d], as `attend` does, whose arguments are the other ones.
    """
    n, k, g, r, queries, d = query.shape
    if queries == 1 or cap is not None:
        return attend(query, own, prefix, visible, window, scale=scale, cap=cap)

    def of_rows(x):
        return jnp.broadcast_to(x, (n, k, g, *x.shape[-2:])).transpose(0, 2, 3, 1, 4).reshape(n * g, -1, k, d)

    def seen(x):
        return jnp.broadcast_to(x, (n, 1, g, 1, queries, x.shape[-1])).reshape(n * g, 1, queries, -1)

    keys, values = (of_rows(x) for x in own)
    mask = seen(visible.own[window])
    if prefix is not None:
        keys, values = (
            jnp.concatenate([of_rows(shared[:, :, None]), x], axis=1)
            for shared, x in zip(prefix, (keys, values), strict=True)
        )
        mask = jnp.concatenate([seen(visible.prefix[window]), mask], axis=-1)
    mixed = jax.nn.dot_product_attention(
        query.transpose(0, 2, 4, 1, 3, 5).reshape(n * g, queries, k * r, d),
        keys,
        values,
        mask=mask,
        scale=scale,
        implementation=implementation,
    )
    return mixed.reshape(n, g, queries, k, r, d).transpose(0, 3, 1, 4, 2, 5)


ATTENTION = {"shared": attend, "cudnn": attend_flash}


def check_attention(attention: str, dtype: Any) -> None:
    """Raises ValueError unless this attention can run here with this compute dtype."""
    if attention not in ATTENTION:
        raise ValueError(f"attention {attention!r}: choose one of {', '.join(ATTENTION)}")
    if attention != "cudnn":
        return
    platform = jax.default_backend()
    if platform not in ("gpu", "cuda"):
        raise ValueError(
            f"attention 'cudnn' needs an NVIDIA GPU, and JAX runs on {platform}: leave it at shared"
        )
    if dtype != jnp.bfloat16:
        raise ValueError("attention 'cudnn' computes in 16 bits: set model.dtype to bfloat16")
