"""The layers of a decoder-only transformer, as functions of an `Architecture` and of their parameters.

`decoder` makes a `Policy` of them. Parameters are trees as a view gives them, see `make_decoder`. Arrays of
features are [R,...]: the tokens of all segments of a call side by side, see `Frame`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.policy.architecture import ACTIVATIONS, Architecture
from grpo_jax.policy.attention import KeysValues, Segment
from grpo_jax.policy.rotary import Rotary, rotate


def matmul(x: Array, kernel: Array, axis: int, out_dtype: Any) -> Array:
    """Contracts the last axis of x with an axis of a matrix.

    Sums are float32. The result has out_dtype, which is float32 for logits: in bfloat16 they would be off by
    a tenth of a nat.
    """
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, kernel, contract, preferred_element_type=out_dtype)


def dense(a: Architecture, x: Array, params: dict, dtype: Any, out_dtype: Any = None) -> Array:
    """Applies a dense layer. A kernel that is stored [out, in] is contracted as it is, not transposed."""
    axis = 1 if a.transposed_kernels else 0
    y = matmul(x.astype(dtype), params["kernel"].astype(dtype), axis, out_dtype or dtype)
    return y + params["bias"].astype(y.dtype) if "bias" in params else y


def norm(a: Architecture, x: Array, params: dict) -> Array:
    """Computes LayerNorm or RMSNorm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    if a.norm == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + a.norm_epsilon) * (a.norm_offset + params["scale"])
    return (y + params["bias"] if "bias" in params else y).astype(x.dtype)


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

    # The platform that counts is that of the program, which may be compiled for another machine than this.
    return jax.lax.platform_dependent(always, gradient, cpu=conditional, default=lambda _, g: g), None


_block_fusion.defvjp(_block_fusion_forward, _block_fusion_backward)


@dataclass(frozen=True)
class Frame:
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


def make_frame(a: Architecture, tokens: Array, segments: tuple[Segment, ...]) -> Frame:
    """Makes the frame of segments, the first of which has these tokens."""
    # Most models have one rotary embedding for all layers. Its angles are computed once.
    angles = {
        rotary: [rotary.angles(segment.positions, a.head_dim) for segment in segments]
        for rotary in dict.fromkeys(a.rotary)
    }
    # Every token is at least 0, but the compiler cannot know that.
    return Frame(segments=segments, angles=angles, always=tokens[0, 0] >= 0)


def _heads(a, layer, i, frame, features) -> list[tuple[Array, Array, Array]]:
    """Splits features [R,...] into each segment's queries [n,k,g,r,K,d], keys and values [n,k,g,K,d].

    Here the axes are put in the order that `attend` multiplies in, so that its products need no transposes.
    """
    counts = (a.num_heads, a.num_kv_heads, a.num_kv_heads)
    features = [x.reshape(x.shape[0], count, a.head_dim) for x, count in zip(features, counts, strict=True)]
    if "query_norm" in layer:
        features[0] = norm(a, features[0], layer["query_norm"])
        features[1] = norm(a, features[1], layer["key_norm"])
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


def _attention(a, attend, layer, i, frame, features, cached) -> tuple[Array, KeysValues]:
    """Computes attention of layer i, from projected features [R,...] to mixed ones.

    Returns:
        (mixed features [R,...], the rows' own keys and values with the new ones in them).
    """
    prefix, before, size = cached
    mixed = []
    for segment, (query, *own) in zip(frame.segments, _heads(a, layer, i, frame, features), strict=True):
        n, g, queries, slots = segment.shape
        if slots > queries:  # otherwise the keys of this call are all there are
            # All rows write at the same slots, so this is a slice and not a scatter, and XLA can do it in
            # place.
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
            # The prompts of the first segment are the prefix of the second. They have one row each, g = 1.
            prefix = tuple(x[:, :, 0] for x in own)
    return frame.join(mixed), tuple(own)


def _run_layer(a, dtype, attend, i, frame, layer, x, cached) -> tuple[Array, KeysValues]:
    """Runs one block: attention, then the MLP, each added to the residual stream x [R,D]."""
    project = functools.partial(dense, a, dtype=dtype)
    normed = norm(a, x, layer["attention_norm"])
    features = [project(normed, params) for params in layer["qkv"]]
    if len(features) == 1:  # GPT-2 stores the three projections as one kernel
        query_size = a.num_heads * a.head_dim
        key_size = a.num_kv_heads * a.head_dim
        features = jnp.split(features[0], (query_size, query_size + key_size), axis=-1)
    mixed, own = _attention(a, attend, layer, i, frame, features, cached)
    mixed = project(mixed, layer["output"])
    x = x + (norm(a, mixed, layer["post_attention_norm"]) if "post_attention_norm" in layer else mixed)
    x = _block_fusion(x, frame.always)
    normed = norm(a, x, layer["mlp_norm"])
    ups = [project(normed, params) for params in layer["up"]]
    inner = ACTIVATIONS[a.activation](ups[0])
    inner = project(inner * ups[1] if a.gated else inner, layer["down"])
    x = x + (norm(a, inner, layer["post_mlp_norm"]) if "post_mlp_norm" in layer else inner)
    return _block_fusion(x, frame.always), own


def run_layers(a, tree, frame, tokens, caches, dtype, remat, attend) -> tuple[list[Array], list[KeysValues]]:
    """Runs the segments' tokens through all layers.

    Where rows do not matter, all tokens are one array [R,D], prompts and completions together. That makes
    matrix products larger and half as many, with one gradient per kernel.

    Args:
        a: architecture of the model.
        tree: parameters as a view gives them.
        frame: frame of the call.
        tokens: tokens [B,K] of each segment.
        caches: (prefix, own, size) of each layer, see `layers_of`.
        dtype: compute dtype.
        remat: wrapper of a layer, a value of REMAT.
        attend: function that mixes the values, a value of ATTENTION.

    Returns:
        (final hidden states [B,K,D] of each segment, keys and values of the last segment by layer).
    """
    x = tree["embedding"].astype(dtype)[frame.join(tokens)]
    if a.embedding_scale != 1.0:
        x = x * jnp.asarray(a.embedding_scale, dtype)
    if not a.rotary:
        positions = frame.join([segment.positions for segment in frame.segments])
        # A pad may have position -1. Nothing depends on it, but it must index the table.
        x = x + tree["positions"].astype(dtype)[jnp.maximum(positions, 0)]
    own = []
    # This is a Python loop and no scan, because layers may differ in window and rotary embedding.
    for i, (layer, cached) in enumerate(zip(tree["layers"], caches, strict=True)):
        x, filled = remat(functools.partial(_run_layer, a, dtype, attend, i, frame))(layer, x, cached)
        own.append(filled)
    return frame.separate(norm(a, x, tree["final_norm"])), own
