"""Model families whose Flax class in transformers is adapted to `Policy`.

The modules are those of `FlaxAutoModelForCausalLM`, and parameters keep its pytree. Every family here agrees
with PyTorch transformers on the checkpoints under tests/fixtures/models. The types that our own decoder
computes are in `decoder_families`. This is the one module that needs the Flax classes, which transformers 5
does not have. Import it only when it is wanted, see `implementations.load_implementation`.
"""

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import transformers
from jax import Array

from grpo_jax.models.flax_configs import FAMILIES
from grpo_jax.models.interface import HFConfig, Problems
from grpo_jax.types import Cache, Params, Policy

try:
    from transformers import (
        FLAX_MODEL_FOR_CAUSAL_LM_MAPPING,
        FLAX_MODEL_MAPPING,
        FlaxPreTrainedModel,
    )
    from transformers.modeling_flax_utils import ACT2FN
except ImportError:
    raise ImportError(
        f"transformers {transformers.__version__} has no Flax models: pip install 'transformers>=4.57,<5'"
    ) from None


def problems(config: HFConfig) -> Problems:
    """Yields every reason why the Flax class would not compute what PyTorch computes."""
    if config.model_type not in FAMILIES:
        yield f"there is no Flax class for {config.model_type} here; there are {', '.join(FAMILIES)}"
        return
    raw = config.to_dict()
    yield from _common_problems(config, raw)
    yield from FAMILIES[config.model_type].problems(config, raw)


def _common_problems(config: HFConfig, raw: dict) -> Problems:
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


def max_positions(config: HFConfig) -> int | None:
    """Returns the longest length (padding included) that the model computes correctly, None without limit."""
    if config.model_type == "bloom":
        return None
    limit = config.max_position_embeddings
    if config.model_type == "mistral" and config.sliding_window is not None:
        # Flax attends to one key more than PyTorch once the window binds, so it must never bind.
        limit = min(limit, config.sliding_window)
    return limit


def _module_config(config: HFConfig, length: int) -> HFConfig:
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


def _inputs(config: HFConfig, tokens: Array, mask: Array, positions: Array) -> dict[str, Any]:
    """Returns the keyword arguments of a module call. Dropout is always off."""
    inputs = {"input_ids": tokens, "attention_mask": mask.astype(jnp.int32)}
    if FAMILIES[config.model_type].takes_positions:
        # A pad has position cumsum(mask) - 1 = -1. Nothing depends on it, but it must index the table.
        inputs["position_ids"] = jnp.maximum(positions, 0)
    return inputs | {"deterministic": True, "return_dict": False}


def param_shapes(config: HFConfig) -> Params:
    """Returns the pytree of `FlaxXxxForCausalLM`'s parameters, as shapes."""
    module = FLAX_MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].module_class(_module_config(config, 1))
    one = jnp.ones((1, 1), jnp.int32)
    return jax.eval_shape(lambda: module.init(jax.random.key(0), **_inputs(config, one, one, one)))["params"]


def causal_module(model: Any) -> Any | None:
    """Returns the linen module of a `FlaxXxxForCausalLM`, given either of them, or None for anything else."""
    module = model.module if isinstance(model, FlaxPreTrainedModel) else model
    classes = [model_class.module_class for model_class in FLAX_MODEL_FOR_CAUSAL_LM_MAPPING.values()]
    return module if type(module) in classes else None


def embedding_path(config: HFConfig) -> tuple[str, ...]:
    """Returns the path of the token embedding. Its first part is the base model's."""
    return FAMILIES[config.model_type].embedding


def buffers(config: HFConfig) -> tuple[str, ...]:
    """Returns patterns of tensors in PyTorch files that are constants, not parameters."""
    return FAMILIES[config.model_type].buffers


def make_policy(config: HFConfig, *, dtype: Any, remat: str = "none", attention: str = "shared") -> Policy:
    """Adapts a family to `Policy`.

    Args:
        config: a configuration without `problems`.
        dtype: compute dtype, jnp.float32 or jnp.bfloat16. Logits are float32 either way.
        remat: the word `none`. These classes keep everything for the backward pass.
        attention: the word `shared`. These classes have their own attention.

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
    model = _FlaxModel(config, dtype)
    return Policy(forward=model.forward, unembed=model.unembed, init_cache=model.init_cache)


class _FlaxModel:
    """Functions of a `Policy` that a Flax class of transformers computes."""

    def __init__(self, config: HFConfig, dtype: Any):
        self.config = config
        self.dtype = dtype
        self.embedding = FAMILIES[config.model_type].embedding
        self.base = self.embedding[0]
        self.shapes = param_shapes(config)
        self.module = functools.lru_cache(self._make_module)

    def _make_module(self, length: int) -> Any:
        limit = max_positions(self.config)
        if limit is not None and length > limit:
            raise ValueError(
                f"a sequence of {length} tokens (prompt with padding + completion) is over the model's "
                f"{limit} positions"
            )
        module_class = FLAX_MODEL_MAPPING[type(self.config)].module_class
        return module_class(_module_config(self.config, length), dtype=self.dtype)

    def forward(
        self,
        params: Params,
        tokens: Array,
        mask: Array,
        positions: Array,
        cache: Cache = None,
        *,
        num_tokens: int | None = None,
    ) -> tuple[Array, Cache]:
        del num_tokens  # these classes know rows only
        variables = {"params": params[self.base]}
        inputs = _inputs(self.config, tokens, mask, positions)
        length = mask.shape[1]
        slots = {leaf.shape[1] for leaf in jax.tree.leaves(cache) if leaf.ndim > 1} or {tokens.shape[1]}
        if slots != {length}:
            raise ValueError(f"the mask covers {length} tokens, tokens and cache have room for {slots.pop()}")
        module = self.module(length)
        if cache is None:
            return module.apply(variables, **inputs)[0], None
        outputs, updates = module.apply(variables | {"cache": cache}, **inputs, mutable=["cache"])
        return outputs[0], updates["cache"]

    def unembed(self, params: Params, hidden: Array) -> Array:
        if self.config.tie_word_embeddings:
            kernel = functools.reduce(lambda tree, key: tree[key], self.embedding, params)
            axis = 1
            bias = 0.0
        else:
            kernel = params["lm_head"]["kernel"]
            axis = 0
            bias = params["lm_head"].get("bias", 0.0)
        # Operands have the compute dtype and sums are float32. bfloat16 logits would cost 0.1 nats.
        contract = (((hidden.ndim - 1,), (axis,)), ((), ()))
        return bias + jax.lax.dot_general(
            hidden.astype(self.dtype),
            kernel.astype(self.dtype),
            contract,
            preferred_element_type=jnp.float32,
        )

    def init_cache(self, batch: int, max_length: int) -> Cache:
        def trace(params):
            ones = jnp.ones((batch, max_length), jnp.int32)
            inputs = _inputs(self.config, ones, ones, ones)
            module = self.module(max_length)
            return module.apply({"params": params}, **inputs, init_cache=True, mutable=["cache"])

        # The cache is traced and never computed, so making it costs no forward pass.
        cache = jax.eval_shape(trace, self.shapes[self.base])[1]["cache"]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)
