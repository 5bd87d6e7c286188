"""A decoder-only transformer in pure JAX: GPT-2, the Llama line, Gemma; one path for every use.

`make_decoder` turns an `Architecture` into a `Policy`. Training, scoring, prefill and decoding are the same
`forward`; what differs is the cache. Three things make it fast:

* The keys and values of a prompt are kept once for its whole group (`DecoderCache.prefix`), in decoding and
  in training: the G completions of a prompt attend to them in one matrix product.
* The cache is [N, heads, G, slots, head_dim]: what one product reads lies together.
* Told how many of the tokens are real, `forward` runs its dense layers over those alone (`packing`).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grpo_jax.packing import Packing, make_packing
from grpo_jax.types import Array, Params, Policy

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
# What wraps a layer so that less of it is kept for the backward pass.
REMAT: dict[str, Callable] = {
    "none": lambda layer: layer,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "full": jax.checkpoint,
}
_MASKED = -1e30  # finite: a row without any visible key gets a mean, not NaN


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by a factor. https://arxiv.org/abs/2306.15595"""

    factor: float

    def scale(self, frequencies: Array) -> Array:
        """Returns the frequencies [head_dim/2] that stand for longer positions."""
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies divided by a factor, high ones kept, those between blended; as Llama 3.1 does.

    https://arxiv.org/abs/2407.21783, and `_compute_llama3_parameters` of transformers.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def scale(self, frequencies: Array) -> Array:
        """Returns the frequencies [head_dim/2] that stand for longer positions."""
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions, halves rotated against each other. https://arxiv.org/abs/2104.09864"""

    theta: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | None = None

    def frequencies(self, head_dim: int) -> Array:
        """Returns the angles per position, float32 [head_dim/2]."""
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        frequencies = 1.0 / self.theta**exponents
        return frequencies if self.scaling is None else self.scaling.scale(frequencies)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All that tells one decoder from another, apart from its weights.

    Args:
        vocab_size: V.
        max_positions: longest sequence, padding included.
        width: D.
        num_layers: of them.
        num_heads: of queries.
        num_kv_heads: of keys and values, a divisor of num_heads.
        head_dim: width of a head.
        norm: `layer` or `rms`.
        norm_epsilon: added to the variance.
        norm_offset: added to a norm's scale; Gemma's scales are stored around 0.
        activation: a key of ACTIVATIONS.
        gated: the activation of one projection multiplies another.
        rotary: one per layer; empty: learned positions.
        windows: one per layer; a query sees the keys at most window - 1 positions back; None: all.
        attention_scale: of the scores.
        attention_softcap: scores are cap * tanh(scores / cap); None: as they are.
        logit_softcap: the same for logits.
        embedding_scale: of the token embeddings.
        transposed_kernels: dense kernels are stored [out, in].
    """

    vocab_size: int
    max_positions: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: str
    norm_epsilon: float
    norm_offset: float = 0.0
    activation: str
    gated: bool = False
    rotary: tuple[Rotary, ...] = ()
    windows: tuple[int | None, ...]
    attention_scale: float
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    transposed_kernels: bool = False


@flax.struct.dataclass
class DecoderCache:
    """Keys and values of the tokens seen: of each prompt once, and of each row since.

    n prompts (rows n*g to n*g+g-1 continue prompt n), b = n*g rows, k key-value heads, s prompt slots, t
    slots of their own, d head_dim.
    """

    prefix: tuple[tuple[Array, Array], ...] | None  # per layer (keys, values) [n,k,s,d]
    own: tuple[tuple[Array, Array], ...]  # per layer (keys, values) [n,k,g,t,d]
    size: Array  # [] int32, own slots in use


def init_cache(architecture: Architecture, batch: int, max_length: int, *, dtype: Any) -> DecoderCache:
    """Makes an empty cache for `batch` rows of max_length tokens that share no prompt."""
    a = architecture
    shape = (batch, a.num_kv_heads, 1, max_length, a.head_dim)
    own = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(a.num_layers))
    return DecoderCache(prefix=None, own=own, size=jnp.int32(0))


def fork_cache(cache: DecoderCache, group_size: int) -> DecoderCache:
    """Makes the full cache of N prompts the shared prefix of N*group_size rows, which have no slots yet."""

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


def make_decoder(
    architecture: Architecture,
    view: Callable[[Params], dict[str, Any]],
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> Policy:
    """Makes the policy of an architecture.

    Args:
        architecture: of the model.
        view: renames a parameter pytree, without computing anything, to
            {"embedding" [V,D], "positions" [P,D] if learned, "layers", "final_norm", "head" unless tied};
            a layer has the norms "attention_norm", "mlp_norm" and, in some families, "query_norm",
            "key_norm", "post_attention_norm", "post_mlp_norm"; "qkv" (one dense, or three), "output", "up"
            (one dense, or gate and up) and "down". A norm is {"scale", "bias"?}, a dense layer
            {"kernel", "bias"?}.
        dtype: compute dtype; norms, scores and logits are float32 either way.
        remat: what the backward pass of a layer computes again instead of keeping it, a key of REMAT: nothing
            (`none`), all but the results of dense layers (`dots`), or everything from the layer's input
            (`full`). Values and gradients stay.

    Returns:
        a Policy, whose forward raises ValueError when traced for more than max_positions.
    """
    a = architecture

    def forward(params, tokens, mask, positions, cache=None, *, num_tokens=None):
        if mask.shape[1] > a.max_positions:
            raise ValueError(
                f"a sequence of {mask.shape[1]} tokens (prompt with padding + completion) is over the "
                f"model's {a.max_positions} positions"
            )
        return _forward(a, view(params), tokens, mask, positions, cache, num_tokens, dtype, REMAT[remat])

    def unembed(params, hidden):
        weights = view(params)
        if "head" in weights:
            logits = _dense(a, hidden, weights["head"], dtype, jnp.float32)
        else:
            logits = _matmul(hidden.astype(dtype), weights["embedding"].astype(dtype), 1, jnp.float32)
        return logits if a.logit_softcap is None else _softcap(logits, a.logit_softcap)

    return Policy(
        forward=forward,
        unembed=unembed,
        init_cache=functools.partial(init_cache, a, dtype=dtype),
        fork_cache=fork_cache,
        grow_cache=grow_cache,
        take_cache=take_cache,
    )


def _softcap(x: Array, cap: float) -> Array:
    return cap * jnp.tanh(x / cap)


def _matmul(x: Array, kernel: Array, axis: int, out_dtype: Any) -> Array:
    """Contracts the last axis of x with an axis of a matrix; sums are float32."""
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, kernel, contract, preferred_element_type=out_dtype)


def _dense(a: Architecture, x: Array, weights: dict, dtype: Any, out_dtype: Any = None) -> Array:
    axis = 1 if a.transposed_kernels else 0
    y = _matmul(x.astype(dtype), weights["kernel"].astype(dtype), axis, out_dtype or dtype)
    return y + weights["bias"].astype(y.dtype) if "bias" in weights else y


def _norm(a: Architecture, x: Array, weights: dict) -> Array:
    """LayerNorm or RMSNorm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    if a.norm == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + a.norm_epsilon) * (a.norm_offset + weights["scale"])
    return (y + weights["bias"] if "bias" in weights else y).astype(x.dtype)


def _rotate(x: Array, cosines: Array, sines: Array) -> Array:
    """Rotates heads x [B,K,heads,d] by angles [B,K,1,d/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _angles(a: Architecture, positions: Array) -> dict[Rotary, tuple[Array, Array]]:
    """Returns (cosines, sines) [B,K,1,d/2] of every kind of rotary positions in the model."""
    angles = {}
    for rotary in dict.fromkeys(a.rotary):
        angle = positions[:, :, None, None].astype(jnp.float32) * rotary.frequencies(a.head_dim)
        angles[rotary] = jnp.cos(angle), jnp.sin(angle)
    return angles


@dataclass(frozen=True)
class _Visible:
    """Which keys each query sees, by window: bool [n,1,g or 1,1,K or 1,slots] for prompt and own slots."""

    prefix: dict[int | None, Array | None]
    own: dict[int | None, Array]


def _visible(
    a: Architecture, mask: Array, positions: Array, num_prompts: int, prefix_length: int
) -> _Visible:
    """Compares positions, which padding does not move: a key is seen if it is real and not in the future."""
    (rows, _), queries = mask.shape, positions.shape[1]
    group_size = rows // num_prompts
    keys = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    query = positions.reshape(num_prompts, 1, group_size, 1, queries, 1)

    def split(x, group_size):
        return x.reshape(num_prompts, 1, group_size, 1, 1, -1)

    prompt_real, prompt_keys = (split(x[::group_size, :prefix_length], 1) for x in (mask, keys))
    own_real, own_keys = (split(x[:, prefix_length:], group_size) for x in (mask, keys))
    prefix, own = {}, {}
    for window in dict.fromkeys(a.windows):
        prefix[window], own[window] = prompt_real, own_real & (own_keys <= query)
        if window is not None:
            prefix[window] = prompt_real & (query - prompt_keys < window)
            own[window] &= query - own_keys < window
    return _Visible(prefix=prefix, own=own)


def _attend(a, query, own, prefix, visible: _Visible, window) -> Array:
    """Attention of queries [n,k,g,r,K,d] to own [n,k,g,t,d] and shared [n,k,s,d] keys: [n,k,g,r,K,d]."""

    def scores(spec, keys, seen):
        raw = jnp.einsum(spec, query, keys, preferred_element_type=jnp.float32) * a.attention_scale
        raw = raw if a.attention_softcap is None else _softcap(raw, a.attention_softcap)
        return jnp.where(seen, raw, _MASKED)

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


@jax.custom_vjp
def _cut(x: Array, always: Array) -> Array:
    """Returns x; keeps XLA from fusing gradients across this place.

    The gradient of the residual stream is a chain of cheap sums, which XLA on the CPU computes again from its
    start wherever it is used: a quarter of the update of 6 layers (`optimization_barrier` is expanded before
    fusion there). It does not fuse across a conditional whose predicate it cannot know.
    """
    del always
    return x


def _cut_forward(x, always):
    return x, always


def _cut_backward(always, gradient):
    return jax.lax.cond(always, lambda g: g, jnp.zeros_like, gradient), None


_cut.defvjp(_cut_forward, _cut_backward)


@dataclass(frozen=True)
class _Frame:
    """What the layers of one call share."""

    shape: tuple[int, int, int, int]  # n prompts, g rows each, K tokens of a row given now, own slots
    visible: _Visible
    angles: dict[Rotary, tuple[Array, Array]]
    packing: Packing | None
    always: Array  # [] True, of which the compiler does not know

    def spread(self, x: Array, heads: int) -> Array:
        """Returns [B,K,heads,d] of the features [B,K,heads*d], packed or not."""
        x = x if self.packing is None else self.packing.unpack(x)
        return x.reshape(*x.shape[:2], heads, -1)


def _attention(a, weights, i, frame, features, cached) -> tuple[Array, tuple[Array, Array]]:
    """Attention of layer i, from projected features to mixed ones; also returns the filled own cache."""
    n, g, queries, slots = frame.shape
    heads = (a.num_heads, a.num_kv_heads, a.num_kv_heads)
    query, key, value = (frame.spread(x, count) for x, count in zip(features, heads, strict=True))
    if "query_norm" in weights:
        query, key = _norm(a, query, weights["query_norm"]), _norm(a, key, weights["key_norm"])
    if a.rotary:
        query, key = (_rotate(x, *frame.angles[a.rotary[i]]) for x in (query, key))
    query = query.reshape(n, g, queries, a.num_kv_heads, -1, a.head_dim).transpose(0, 3, 1, 4, 2, 5)
    own = tuple(
        x.reshape(n, g, queries, a.num_kv_heads, a.head_dim).transpose(0, 3, 1, 2, 4) for x in (key, value)
    )
    prefix, before, size = cached
    if slots > queries:  # else these tokens are all there is
        own = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), size, axis=3)
            for old, new in zip(before, own, strict=True)
        )
    mixed = _attend(a, query, own, prefix, frame.visible, a.windows[i])
    mixed = mixed.transpose(0, 2, 4, 1, 3, 5).reshape(n * g, queries, a.num_heads * a.head_dim)
    return mixed if frame.packing is None else frame.packing.pack(mixed), own


def _layer(a, dtype, i, frame, weights, x, cached) -> tuple[Array, tuple[Array, Array]]:
    """One block: attention, then the MLP, each added to the residual stream x [B,K,D] or [P,D]."""
    dense = functools.partial(_dense, a, dtype=dtype)
    normed = _norm(a, x, weights["attention_norm"])
    features = [dense(normed, w) for w in weights["qkv"]]
    if len(features) == 1:
        sizes = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        features = jnp.split(features[0], (sizes[0], sum(sizes)), axis=-1)
    mixed, own = _attention(a, weights, i, frame, features, cached)
    mixed = dense(mixed, weights["output"])
    x = x + (_norm(a, mixed, weights["post_attention_norm"]) if "post_attention_norm" in weights else mixed)
    x = _cut(x, frame.always)
    normed = _norm(a, x, weights["mlp_norm"])
    ups = [dense(normed, w) for w in weights["up"]]
    inner = ACTIVATIONS[a.activation](ups[0])
    inner = dense(inner * ups[1] if a.gated else inner, weights["down"])
    x = x + (_norm(a, inner, weights["post_mlp_norm"]) if "post_mlp_norm" in weights else inner)
    return _cut(x, frame.always), own


def _frame(a, tokens, mask, positions, cache, num_tokens) -> _Frame:
    rows, queries = tokens.shape
    slots, prefix_length, num_prompts = queries, 0, rows
    if cache is not None:
        slots = cache.own[0][0].shape[3]
        if cache.prefix is not None:
            num_prompts, _, prefix_length, _ = cache.prefix[0][0].shape
    if mask.shape[1] != prefix_length + slots:
        raise ValueError(
            f"the mask covers {mask.shape[1]} tokens, tokens and cache have room for {prefix_length + slots}"
        )
    packing = None
    if slots == queries and num_tokens is not None and num_tokens < rows * queries:
        packing = make_packing(mask[:, prefix_length:], num_tokens)
    return _Frame(
        shape=(num_prompts, rows // num_prompts, queries, slots),
        visible=_visible(a, mask, positions, num_prompts, prefix_length),
        angles=_angles(a, positions),
        packing=packing,
        always=tokens[0, 0] >= 0,
    )


def _forward(a, weights, tokens, mask, positions, cache, num_tokens, dtype, remat):
    frame = _frame(a, tokens, mask, positions, cache, num_tokens)
    if frame.packing is not None:
        tokens, positions = frame.packing.pack(tokens), frame.packing.pack(positions)
    x = weights["embedding"].astype(dtype)[tokens]
    if a.embedding_scale != 1.0:
        x = x * jnp.asarray(a.embedding_scale, dtype)
    if not a.rotary:
        x = x + weights["positions"].astype(dtype)[jnp.maximum(positions, 0)]
    own = []
    for i, layer in enumerate(weights["layers"]):
        cached = (None, None, None)
        if cache is not None:
            cached = None if cache.prefix is None else cache.prefix[i], cache.own[i], cache.size
        x, filled = remat(functools.partial(_layer, a, dtype, i, frame))(layer, x, cached)
        own.append(filled)
    x = _norm(a, x, weights["final_norm"])
    x = x if frame.packing is None else frame.packing.unpack(x)
    return x, None if cache is None else cache.replace(own=tuple(own), size=cache.size + frame.shape[2])
