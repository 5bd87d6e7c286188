"""Where our own decoder finds its parameters, for each model type.

Parameters keep the pytree of `FlaxAutoModelForCausalLM`, even if that has no class for the type. Paths are
PyTorch's module names, and kernels are [in, out] (GPT-2's are [out, in]). So files, exports and checkpoints
do not depend on which implementation computes.
"""

import functools
from dataclasses import dataclass
from typing import Any

from jax import Array

from grpo_jax.models.hf_config import settings_of
from grpo_jax.models.interface import HFConfig
from grpo_jax.models.llama_variants import LLAMA_VARIANTS, Settings, head_dim_of
from grpo_jax.types import Params


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


def layout(config: HFConfig) -> dict[str, Any]:
    """Returns the tree that `make_decoder` reads, with a `Leaf` in the place of each parameter."""
    s = settings_of(config)
    return _gpt2_layout(s) if config.model_type == "gpt2" else _llama_layout(s)


def _gpt2_layout(s: Settings) -> dict[str, Any]:
    width = s["n_embd"]
    inner = s["n_inner"] or 4 * width

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


def _llama_layout(s: Settings) -> dict[str, Any]:
    variant = LLAMA_VARIANTS[s["model_type"]]
    width = s["hidden_size"]
    head_dim = head_dim_of(s)
    inputs_bias, output_bias, mlp_bias = variant.biases(s)
    heads = s["num_attention_heads"] * head_dim
    groups = s["num_key_value_heads"] * head_dim

    def norm(*path, size=width):
        return {"scale": Leaf((*path, "weight"), (size,))}

    def dense(inputs, outputs, bias, *path):
        kernel = {"kernel": Leaf((*path, "kernel"), (inputs, outputs))}
        return kernel | ({"bias": Leaf((*path, "bias"), (outputs,))} if bias else {})

    def layer(*path):
        attention = (*path, "self_attn")
        mlp = (*path, "mlp")
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
        if variant.head_norms:
            tree["query_norm"] = norm(*attention, "q_norm", size=head_dim)
            tree["key_norm"] = norm(*attention, "k_norm", size=head_dim)
        if variant.sandwich:
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
