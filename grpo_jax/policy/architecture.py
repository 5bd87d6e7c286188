"""The record that tells one decoder from another."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax

from grpo_jax.policy.rotary import Rotary
from grpo_jax.types import Array

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
