"""The record that tells one decoder from another."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import Array

from grpo_jax.policy.rotary import Rotary

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that tells one decoder from another, apart from its weights.

    Args:
        vocab_size: number V of ids.
        max_positions: length of the longest sequence in tokens, padding included.
        width: width D of the residual stream.
        num_layers: number of layers.
        num_heads: number of query heads.
        num_kv_heads: number of key-value heads, a divisor of num_heads.
        head_dim: width of a head.
        norm: kind of the norms, `layer` or `rms`.
        norm_epsilon: number added to the variance.
        norm_offset: number added to a norm's scale. Gemma stores its scales around 0.
        activation: a key of ACTIVATIONS.
        gated: whether the activation of one projection multiplies another.
        rotary: rotary embedding of each layer. If it is empty, positions are learned.
        windows: attention window of each layer. A query sees the keys at most window - 1 positions back.
            None means that it sees all keys before it.
        attention_scale: factor of the attention scores.
        attention_softcap: cap of the scores, cap * tanh(scores / cap). None means no cap.
        logit_softcap: cap of the logits, likewise.
        embedding_scale: factor of the token embeddings.
        transposed_kernels: whether dense kernels are stored [out, in].
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
