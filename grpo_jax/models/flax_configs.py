"""The model types that the Flax classes of transformers compute, and what each class gets wrong.

Several of these classes ignore parts of their configuration and would silently compute a different model.
`Family.problems` finds such a configuration. Nothing here needs Flax. `flax_families` adapts the classes.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from grpo_jax.models.interface import HFConfig, Problems

# The two spellings of the tanh approximation.
_TANH_GELU = {"gelu_new", "gelu_pytorch_tanh"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model type differs from the others.

    Args:
        embedding: path of the token embedding in the parameters. Its first part is the base model's.
        problems: function that yields why a configuration (object, the same as a dict) is refused.
        activation: config field that names the activation, or None if the family has only one.
        takes_positions: whether positions are an input. With ALiBi they come from the mask instead.
        computed_tables: whether position tables are computed, so that they may be truncated to the length in
            use.
        buffers: patterns of tensors in PyTorch files that are constants, not parameters.
    """

    embedding: tuple[str, ...]
    problems: Callable[[HFConfig, dict], Problems] = lambda config, raw: iter(())
    activation: str | None = "activation_function"
    takes_positions: bool = True
    computed_tables: bool = False
    buffers: tuple[str, ...] = ()


def _gpt2(config: HFConfig, raw: dict) -> Problems:
    if not config.scale_attn_weights:
        yield "scale_attn_weights=false is ignored by the Flax class"
    if config.scale_attn_by_inverse_layer_idx:
        yield "scale_attn_by_inverse_layer_idx=true is ignored by the Flax class"


def _gptj(config: HFConfig, raw: dict) -> Problems:
    head_dim = config.hidden_size // config.num_attention_heads
    rotary = config.rotary_dim
    if rotary is None or rotary % 2 or rotary > head_dim:
        yield f"rotary_dim={rotary}; it must be even and at most the head width {head_dim}"
    if config.tie_word_embeddings:
        yield "tie_word_embeddings=true drops the head's bias in the Flax class"


def _opt(config: HFConfig, raw: dict) -> Problems:
    if not config.enable_bias:
        yield "enable_bias=false is ignored by the Flax class"
    if not config.layer_norm_elementwise_affine:
        yield "layer_norm_elementwise_affine=false is ignored by the Flax class"


def _bloom(config: HFConfig, raw: dict) -> Problems:
    if not math.log2(config.n_head).is_integer():
        yield f"n_head={config.n_head}: the Flax class builds ALiBi only for a power of two"


def _xglm(config: HFConfig, raw: dict) -> Problems:
    if config.pad_token_id is not None and config.pad_token_id >= 2:
        yield (
            f"pad_token_id={config.pad_token_id}: PyTorch zeroes the embedding of position "
            f"{config.pad_token_id - 2} then, and the Flax class does not"
        )
    if config.hidden_size % 2 or config.hidden_size < 4:
        yield f"d_model={config.hidden_size}: the sinusoidal positions need an even width of at least 4"


def _rope(config: HFConfig, raw: dict) -> Problems:
    if config.rope_theta != 10000:
        yield f"rope_theta={config.rope_theta} is ignored by the Flax class, which always uses 10000"
    rope = raw.get("rope_scaling") or {}
    if any(name not in ("rope_type", "type") or value != "default" for name, value in rope.items()):
        yield f"rope_scaling={rope} is ignored by the Flax class"
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={raw['partial_rotary_factor']} is ignored by the Flax class"
    if config.num_attention_heads % config.num_key_value_heads:
        yield (
            f"{config.num_attention_heads} heads do not divide into {config.num_key_value_heads} key-value "
            "heads"
        )


def _llama(config: HFConfig, raw: dict) -> Problems:
    yield from _rope(config, raw)
    width = config.hidden_size // config.num_attention_heads
    if raw.get("head_dim") not in (None, width):
        yield f"head_dim={raw['head_dim']} is ignored by the Flax class, which uses {width}"
    if config.tie_word_embeddings:
        yield "tie_word_embeddings=true: the Flax class leaves a tied head at random values"
    if raw.get("mlp_bias"):
        yield "mlp_bias=true is ignored by the Flax class"


def _mistral(config: HFConfig, raw: dict) -> Problems:
    yield from _llama(config, raw)
    if raw.get("attention_bias"):
        yield "attention_bias=true is ignored by the Flax class"


def _gemma(config: HFConfig, raw: dict) -> Problems:
    yield from _rope(config, raw)
    # PyTorch reads hidden_act. Flax reads hidden_activation, where None means the tanh approximation.
    flax_act = config.hidden_activation or "gelu_pytorch_tanh"
    torch_act = config.hidden_act
    if flax_act != torch_act and not {flax_act, torch_act} <= _TANH_GELU:
        yield (
            f"PyTorch would use hidden_act={torch_act!r}, Flax hidden_activation={config.hidden_activation!r}"
            " (null is the tanh approximation): set both to the one you mean"
        )
    if raw.get("use_bidirectional_attention"):
        yield "use_bidirectional_attention=true is ignored by the Flax class"


_rotary = functools.partial(
    Family,
    embedding=("model", "embed_tokens", "embedding"),
    activation="hidden_act",
    computed_tables=True,
    buffers=(r"\.rotary_emb\.inv_freq$",),
)
_gpt = functools.partial(
    Family,
    embedding=("transformer", "wte", "embedding"),
    buffers=(r"\.attn\.(masked_)?bias$", r"\.attn\.attention\.(masked_)?bias$"),
)
FAMILIES: dict[str, Family] = {
    "gpt2": _gpt(problems=_gpt2),
    "gpt_neo": _gpt(),
    "gptj": _gpt(problems=_gptj, computed_tables=True),
    "opt": Family(embedding=("model", "decoder", "embed_tokens", "embedding"), problems=_opt),
    "bloom": Family(
        embedding=("transformer", "word_embeddings", "embedding"),
        problems=_bloom,
        activation=None,
        takes_positions=False,
    ),
    "xglm": Family(
        embedding=("model", "embed_tokens", "embedding"),
        problems=_xglm,
        buffers=(r"(^|\.)embed_positions\.weights$",),
    ),
    "gemma": _rotary(problems=_gemma),
    "llama": _rotary(problems=_llama),
    "mistral": _rotary(problems=_mistral),
}
