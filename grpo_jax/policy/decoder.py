"""A decoder-only transformer in pure JAX: GPT-2, the Llama line and Gemma in one code path.

`make_decoder` turns an `Architecture` into a `Policy`. Training, scoring, prefill and decoding are the same
`forward`. They differ only in the cache. Three things make it fast:

* The keys and values of a prompt are kept once for its whole group (`DecoderCache.prefix`), in decoding and
  in training. The G completions of a prompt attend to them in one matrix product.
* The cache stores side by side what one product reads (`decoder_cache`).
* If `forward` is told how many of the tokens are real, it runs its dense layers on those alone (`packing`).

Read the module docstring of `grpo_jax.policy.attention` first. It has a picture of the axes, and of Segment,
Visible, Packing and Frame.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grpo_jax.cpu_tuning import cpu_vendor
from grpo_jax.policy.attention import ATTENTION, KeysValues, Segment, check_attention, make_segment, softcap
from grpo_jax.policy.cache import fork_cache, grow_cache, init_cache, layers_of, sharing, take_cache
from grpo_jax.policy.decoding import positions_from_mask
from grpo_jax.policy.rotary import Rotary, rotate
from grpo_jax.types import Array, Params, Policy

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
# A wrapper of a layer decides how much of it is kept for the backward pass.
REMAT: dict[str, Callable] = {
    "none": lambda layer: layer,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "full": jax.checkpoint,
}
_MANY_ROWS = 64  # From so many rows of a decoding step on, the layout of kernels makes no difference.


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that tells one decoder from another, apart from its weights.

    Args:
        vocab_size: V.
        max_positions: Length of the longest sequence in tokens, padding included.
        width: D.
        num_layers: Number of layers.
        num_heads: Number of query heads.
        num_kv_heads: Number of key-value heads, a divisor of num_heads.
        head_dim: Width of a head.
        norm: `layer` or `rms`.
        norm_epsilon: Number added to the variance.
        norm_offset: Number added to a norm's scale. Gemma stores its scales around 0.
        activation: A key of ACTIVATIONS.
        gated: Whether the activation of one projection multiplies another.
        rotary: Rotary embedding of each layer. If it is empty, positions are learned.
        windows: Attention window of each layer. A query sees the keys at most window - 1 positions back.
            None means that it sees all keys before it.
        attention_scale: Factor of the attention scores.
        attention_softcap: Cap of the scores, cap * tanh(scores / cap). None means no cap.
        logit_softcap: Cap of the logits, likewise.
        embedding_scale: Factor of the token embeddings.
        transposed_kernels: Whether dense kernels are stored [out, in].
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


def make_decoder(
    architecture: Architecture,
    view: Callable[[Params], dict[str, Any]],
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "shared",
) -> Policy:
    """Makes the policy of an architecture.

    Args:
        architecture: Architecture of the model.
        view: Function that renames a parameter pytree, without computing anything, to
            {"embedding" [V,D], "positions" [P,D] if learned, "layers", "final_norm", "head" unless tied}.
            A layer has the norms "attention_norm", "mlp_norm" and, in some families, "query_norm",
            "key_norm", "post_attention_norm", "post_mlp_norm". It has the dense layers "qkv" (one, or three),
            "output", "up" (one, or gate and up) and "down". A norm is {"scale", "bias"?}, a dense layer
            {"kernel", "bias"?}.
        dtype: Compute dtype. Norms, scores and logits are float32 either way.
        remat: What the backward pass of a layer recomputes instead of keeping it, a key of REMAT: nothing
            (`none`), all but the results of dense layers (`dots`), or everything from the layer's input
            (`full`). It changes neither values nor gradients.
        attention: A key of ATTENTION: `shared`, or `cudnn` (flash attention on NVIDIA, in bfloat16).

    Returns:
        a Policy, whose forward raises ValueError when it is traced for more than max_positions.

    Raises:
        ValueError: this attention cannot run here, or not in this dtype.
    """
    a = architecture
    check_attention(attention, dtype)

    def check_length(length):
        if length > a.max_positions:
            raise ValueError(
                f"a sequence of {length} tokens (prompt with padding + completion) is over the "
                f"model's {a.max_positions} positions"
            )

    def read(params):
        if isinstance(params, _OutputLast):
            return replace(a, transposed_kernels=False), params.weights
        return a, view(params)

    def run(params, frame, tokens, caches):
        return _run(*read(params), frame, tokens, caches, dtype, REMAT[remat], ATTENTION[attention])

    def forward(params, tokens, mask, positions, cache=None, *, num_tokens=None):
        check_length(mask.shape[1])
        num_prompts, prefix_length = sharing(cache, tokens, mask)
        segment = make_segment(
            a.windows,
            mask,
            positions,
            num_prompts=num_prompts,
            prefix_length=prefix_length,
            num_tokens=num_tokens,
        )
        caches = layers_of(cache, a.num_layers)
        (hidden,), own = run(params, _make_frame(a, tokens, (segment,)), [tokens], caches)
        if cache is not None:
            cache = cache.replace(own=tuple(own), size=cache.size + tokens.shape[1])
        return hidden, cache

    def forward_groups(params, prompts, tokens, mask, *, num_tokens=None):
        num_prompts, prompt_length = prompts.tokens.shape
        prompt_mask = jnp.repeat(prompts.mask, tokens.shape[0] // num_prompts, axis=0)
        whole_mask = jnp.concatenate([prompt_mask, mask], axis=1)
        check_length(whole_mask.shape[1])
        positions = positions_from_mask(prompts.mask)
        prompt = make_segment(a.windows, prompts.mask, positions, num_prompts=num_prompts)
        own = make_segment(
            a.windows,
            whole_mask,
            positions_from_mask(whole_mask)[:, prompt_length:],
            num_prompts=num_prompts,
            prefix_length=prompt_length,
            num_tokens=num_tokens,
        )
        frame = _make_frame(a, prompts.tokens, (prompt, own))
        (of_prompts, hidden), _ = run(params, frame, [prompts.tokens, tokens], layers_of(None, a.num_layers))
        return of_prompts[:, -1], hidden

    def for_decoding(params, num_rows):
        few = num_rows < _MANY_ROWS and jax.default_backend() == "cpu" and cpu_vendor() == "AuthenticAMD"
        return _output_last(a, view(params)) if few else params

    def unembed(params, hidden):
        form, weights = read(params)
        if "head" in weights:
            logits = _dense(form, hidden, weights["head"], dtype, jnp.float32)
        else:
            logits = _matmul(hidden.astype(dtype), weights["embedding"].astype(dtype), 1, jnp.float32)
        return softcap(logits, a.logit_softcap)

    return Policy(
        forward=forward,
        unembed=unembed,
        init_cache=functools.partial(
            init_cache,
            num_layers=a.num_layers,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            dtype=dtype,
        ),
        fork_cache=fork_cache,
        grow_cache=grow_cache,
        take_cache=take_cache,
        for_decoding=for_decoding,
        forward_groups=forward_groups,
    )


@flax.struct.dataclass
class _OutputLast:
    """A decoder's parameters with every kernel as [in, out]."""

    weights: dict[str, Any]  # as a view gives them, with a head


def _output_last(a: Architecture, weights: dict[str, Any]) -> _OutputLast:
    """Lays out every kernel as [in, out], a tied head included.

    With few rows, XLA on AMD multiplies by such matrices up to twice as fast as by [out, in]: 125 against 66
    GFLOP/s for 8 rows and 3072 by 768 (EPYC). From _MANY_ROWS on there is no difference. On Intel it is
    slower: 48 against 70 for 8 rows, 99 against 171 for 32 (Sapphire Rapids). Decoding takes a quarter more.
    """

    def flip(dense):
        return dense | {"kernel": dense["kernel"].T} if a.transposed_kernels else dense

    def flip_all(layer):
        lists = {name: [flip(dense) for dense in layer[name]] for name in ("qkv", "up")}
        return layer | lists | {name: flip(layer[name]) for name in ("output", "down")}

    head = flip(weights["head"]) if "head" in weights else {"kernel": weights["embedding"].T}
    return _OutputLast(weights | {"head": head, "layers": [flip_all(layer) for layer in weights["layers"]]})


def _matmul(x: Array, kernel: Array, axis: int, out_dtype: Any) -> Array:
    """Contracts the last axis of x with an axis of a matrix. Sums are float32."""
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, kernel, contract, preferred_element_type=out_dtype)


def _dense(a: Architecture, x: Array, weights: dict, dtype: Any, out_dtype: Any = None) -> Array:
    axis = 1 if a.transposed_kernels else 0
    y = _matmul(x.astype(dtype), weights["kernel"].astype(dtype), axis, out_dtype or dtype)
    return y + weights["bias"].astype(y.dtype) if "bias" in weights else y


def _norm(a: Architecture, x: Array, weights: dict) -> Array:
    """Computes LayerNorm or RMSNorm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    if a.norm == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + a.norm_epsilon) * (a.norm_offset + weights["scale"])
    return (y + weights["bias"] if "bias" in weights else y).astype(x.dtype)


@jax.custom_vjp
def _block_fusion(x: Array, always: Array) -> Array:
    """Returns x. On a CPU it keeps XLA from fusing gradients across this point.

    The gradient of the residual stream is a chain of cheap sums. XLA on the CPU recomputes it from its start
    wherever it is used, which costs a quarter of the update of 6 layers. It does not fuse across a
    conditional whose predicate it cannot know (`optimization_barrier` is expanded before fusion there).
    Elsewhere the gradient passes unchanged.
    """
    del always
    return x


def _block_fusion_forward(x, always):
    return x, always


def _block_fusion_backward(always, gradient):
    def conditional(always, gradient):
        return jax.lax.cond(always, lambda g: g, jnp.zeros_like, gradient)

    # Decided for the platform that the program is compiled for, which may not be that of this machine.
    return jax.lax.platform_dependent(always, gradient, cpu=conditional, default=lambda _, g: g), None


_block_fusion.defvjp(_block_fusion_forward, _block_fusion_backward)


@dataclass(frozen=True)
class _Frame:
    """What the layers of one call share. See the picture in `grpo_jax.policy.attention`."""

    segments: tuple[Segment, ...]  # The second one, if any, continues the prompts of the first.
    angles: dict[Rotary, list[tuple[Array, Array]]]  # rotary embedding -> its angles for each segment
    always: Array  # [] bool, True. The compiler does not know it, see `_block_fusion`.

    def join(self, parts: list[Array]) -> Array:
        """Puts arrays [B,K,...] of the segments side by side: [R,...]."""
        flat = [segment.flatten(x) for segment, x in zip(self.segments, parts, strict=True)]
        return flat[0] if len(flat) == 1 else jnp.concatenate(flat)

    def separate(self, x: Array) -> list[Array]:
        """Splits [R,...] into arrays [B,K,...] of the segments again."""
        flat = [x]
        if len(self.segments) > 1:
            n, g, queries, _ = self.segments[0].shape
            flat = jnp.split(x, [n * g * queries])
        return [segment.spread(part) for segment, part in zip(self.segments, flat, strict=True)]


def _make_frame(a: Architecture, tokens: Array, segments: tuple[Segment, ...]) -> _Frame:
    rotaries = dict.fromkeys(a.rotary)
    angles = {rotary: [rotary.angles(s.positions, a.head_dim) for s in segments] for rotary in rotaries}
    return _Frame(segments=segments, angles=angles, always=tokens[0, 0] >= 0)


def _heads(a, weights, i, frame, features) -> list[tuple[Array, Array, Array]]:
    """Splits features [R,...] into each segment's queries [n,k,g,r,K,d], keys and values [n,k,g,K,d]."""
    counts = (a.num_heads, a.num_kv_heads, a.num_kv_heads)
    features = [x.reshape(x.shape[0], count, a.head_dim) for x, count in zip(features, counts, strict=True)]
    if "query_norm" in weights:
        features[0] = _norm(a, features[0], weights["query_norm"])
        features[1] = _norm(a, features[1], weights["key_norm"])
    heads = []
    parts = zip(*(frame.separate(x) for x in features), strict=True)
    for number, (segment, (query, key, value)) in enumerate(zip(frame.segments, parts, strict=True)):
        n, g, queries, _ = segment.shape
        if a.rotary:
            query, key = (rotate(x, *frame.angles[a.rotary[i]][number]) for x in (query, key))
        query = query.reshape(n, g, queries, a.num_kv_heads, -1, a.head_dim).transpose(0, 3, 1, 4, 2, 5)
        key, value = (
            x.reshape(n, g, queries, a.num_kv_heads, a.head_dim).transpose(0, 3, 1, 2, 4)
            for x in (key, value)
        )
        heads.append((query, key, value))
    return heads


def _attention(a, attend, weights, i, frame, features, cached) -> tuple[Array, KeysValues]:
    """Computes attention of layer i, from projected features [R,...] to mixed ones.

    Returns:
        (mixed features [R,...], the rows' own keys and values with the new ones in them).
    """
    prefix, before, size = cached
    mixed = []
    for segment, (query, *own) in zip(frame.segments, _heads(a, weights, i, frame, features), strict=True):
        n, g, queries, slots = segment.shape
        if slots > queries:  # otherwise the keys of this call are all there are
            own = [
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), size, axis=3)
                for old, new in zip(before, own, strict=True)
            ]
        x = attend(
            query,
            own,
            prefix,
            segment.visible,
            a.windows[i],
            scale=a.attention_scale,
            cap=a.attention_softcap,
        )
        mixed.append(x.transpose(0, 2, 4, 1, 3, 5).reshape(n * g, queries, a.num_heads * a.head_dim))
        if len(frame.segments) > 1:
            prefix = tuple(x[:, :, 0] for x in own)
    return frame.join(mixed), tuple(own)


def _layer(a, dtype, attend, i, frame, weights, x, cached) -> tuple[Array, KeysValues]:
    """Runs one block: attention, then the MLP, each added to the residual stream x [R,D]."""
    dense = functools.partial(_dense, a, dtype=dtype)
    normed = _norm(a, x, weights["attention_norm"])
    features = [dense(normed, w) for w in weights["qkv"]]
    if len(features) == 1:
        sizes = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        features = jnp.split(features[0], (sizes[0], sum(sizes)), axis=-1)
    mixed, own = _attention(a, attend, weights, i, frame, features, cached)
    mixed = dense(mixed, weights["output"])
    x = x + (_norm(a, mixed, weights["post_attention_norm"]) if "post_attention_norm" in weights else mixed)
    x = _block_fusion(x, frame.always)
    normed = _norm(a, x, weights["mlp_norm"])
    ups = [dense(normed, w) for w in weights["up"]]
    inner = ACTIVATIONS[a.activation](ups[0])
    inner = dense(inner * ups[1] if a.gated else inner, weights["down"])
    x = x + (_norm(a, inner, weights["post_mlp_norm"]) if "post_mlp_norm" in weights else inner)
    return _block_fusion(x, frame.always), own


def _run(a, weights, frame, tokens, caches, dtype, remat, attend) -> tuple[list[Array], list[KeysValues]]:
    """Runs the segments' tokens [B,K] through all layers.

    Where rows do not matter, all tokens are one array [R,D], prompts and completions together. That makes
    matrix products larger and half as many, with one gradient per kernel.

    Returns:
        (final hidden states [B,K,D] of each segment, keys and values of the last segment by layer).
    """
    x = weights["embedding"].astype(dtype)[frame.join(tokens)]
    if a.embedding_scale != 1.0:
        x = x * jnp.asarray(a.embedding_scale, dtype)
    if not a.rotary:
        positions = frame.join([segment.positions for segment in frame.segments])
        x = x + weights["positions"].astype(dtype)[jnp.maximum(positions, 0)]
    own = []
    for i, (layer, cached) in enumerate(zip(weights["layers"], caches, strict=True)):
        x, filled = remat(functools.partial(_layer, a, dtype, attend, i, frame))(layer, x, cached)
        own.append(filled)
    return frame.separate(_norm(a, x, weights["final_norm"])), own
