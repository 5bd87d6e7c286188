"""The model types that our own decoder computes: how each type of the Llama line differs from the others."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]  # fields of a configuration, defaults filled in, and keys that it does not know


@dataclass(frozen=True, kw_only=True)
class LlamaVariant:
    """How one model type of the Llama line differs from the others.

    Args:
        activation: field that names the activation.
        biases: function that says which dense layers have a bias: query, key and value, then the attention
            output, then the MLP.
        windows: layers that the field `sliding_window` applies to: those of `layer_types`, `all`, or `none`.
        head_norms: whether queries and keys are normalised.
        sandwich: whether attention and MLP have a norm behind them, too.
        gemma: whether embeddings are scaled by sqrt(width), and scales of norms are stored around 0.
        ignored: fields that PyTorch's class does not use, though classes of other variants do.
    """

    activation: str = "hidden_act"
    biases: Callable[[Settings], tuple[bool, bool, bool]] = lambda s: (False, False, False)
    windows: str = "none"
    head_norms: bool = False
    sandwich: bool = False
    gemma: bool = False
    ignored: tuple[str, ...] = ("mlp_bias", "use_bidirectional_attention")


def _attention_biases(settings: Settings) -> tuple[bool, bool, bool]:
    return settings["attention_bias"], settings["attention_bias"], False


_gemma = functools.partial(LlamaVariant, gemma=True, biases=_attention_biases, activation="hidden_activation")
LLAMA_VARIANTS: dict[str, LlamaVariant] = {
    "llama": LlamaVariant(
        biases=lambda s: (s["attention_bias"], s["attention_bias"], s["mlp_bias"]),
        ignored=("use_bidirectional_attention",),
    ),
    "mistral": LlamaVariant(windows="all", ignored=("attention_bias", "mlp_bias", "layer_types")),
    "qwen2": LlamaVariant(windows="layer_types", biases=lambda s: (True, False, False)),
    "qwen3": LlamaVariant(windows="layer_types", biases=_attention_biases, head_norms=True),
    "gemma": _gemma(activation="hidden_act"),
    "gemma2": _gemma(windows="layer_types", sandwich=True),
    "gemma3_text": _gemma(
        windows="layer_types",
        sandwich=True,
        head_norms=True,
        ignored=("mlp_bias", "use_bidirectional_attention", "attn_logit_softcapping"),
    ),
}
MODEL_TYPES = ("gpt2", *LLAMA_VARIANTS)


def head_dim_of(s: Settings) -> int:
    """Returns the width of an attention head, which follows from the other fields if it is not given."""
    return s.get("head_dim") or s["hidden_size"] // s["num_attention_heads"]
