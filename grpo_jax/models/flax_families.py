"""Model families whose Flax class in transformers is adapted to `Policy`, and reading config.json.

The modules are those of `FlaxAutoModelForCausalLM`, and parameters keep its pytree. Several of these classes
ignore parts of their configuration and would silently compute a different model. `problems` finds such a
configuration. Every family here agrees with PyTorch transformers on the checkpoints under
tests/fixtures/models. The types that our own decoder computes are in `decoder_families`.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from grpo_jax.models import decoder_families
from grpo_jax.types import Array, Cache, Params, Policy

try:
    from transformers import CONFIG_MAPPING, FLAX_MODEL_FOR_CAUSAL_LM_MAPPING, FLAX_MODEL_MAPPING
    from transformers.modeling_flax_utils import ACT2FN
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError:
    raise ImportError(
        f"transformers {transformers.__version__} has no Flax models: pip install 'transformers>=4.57,<5'"
    ) from None

Config = Any  # a transformers PretrainedConfig
Problems = Iterator[str]  # reasons why a configuration is refused

# Keys of config.json that begin with `_` and select no code.
HARMLESS_KEYS = {"_name_or_path", "_commit_hash", "_num_labels", "_attn_implementation_autoset"}

HARMLESS_KEYS_OF = {
    "opt": {"_remove_final_layer_norm"},  # both implementations know it (old fine-tuned checkpoints have it)
    "gemma3_text": {"_sliding_window_pattern"},  # transformers writes it, beside the layer_types made from it
}

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
    problems: Callable[[Config, dict], Problems] = lambda config, raw: iter(())
    activation: str | None = "activation_function"
    takes_positions: bool = True
    computed_tables: bool = False
    buffers: tuple[str, ...] = ()


def _gpt2(config: Config, raw: dict) -> Problems:
    if not config.scale_attn_weights:
        yield "scale_attn_weights=false is ignored by the Flax class"
    if config.scale_attn_by_inverse_layer_idx:
        yield "scale_attn_by_inverse_layer_idx=true is ignored by the Flax class"


def _gptj(config: Config, raw: dict) -> Problems:
    head_dim = config.hidden_size // config.num_attention_heads
    rotary = config.rotary_dim
    if rotary is None or rotary % 2 or rotary > head_dim:
        yield f"rotary_dim={rotary}; it must be even and at most the head width {head_dim}"
    if config.tie_word_embeddings:
        yield "tie_word_embeddings=true drops the head's bias in the Flax class"


def _opt(config: Config, raw: dict) -> Problems:
    if not config.enable_bias:
        yield "enable_bias=false is ignored by the Flax class"
    if not config.layer_norm_elementwise_affine:
        yield "layer_norm_elementwise_affine=false is ignored by the Flax class"


def _bloom(config: Config, raw: dict) -> Problems:
    if not math.log2(config.n_head).is_integer():
        yield f"n_head={config.n_head}: the Flax class builds ALiBi only for a power of two"


def _xglm(config: Config, raw: dict) -> Problems:
    if config.pad_token_id is not None and config.pad_token_id >= 2:
        yield (
            f"pad_token_id={config.pad_token_id}: PyTorch zeroes the embedding of position "
            f"{config.pad_token_id - 2} then, and the Flax class does not"
        )
    if config.hidden_size % 2 or config.hidden_size < 4:
        yield f"d_model={config.hidden_size}: the sinusoidal positions need an even width of at least 4"


def _rope(config: Config, raw: dict) -> Problems:
    if config.rope_theta != 10000:
        yield f"rope_theta={config.rope_theta} is ignored by the Flax class, which always uses 10000"
    rope = raw.get("rope_scaling") or {}
    if any(name not in ("rope_type", "type") or value != "default" for name, value in rope.items()):
        yield f"rope_scaling={rope} is ignored by the Flax class"
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={raw['partial_rotary_factor']} is ignored by the Flax class"
    if config.num_attention_heads % config.num_key_value_heads:
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        yield f"{heads} heads do not divide into {groups} key-value heads"


def _llama(config: Config, raw: dict) -> Problems:
    yield from _rope(config, raw)
    width = config.hidden_size // config.num_attention_heads
    if raw.get("head_dim") not in (None, width):
        yield f"head_dim={raw['head_dim']} is ignored by the Flax class, which uses {width}"
    if config.tie_word_embeddings:
        yield "tie_word_embeddings=true: the Flax class leaves a tied head at random values"
    if raw.get("mlp_bias"):
        yield "mlp_bias=true is ignored by the Flax class"


def _mistral(config: Config, raw: dict) -> Problems:
    yield from _llama(config, raw)
    if raw.get("attention_bias"):
        yield "attention_bias=true is ignored by the Flax class"


def _gemma(config: Config, raw: dict) -> Problems:
    yield from _rope(config, raw)
    # PyTorch reads hidden_act. Flax reads hidden_activation, where None means the tanh approximation.
    flax_act, torch_act = config.hidden_activation or "gelu_pytorch_tanh", config.hidden_act
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


def read_config(raw: dict, source: str) -> Config:
    """Builds the configuration object from the contents of config.json.

    Args:
        raw: config.json as a dict.
        source: name of the model in messages.

    Returns:
        the transformers configuration object.

    Raises:
        ValueError: it names remote code or an unknown model type, or is no configuration of its type.
    """
    if "auto_map" in raw:
        raise ValueError(
            f"{source}: config.json has `auto_map`, code from the model's author; it is never run"
        )
    model_type, supported = raw.get("model_type"), dict.fromkeys((*decoder_families.MODEL_TYPES, *FAMILIES))
    if isinstance(raw.get("text_config"), dict):
        text_type = raw["text_config"].get("model_type")
        raise ValueError(
            f"{source}: model type {model_type!r} wraps a text model ({text_type}) and others, such as one "
            "for images; save the text model alone, with what `text_config` holds as its config.json"
        )
    if model_type not in supported:
        raise ValueError(
            f"{source}: model type {model_type!r} is not supported; supported: {', '.join(supported)}"
        )
    harmless = HARMLESS_KEYS | HARMLESS_KEYS_OF.get(model_type, set())
    hidden_keys = sorted(key for key in raw if key.startswith("_") and key not in harmless)
    if hidden_keys:
        raise ValueError(
            f"{source}: config.json has {', '.join(hidden_keys)}; keys beginning with `_` can select other "
            "code than the family's own: remove them"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(_older_rope(raw))
    except Exception as error:  # whatever a configuration class raises
        raise ValueError(f"{source}: config.json is no {model_type} configuration: {error}") from None


def _older_rope(raw: dict) -> dict:
    """Spells `rope_parameters`, new in transformers 5, as `rope_theta` and `rope_scaling`.

    Gemma 3 has one entry for each type of layer. The local one was `rope_local_base_freq`.
    """
    if (rope := raw.get("rope_parameters")) is None:
        return raw
    local = {}
    if raw.get("model_type") == "gemma3_text":
        rope, local = _rope_of_layers(rope)
    if not {"rope_type", "rope_theta"} <= set(rope):
        raise ValueError(f"rope_parameters={rope}: only those of one kind for all layers are supported")
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": None} | local
    if scaling != {"rope_type": "default"}:
        older["rope_scaling"] = scaling
    if different := [key for key in older if raw.get(key, older[key]) != older[key]]:
        raise ValueError(f"{different[0]}={raw[different[0]]} contradicts rope_parameters={rope}")
    return {key: value for key, value in raw.items() if key != "rope_parameters"} | older


def _rope_of_layers(rope: dict) -> tuple[dict, dict]:
    """Returns (the parameters of full attention, what the others are called in older configurations)."""
    kinds = {"full_attention", "sliding_attention"}
    if set(rope) != kinds or not all(isinstance(part, dict) for part in rope.values()):
        return rope, {}
    sliding = dict(rope["sliding_attention"])
    local = {"rope_local_base_freq": sliding.pop("rope_theta", None)}
    if sliding != {"rope_type": "default"} or local["rope_local_base_freq"] is None:
        raise ValueError(
            f"rope_parameters.sliding_attention={rope['sliding_attention']}: only rope_type default, with a "
            "rope_theta, is supported there"
        )
    return rope["full_attention"], local


def problems(config: Config) -> Problems:
    """Yields every reason why the Flax class would not compute what PyTorch computes."""
    if config.model_type not in FAMILIES:
        yield f"there is no Flax class for {config.model_type} here; there are {', '.join(FAMILIES)}"
        return
    raw = config.to_dict()
    yield from _common_problems(config, raw)
    yield from FAMILIES[config.model_type].problems(config, raw)


def _common_problems(config: Config, raw: dict) -> Problems:
    if raw.get("quantization_config"):
        yield "quantization_config: quantized weights cannot be trained"
    if raw.get("add_cross_attention") or raw.get("is_encoder_decoder"):
        yield "it is one half of an encoder-decoder model"
    if raw.get("pruned_heads"):
        yield "pruned_heads is ignored by the Flax class"
    if config.model_type != "gemma" and config.hidden_size % config.num_attention_heads:
        yield f"width {config.hidden_size} does not divide into {config.num_attention_heads} heads"
    field = FAMILIES[config.model_type].activation
    if field is not None and config.to_dict()[field] not in ACT2FN:
        yield f"{field}={config.to_dict()[field]!r} does not exist in Flax; it has {', '.join(ACT2FN)}"


def max_positions(config: Config) -> int | None:
    """Returns the longest length (padding included) that the model computes correctly, None without limit."""
    if config.model_type == "bloom":
        return None
    limit = config.max_position_embeddings
    if config.model_type == "mistral" and config.sliding_window is not None:
        # Flax attends to one key more than PyTorch once the window binds, so it must never bind.
        limit = min(limit, config.sliding_window)
    return limit


def _module_config(config: Config, length: int) -> Config:
    """Returns the configuration for sequences of `length`.

    Rotary families build a table of sines and a causal mask of max_position_embeddings in every layer,
    on every trace. Only `length` of it is used.
    """
    if not FAMILIES[config.model_type].computed_tables:
        return config
    config = copy.copy(config)
    rows = max(length, min(config.max_position_embeddings, 2048))
    if config.model_type != "gptj":
        width = config.head_dim or config.hidden_size // config.num_attention_heads
        rows = max(rows, 2 * width)  # these classes truncate the table's width to its number of rows
    config.max_position_embeddings = rows
    if config.model_type == "mistral":
        config.sliding_window = rows  # None leaves only the diagonal of the Flax mask
    if config.model_type == "gemma":
        config.hidden_activation = config.hidden_act  # they agree; None logs a warning
    return config


def _inputs(config: Config, tokens: Array, mask: Array, positions: Array) -> dict[str, Any]:
    """Returns the keyword arguments of a module call. Dropout is always off."""
    inputs = {"input_ids": tokens, "attention_mask": mask.astype(jnp.int32)}
    if FAMILIES[config.model_type].takes_positions:
        # A pad has position cumsum(mask) - 1 = -1. Nothing depends on it, but it must index the table.
        inputs["position_ids"] = jnp.maximum(positions, 0)
    return inputs | {"deterministic": True, "return_dict": False}


def param_shapes(config: Config) -> Params:
    """Returns the pytree of `FlaxXxxForCausalLM`'s parameters, as shapes."""
    module = FLAX_MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].module_class(_module_config(config, 1))
    one = jnp.ones((1, 1), jnp.int32)
    return jax.eval_shape(lambda: module.init(jax.random.key(0), **_inputs(config, one, one, one)))["params"]


def causal_module(model: Any) -> Any | None:
    """Returns the linen module of a `FlaxXxxForCausalLM`, given either of them, or None for anything else."""
    module = model.module if isinstance(model, transformers.FlaxPreTrainedModel) else model
    classes = [model_class.module_class for model_class in FLAX_MODEL_FOR_CAUSAL_LM_MAPPING.values()]
    return module if type(module) in classes else None


def torch_class_name(config: Config) -> str:
    """Returns the name of the PyTorch class of the same checkpoint."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]


def embedding_path(config: Config) -> tuple[str, ...]:
    """Returns the path of the token embedding. Its first part is the base model's."""
    return FAMILIES[config.model_type].embedding


def buffers(config: Config) -> tuple[str, ...]:
    """Returns patterns of tensors in PyTorch files that are constants, not parameters."""
    return FAMILIES[config.model_type].buffers


def make_policy(config: Config, *, dtype: Any, remat: str = "none", attention: str = "shared") -> Policy:
    """Adapts a family to `Policy`.

    Args:
        config: a configuration without `problems`.
        dtype: compute dtype, jnp.float32 or jnp.bfloat16. Logits are float32 either way.
        remat: `none`. These classes keep everything for the backward pass.
        attention: `shared`. These classes have their own attention.

    Returns:
        the policy. A length over `max_positions` is a ValueError when the function is traced.

    Raises:
        ValueError: remat or attention is another one.
    """
    if attention != "shared":
        raise ValueError(
            f"attention {attention!r} is for models that our own decoder computes, and {config.model_type} is"
            " not: leave model.attention at shared"
        )
    if remat != "none":
        raise ValueError(
            f"remat {remat!r} is for models that our own decoder computes, and {config.model_type} is not:"
            " leave model.remat at none, and raise training.num_microbatches to save memory"
        )
    family = FAMILIES[config.model_type]
    base, limit, shapes = family.embedding[0], max_positions(config), param_shapes(config)

    @functools.lru_cache
    def module(length: int):
        if limit is not None and length > limit:
            raise ValueError(
                f"a sequence of {length} tokens (prompt with padding + completion) is over the model's "
                f"{limit} positions"
            )
        return FLAX_MODEL_MAPPING[type(config)].module_class(_module_config(config, length), dtype=dtype)

    def forward(
        params: Params,
        tokens: Array,
        mask: Array,
        positions: Array,
        cache: Cache = None,
        *,
        num_tokens: int | None = None,
    ) -> tuple[Array, Cache]:
        del num_tokens  # these classes know rows only
        variables = {"params": params[base]}
        inputs = _inputs(config, tokens, mask, positions)
        length = mask.shape[1]
        slots = {leaf.shape[1] for leaf in jax.tree.leaves(cache) if leaf.ndim > 1} or {tokens.shape[1]}
        if slots != {length}:
            raise ValueError(f"the mask covers {length} tokens, tokens and cache have room for {slots.pop()}")
        if cache is None:
            return module(length).apply(variables, **inputs)[0], None
        outputs, updates = module(length).apply(variables | {"cache": cache}, **inputs, mutable=["cache"])
        return outputs[0], updates["cache"]

    def unembed(params: Params, hidden: Array) -> Array:
        if config.tie_word_embeddings:
            kernel, axis, bias = (
                functools.reduce(lambda tree, key: tree[key], family.embedding, params),
                1,
                0.0,
            )
        else:
            kernel, axis, bias = params["lm_head"]["kernel"], 0, params["lm_head"].get("bias", 0.0)
        # Operands have the compute dtype and sums are float32. bfloat16 logits would cost 0.1 nats.
        contract = (((hidden.ndim - 1,), (axis,)), ((), ()))
        return bias + jax.lax.dot_general(
            hidden.astype(dtype), kernel.astype(dtype), contract, preferred_element_type=jnp.float32
        )

    def init_cache(batch: int, max_length: int) -> Cache:
        def trace(params):
            ones = jnp.ones((batch, max_length), jnp.int32)
            inputs = _inputs(config, ones, ones, ones)
            return module(max_length).apply({"params": params}, **inputs, init_cache=True, mutable=["cache"])

        cache = jax.eval_shape(trace, shapes[base])[1]["cache"]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)

    return Policy(forward=forward, unembed=unembed, init_cache=init_cache)
