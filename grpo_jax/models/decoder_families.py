"""The configurations that `decoder.py` computes, each as an `Architecture` with the names of its weights.

Parameters keep the pytree of `FlaxAutoModelForCausalLM`, even if that has no class for the type. Paths are
PyTorch's module names, and kernels are [in, out] (GPT-2's are [out, in]). So files, exports and checkpoints
do not depend on which of the two computes. Every type here agrees with PyTorch transformers on the
checkpoints under tests/fixtures/models.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from grpo_jax.policy.decoder import Architecture, make_decoder
from grpo_jax.policy.rotary import LinearScaling, Llama3Scaling, Rotary
from grpo_jax.types import Array, Params, Policy

Config = Any  # a transformers PretrainedConfig
Settings = dict[str, Any]  # its fields, defaults filled in, and the keys of config.json it does not know
Problems = Iterator[str]  # reasons why a configuration is refused

# The names in config.json -> ours. Three of them are the tanh approximation.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
_SCALINGS = {  # rope_type -> what it needs
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """How one model type of the Llama line differs from the others.

    Args:
        activation: field that names the activation.
        biases: function that says which dense layers have a bias: query, key and value, then the attention
            output, then the MLP.
        windows: layers that the field `sliding_window` applies to: those of `layer_types`, `all`, or `none`.
        head_norms: whether queries and keys are normalised.
        sandwich: whether attention and MLP have a norm behind them, too.
        gemma: whether embeddings are scaled by sqrt(width), and scales of norms are stored around 0.
        ignored: fields that PyTorch's class does not use, though others of the line do.
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


_gemma = functools.partial(Line, gemma=True, biases=_attention_biases, activation="hidden_activation")
LINES: dict[str, Line] = {
    "llama": Line(
        biases=lambda s: (s["attention_bias"], s["attention_bias"], s["mlp_bias"]),
        ignored=("use_bidirectional_attention",),
    ),
    "mistral": Line(windows="all", ignored=("attention_bias", "mlp_bias", "layer_types")),
    "qwen2": Line(windows="layer_types", biases=lambda s: (True, False, False)),
    "qwen3": Line(windows="layer_types", biases=_attention_biases, head_norms=True),
    "gemma": _gemma(activation="hidden_act"),
    "gemma2": _gemma(windows="layer_types", sandwich=True),
    "gemma3_text": _gemma(
        windows="layer_types",
        sandwich=True,
        head_norms=True,
        ignored=("mlp_bias", "use_bidirectional_attention", "attn_logit_softcapping"),
    ),
}
MODEL_TYPES = ("gpt2", *LINES)


# What is refused


def problems(config: Config) -> Problems:
    """Yields every reason why the decoder would not compute what PyTorch computes."""
    if config.model_type not in MODEL_TYPES:
        yield f"the decoder knows no {config.model_type}; it knows {', '.join(MODEL_TYPES)}"
        return
    s = config.to_dict()
    if s.get("quantization_config"):
        yield "quantization_config: quantized weights cannot be trained"
    if s.get("add_cross_attention") or s.get("is_encoder_decoder"):
        yield "it is one half of an encoder-decoder model"
    if s.get("pruned_heads"):
        yield "pruned_heads: heads that are left out"
    yield from _gpt2_problems(s) if config.model_type == "gpt2" else _line_problems(s)


def _activation_problems(s: Settings, field: str) -> Problems:
    if s[field] not in ACTIVATIONS:
        yield f"{field}={s[field]!r} is unknown; there are {', '.join(ACTIVATIONS)}"


def _gpt2_problems(s: Settings) -> Problems:
    yield from _activation_problems(s, "activation_function")
    if s["n_embd"] % s["n_head"]:
        yield f"width {s['n_embd']} does not divide into {s['n_head']} heads"
    if s["scale_attn_by_inverse_layer_idx"]:
        yield "scale_attn_by_inverse_layer_idx=true scales every layer's scores in its own way"


def _line_problems(s: Settings) -> Problems:
    line = LINES[s["model_type"]]
    yield from _activation_problems(s, line.activation)
    if s["model_type"] == "gemma" and ACTIVATIONS.get(s["hidden_act"]) != ACTIVATIONS.get(
        s["hidden_activation"] or "gelu_pytorch_tanh"
    ):
        # Versions of PyTorch transformers disagree about which of the two counts.
        yield (
            f"hidden_act={s['hidden_act']!r}, hidden_activation={s['hidden_activation']!r} (null is the tanh "
            "approximation): set both to the one you mean"
        )
    for field in line.ignored:
        if s.get(field):
            yield f"{field}={s[field]} is ignored by PyTorch"
    heads, groups = s["num_attention_heads"], s["num_key_value_heads"]
    if heads % groups:
        yield f"{heads} heads do not divide into {groups} key-value heads"
    if _head_dim(s) % 2:
        yield f"head_dim={_head_dim(s)}; rotary positions need an even one"
    if s.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={s['partial_rotary_factor']}: positions of a part of each head"
    yield from _scaling_problems(s.get("rope_scaling") or {"rope_type": "default"})
    if line.windows != "none":
        window = s["sliding_window"]
        if window is not None and window < 1:
            yield f"sliding_window={window}; a query sees at least its own key"
        kinds = s["layer_types"] if line.windows == "layer_types" else ()
        if strange := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            yield f"layer_types has {', '.join(strange)}; only full_attention and sliding_attention exist"
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
    elif strange := sorted(
        key for key in given if not (isinstance(rope[key], int | float) and rope[key] > 0)
    ):
        yield f"rope_scaling {strange[0]}={rope[strange[0]]!r}; it must be a positive number"
    elif kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        yield f"rope_scaling low_freq_factor={rope['low_freq_factor']} is not below high_freq_factor"


# What is computed


def architecture_of(config: Config) -> Architecture:
    """Returns the architecture of a configuration without `problems`."""
    s = config.to_dict()
    return _gpt2_architecture(s) if config.model_type == "gpt2" else _line_architecture(s)


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


def _line_architecture(s: Settings) -> Architecture:
    line, num_layers = LINES[s["model_type"]], s["num_hidden_layers"]
    windows = (s["sliding_window"] if line.windows == "all" else None,) * num_layers
    if line.windows == "layer_types":
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
        head_dim=_head_dim(s),
        norm="rms",
        norm_epsilon=s["rms_norm_eps"],
        norm_offset=1.0 if line.gemma else 0.0,
        activation=ACTIVATIONS[s[line.activation]],
        gated=True,
        rotary=rotary,
        windows=windows,
        attention_scale=(s["query_pre_attn_scalar"] if has_caps else _head_dim(s)) ** -0.5,
        attention_softcap=s["attn_logit_softcapping"] if has_caps else None,
        logit_softcap=s["final_logit_softcapping"] if has_caps else None,
        embedding_scale=s["hidden_size"] ** 0.5 if line.gemma else 1.0,
    )


def _head_dim(s: Settings) -> int:
    return s.get("head_dim") or s["hidden_size"] // s["num_attention_heads"]


def _scaling(rope: dict | None) -> LinearScaling | Llama3Scaling | None:
    kind = None if rope is None else rope.get("rope_type", rope.get("type"))
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


# Where the weights are


@dataclass(frozen=True)
class Leaf:
    """One parameter: its path, its shape there, and whether the decoder reads it transposed."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False

    def of(self, params: Params) -> Array:
        """Returns the parameter."""
        leaf = functools.reduce(lambda tree, key: tree[key], self.path, params)
        return leaf.T if self.transposed else leaf


def layout(config: Config) -> dict[str, Any]:
    """Returns the decoder's tree of weights (see `make_decoder`), with a `Leaf` for each weight."""
    s = config.to_dict()
    return _gpt2_layout(s) if config.model_type == "gpt2" else _line_layout(s)


def _gpt2_layout(s: Settings) -> dict[str, Any]:
    width, inner = s["n_embd"], s["n_inner"] or 4 * s["n_embd"]

    def norm(*path):
        return {"scale": Leaf((*path, "scale"), (width,)), "bias": Leaf((*path, "bias"), (width,))}

    def dense(inputs, outputs, *path):
        return {
            "kernel": Leaf((*path, "kernel"), (outputs, inputs)),
            "bias": Leaf((*path, "bias"), (outputs,)),
        }

    def layer(*path):
        return {
            "attention_norm": norm(*path, "ln_1"),
            "qkv": (dense(width, 3 * width, *path, "attn", "c_attn"),),
            "output": dense(width, width, *path, "attn", "c_proj"),
            "mlp_norm": norm(*path, "ln_2"),
            "up": (dense(width, inner, *path, "mlp", "c_fc"),),
            "down": dense(inner, width, *path, "mlp", "c_proj"),
        }

    tree = {
        "embedding": Leaf(("transformer", "wte", "embedding"), (s["vocab_size"], width)),
        "positions": Leaf(("transformer", "wpe", "embedding"), (s["n_positions"], width)),
        "layers": tuple(layer("transformer", "h", str(i)) for i in range(s["n_layer"])),
        "final_norm": norm("transformer", "ln_f"),
    }
    if not s["tie_word_embeddings"]:  # [in, out], unlike the other kernels
        tree["head"] = {"kernel": Leaf(("lm_head", "kernel"), (width, s["vocab_size"]), transposed=True)}
    return tree


def _line_layout(s: Settings) -> dict[str, Any]:
    line, width, head_dim = LINES[s["model_type"]], s["hidden_size"], _head_dim(s)
    inputs_bias, output_bias, mlp_bias = line.biases(s)
    heads, groups = s["num_attention_heads"] * head_dim, s["num_key_value_heads"] * head_dim

    def norm(*path, size=width):
        return {"scale": Leaf((*path, "weight"), (size,))}

    def dense(inputs, outputs, bias, *path):
        kernel = {"kernel": Leaf((*path, "kernel"), (inputs, outputs))}
        return kernel | ({"bias": Leaf((*path, "bias"), (outputs,))} if bias else {})

    def layer(*path):
        attention, mlp = (*path, "self_attn"), (*path, "mlp")
        tree = {
            "attention_norm": norm(*path, "input_layernorm"),
            "qkv": tuple(
                dense(width, outputs, inputs_bias, *attention, name)
                for name, outputs in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups))
            ),
            "output": dense(heads, width, output_bias, *attention, "o_proj"),
            "mlp_norm": norm(*path, "post_attention_layernorm"),
            "up": tuple(
                dense(width, s["intermediate_size"], mlp_bias, *mlp, name)
                for name in ("gate_proj", "up_proj")
            ),
            "down": dense(s["intermediate_size"], width, mlp_bias, *mlp, "down_proj"),
        }
        if line.head_norms:
            tree["query_norm"] = norm(*attention, "q_norm", size=head_dim)
            tree["key_norm"] = norm(*attention, "k_norm", size=head_dim)
        if line.sandwich:
            tree["post_attention_norm"] = tree["mlp_norm"]
            tree["mlp_norm"] = norm(*path, "pre_feedforward_layernorm")
            tree["post_mlp_norm"] = norm(*path, "post_feedforward_layernorm")
        return tree

    tree = {
        "embedding": Leaf(("model", "embed_tokens", "embedding"), (s["vocab_size"], width)),
        "layers": tuple(layer("model", "layers", str(i)) for i in range(s["num_hidden_layers"])),
        "final_norm": norm("model", "norm"),
    }
    if not s["tie_word_embeddings"]:
        tree["head"] = dense(width, s["vocab_size"], False, "lm_head")
    return tree


def param_shapes(config: Config) -> Params:
    """Returns the pytree of the parameters, as shapes."""
    leaves = jax.tree.leaves(layout(config))
    return unflatten_dict({leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in leaves})


def make_policy(config: Config, *, dtype: Any, remat: str = "none", attention: str = "shared") -> Policy:
    """Makes the policy of a configuration without `problems`.

    Args:
        config: the transformers configuration object.
        dtype: compute dtype, jnp.float32 or jnp.bfloat16. Logits are float32 either way.
        remat: remat of `make_decoder`.
        attention: attention of `make_decoder`.
    """
    tree = layout(config)

    def view(params: Params) -> dict[str, Any]:
        return jax.tree.map(lambda leaf: leaf.of(params), tree)

    return make_decoder(architecture_of(config), view, dtype=dtype, remat=remat, attention=attention)


def embedding_path(config: Config) -> tuple[str, ...]:
    """Returns the path of the token embedding. Its first part is the base model's."""
    return layout(config)["embedding"].path


def buffers(config: Config) -> tuple[str, ...]:
    """Returns patterns of tensors in PyTorch files that are constants, not parameters."""
    return (r"\.attn\.(masked_)?bias$",) if config.model_type == "gpt2" else (r"\.rotary_emb\.inv_freq$",)


def max_positions(config: Config) -> int:
    """Returns the length of the longest sequence, padding included. A window does not limit it."""
    return architecture_of(config).max_positions
