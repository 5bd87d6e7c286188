"""The configurations that our own decoder computes, each as an `Architecture` and a `Policy`.

Every type here agrees with PyTorch transformers on the checkpoints under tests/fixtures/models. Its
differences from the other types are in `llama_variants`, and its parameters in `decoder_layout`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from grpo_jax.models.decoder_layout import layout
from grpo_jax.models.hf_config import settings_of
from grpo_jax.models.interface import HFConfig, Problems
from grpo_jax.models.llama_variants import LLAMA_VARIANTS, MODEL_TYPES, Settings, head_dim_of
from grpo_jax.policy.architecture import Architecture
from grpo_jax.policy.decoder import make_decoder
from grpo_jax.policy.rotary import LinearScaling, Llama3Scaling, Rotary
from grpo_jax.types import Params, Policy

# Name of an activation in config.json -> our name. Three of them are the tanh approximation.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
_SCALINGS = {  # rope_type -> the other fields that it needs
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


# What is refused


def problems(config: HFConfig) -> Problems:
    """Yields every reason why the decoder would not compute what PyTorch computes."""
    if config.model_type not in MODEL_TYPES:
        yield f"the decoder knows no {config.model_type}; it knows {', '.join(MODEL_TYPES)}"
        return
    s = settings_of(config)
    if s.get("quantization_config"):
        yield "quantization_config: quantized weights cannot be trained"
    if s.get("add_cross_attention") or s.get("is_encoder_decoder"):
        yield "it is one half of an encoder-decoder model"
    if s.get("pruned_heads"):
        yield "pruned_heads leaves heads out, which the decoder cannot"
    yield from _gpt2_problems(s) if config.model_type == "gpt2" else _llama_problems(s)


def _activation_problems(s: Settings, field: str) -> Problems:
    if s[field] not in ACTIVATIONS:
        yield f"{field}={s[field]!r} is unknown; there are {', '.join(ACTIVATIONS)}"


def _gpt2_problems(s: Settings) -> Problems:
    yield from _activation_problems(s, "activation_function")
    if s["n_embd"] % s["n_head"]:
        yield f"width {s['n_embd']} does not divide into {s['n_head']} heads"
    if s["scale_attn_by_inverse_layer_idx"]:
        yield "scale_attn_by_inverse_layer_idx=true scales every layer's scores in its own way"


def _llama_problems(s: Settings) -> Problems:
    variant = LLAMA_VARIANTS[s["model_type"]]
    yield from _activation_problems(s, variant.activation)
    if s["model_type"] == "gemma" and ACTIVATIONS.get(s["hidden_act"]) != ACTIVATIONS.get(
        s["hidden_activation"] or "gelu_pytorch_tanh"
    ):
        # Versions of PyTorch transformers disagree about which of the two counts.
        yield (
            f"hidden_act={s['hidden_act']!r}, hidden_activation={s['hidden_activation']!r} (null is the tanh "
            "approximation): set both to the one you mean"
        )
    for field in variant.ignored:
        if s.get(field):
            yield f"{field}={s[field]} is ignored by PyTorch"
    heads = s["num_attention_heads"]
    groups = s["num_key_value_heads"]
    if heads % groups:
        yield f"{heads} heads do not divide into {groups} key-value heads"
    if head_dim_of(s) % 2:
        yield f"head_dim={head_dim_of(s)}; rotary positions need an even one"
    if s.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={s['partial_rotary_factor']} rotates only a part of each head"
    yield from _scaling_problems(s.get("rope_scaling") or {"rope_type": "default"})
    if variant.windows != "none":
        window = s["sliding_window"]
        if window is not None and window < 1:
            yield f"sliding_window={window}; a query sees at least its own key"
        kinds = s["layer_types"] if variant.windows == "layer_types" else ()
        if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            yield f"layer_types has {', '.join(unknown)}; only full_attention and sliding_attention exist"
        if window is None and "sliding_attention" in kinds:
            yield "layer_types has sliding_attention, but there is no sliding_window"


def _scaling_problems(rope: dict) -> Problems:
    kind = rope.get("rope_type", rope.get("type"))
    given = set(rope) - {"rope_type", "type"}
    if kind not in _SCALINGS:
        yield f"rope_scaling of type {kind!r}; there are {', '.join(_SCALINGS)}"
    elif given != _SCALINGS[kind]:
        wanted = ", ".join(sorted(_SCALINGS[kind])) or "nothing else"
        yield f"rope_scaling of type {kind} has {', '.join(sorted(given)) or 'nothing'}; it needs {wanted}"
    elif wrong := sorted(key for key in given if not (isinstance(rope[key], int | float) and rope[key] > 0)):
        yield f"rope_scaling {wrong[0]}={rope[wrong[0]]!r}; it must be a positive number"
    elif kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        yield f"rope_scaling low_freq_factor={rope['low_freq_factor']} is not below high_freq_factor"


# What is computed


def architecture_of(config: HFConfig) -> Architecture:
    """Returns the architecture of a configuration without `problems`."""
    s = settings_of(config)
    return _gpt2_architecture(s) if config.model_type == "gpt2" else _llama_architecture(s)


def _gpt2_architecture(s: Settings) -> Architecture:
    head_dim = s["n_embd"] // s["n_head"]
    return Architecture(
        vocab_size=s["vocab_size"],
        max_positions=s["n_positions"],
        width=s["n_embd"],
        num_layers=s["n_layer"],
        num_heads=s["n_head"],
        num_kv_heads=s["n_head"],
        head_dim=head_dim,
        norm="layer",
        norm_epsilon=s["layer_norm_epsilon"],
        activation=ACTIVATIONS[s["activation_function"]],
        windows=(None,) * s["n_layer"],
        attention_scale=head_dim**-0.5 if s["scale_attn_weights"] else 1.0,
        transposed_kernels=True,
    )


def _llama_architecture(s: Settings) -> Architecture:
    variant = LLAMA_VARIANTS[s["model_type"]]
    num_layers = s["num_hidden_layers"]
    windows = (s["sliding_window"] if variant.windows == "all" else None,) * num_layers
    if variant.windows == "layer_types":
        windows = tuple(
            s["sliding_window"] if kind == "sliding_attention" else None for kind in s["layer_types"]
        )
    rotary = (Rotary(theta=float(s["rope_theta"]), scaling=_scaling(s.get("rope_scaling"))),) * num_layers
    if s["model_type"] == "gemma3_text":
        local = Rotary(theta=float(s["rope_local_base_freq"]))
        rotary = tuple(far if w is None else local for w, far in zip(windows, rotary, strict=True))
    has_caps = s["model_type"] in ("gemma2", "gemma3_text")
    return Architecture(
        vocab_size=s["vocab_size"],
        max_positions=s["max_position_embeddings"],
        width=s["hidden_size"],
        num_layers=num_layers,
        num_heads=s["num_attention_heads"],
        num_kv_heads=s["num_key_value_heads"],
        head_dim=head_dim_of(s),
        norm="rms",
        norm_epsilon=s["rms_norm_eps"],
        norm_offset=1.0 if variant.gemma else 0.0,
        activation=ACTIVATIONS[s[variant.activation]],
        gated=True,
        rotary=rotary,
        windows=windows,
        attention_scale=(s["query_pre_attn_scalar"] if has_caps else head_dim_of(s)) ** -0.5,
        attention_softcap=s["attn_logit_softcapping"] if has_caps else None,
        logit_softcap=s["final_logit_softcapping"] if has_caps else None,
        embedding_scale=s["hidden_size"] ** 0.5 if variant.gemma else 1.0,
    )


def _scaling(rope: dict | None) -> LinearScaling | Llama3Scaling | None:
    if rope is None:
        return None
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "linear":
        return LinearScaling(factor=float(rope["factor"]))
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=rope["original_max_position_embeddings"],
        )
    return None


def param_shapes(config: HFConfig) -> Params:
    """Returns the pytree of the parameters, as shapes."""
    leaves = jax.tree.leaves(layout(config))
    return unflatten_dict({leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in leaves})


def make_policy(config: HFConfig, *, dtype: Any, remat: str = "none", attention: str = "shared") -> Policy:
    """Makes the policy of a configuration without `problems`.

    Args:
        config: the transformers configuration object.
        dtype: compute dtype, jnp.float32 or jnp.bfloat16. Logits are float32 either way.
        remat: what a layer's backward pass recomputes, see `make_decoder`.
        attention: implementation of attention, see `make_decoder`.
    """
    tree = layout(config)

    def view(params: Params) -> dict[str, Any]:
        return jax.tree.map(lambda leaf: leaf.of(params), tree)

    return make_decoder(architecture_of(config), view, dtype=dtype, remat=remat, attention=attention)


def embedding_path(config: HFConfig) -> tuple[str, ...]:
    """Returns the path of the token embedding. Its first part is the base model's."""
    return layout(config)["embedding"].path


def buffers(config: HFConfig) -> tuple[str, ...]:
    """Returns patterns of tensors in PyTorch files that are constants, not parameters."""
    return (r"\.attn\.(masked_)?bias$",) if config.model_type == "gpt2" else (r"\.rotary_emb\.inv_freq$",)


def max_positions(config: HFConfig) -> int:
    """Returns the length of the longest sequence, padding included. A window does not limit it."""
    return architecture_of(config).max_positions
