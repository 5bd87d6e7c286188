"""Attention over shared prompts: which key a query sees, and the mixing of values.

The rows of a batch come in groups that continue the same prompt. A query sees keys of that prompt, kept
once for the group, and keys of its own row. Shapes: n prompts, g rows each, k key-value heads, r query heads
to each of them, K queries of a row, s prompt slots, t slots of a row's own, d head_dim.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.packing import Packing, make_packing
from grpo_jax.types import Array

_MASKED = -1e30  # finite: a row without any visible key gets a mean, not NaN

KeysValues = tuple[Array, Array]


@dataclass(frozen=True)
class Visible:
    """Which keys each query sees, by window: bool [n,1,g or 1,1,K or 1,slots] for prompt and own slots."""

    prefix: dict[int | None, Array]
    own: dict[int | None, Array]


@dataclass(frozen=True)
class Segment:
    """Rows of tokens that attend alike. All that treats tokens alike sees them side by side, as [R,...]."""

    shape: tuple[int, int, int, int]  # n prompts, g rows each, K tokens of a row given now, own slots
    positions: Array  # [B,K] int32
    visible: Visible
    packing: Packing | None  # None: R is B*K

    def flatten(self, x: Array) -> Array:
        """Returns [R,...] of [B,K,...]."""
        return x.reshape(-1, *x.shape[2:]) if self.packing is None else self.packing.pack(x)

    def spread(self, x: Array) -> Array:
        """Returns [B,K,...] of [R,...]; 0 where no real token is, if packed."""
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
    """Finds out what the tokens at `positions` may see.

    Args:
        windows: of the layers; a query sees the keys at most window - 1 positions back; None: all.
        mask: bool [B,s+t], real tokens and slots that may be filled; a group's rows agree on the first s.
        positions: int32 [B,K] of the queries. Positions count real tokens, so that padding moves nothing.
        num_prompts: n, a divisor of B.
        prefix_length: s.
        num_tokens: promise that of the B*K tokens at most that many are real, the keys being the queries'
            own; they are packed then. None: no promise.
    """
    (rows, length), queries = mask.shape, positions.shape[1]
    group_size, slots = rows // num_prompts, length - prefix_length
    keys = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    query = positions.reshape(num_prompts, 1, group_size, 1, queries, 1)

    def split(x, group_size):
        return x.reshape(num_prompts, 1, group_size, 1, 1, -1)

    prompt_real, prompt_keys = (split(x[::group_size, :prefix_length], 1) for x in (mask, keys))
    own_real, own_keys = (split(x[:, prefix_length:], group_size) for x in (mask, keys))
    prefix, own = {}, {}
    for window in dict.fromkeys(windows):
        prefix[window], own[window] = prompt_real, own_real & (own_keys <= query)
        if window is not None:
            prefix[window] = prompt_real & (query - prompt_keys < window)
            own[window] &= query - own_keys < window
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
    """Returns cap * tanh(x / cap), https://arxiv.org/abs/2408.00118; x where the cap is None."""
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
    """Mixes values by the softmax of scores over own and shared keys together; float32 inside.

    Args:
        query: [n,k,g,r,K,d].
        own: keys and values [n,k,g,t,d].
        prefix: keys and values [n,k,s,d]; None: there is no shared prompt.
        visible: of the segment.
        window: of the layer.
        scale: of the scores.
        cap: of the scaled scores, see `softcap`.

    Returns:
        [n,k,g,r,K,d].
    """

    def scores(spec, keys, seen):
        raw = jnp.einsum(spec, query, keys, preferred_element_type=jnp.float32) * scale
        return jnp.where(seen, softcap(raw, cap), _MASKED)

    parts = [scores("nkgrqd,nkgtd->nkgrqt", own[0], visible.own[window])]
    if prefix is not None:
        parts.append(scores("nkgrqd,nksd->nkgrqs", prefix[0], visible.prefix[window]))
    largest = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x in parts))
    largest = jax.lax.stop_gradient(largest)
    parts = [jnp.exp(x - largest) for x in parts]
    total = functools.reduce(jnp.add, (jnp.sum(x, axis=-1, keepdims=True) for x in parts))

    def mix(spec, weights, values):
        return jnp.einsum(spec, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    mixed = mix("nkgrqt,nkgtd->nkgrqd", parts[0], own[1])
    if prefix is not None:
        mixed = mixed + mix("nkgrqs,nksd->nkgrqd", parts[1], prefix[1])
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

    Each row gets its prompt's keys and values beside its own: memory linear in the length of a row, where
    the scores of `attend` grow with its square. A single query per row, as in decoding, gains nothing, and
    soft-capped scores have no such kernel: both are left to `attend`.

    Args:
        implementation: of `jax.nn.dot_product_attention`: `cudnn` (NVIDIA, bfloat16), or `xla`.
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
