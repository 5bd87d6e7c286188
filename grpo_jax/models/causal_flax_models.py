"""Makes a `Policy` of a `FlaxAutoModelForCausalLM` of transformers that is in memory."""

import copy
from typing import Any

import flax.linen
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from grpo_jax.models import flax_families
from grpo_jax.models.implementations import choose_implementation, load_implementation
from grpo_jax.types import Params, Policy

_POLICIES: dict[tuple, Policy] = {}  # (configuration, dtype) -> policy, so that nothing is compiled twice


def causal_policy(model: Any) -> Policy | None:
    """Returns the policy of a causal Flax language model of transformers, or None for anything else.

    Args:
        model: the `FlaxXxxForCausalLM` object or its linen module.

    Raises:
        ValueError: the model would not be computed as PyTorch computes it.
    """
    module = flax_families.causal_module(model)
    if module is None:
        return None
    config = module.config
    dtype = jnp.dtype(module.dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"the model computes in {dtype}; load it with dtype=jnp.float32 or jnp.bfloat16")
    key = (type(config), config.to_json_string(), dtype)
    if key not in _POLICIES:
        config = copy.deepcopy(config)  # the caller's may change
        chosen = choose_implementation(config, "auto", source=f"this {type(module).__name__}")
        _POLICIES[key] = load_implementation(chosen).make_policy(config, dtype=module.dtype)
    return _POLICIES[key]


def check_causal_params(model: Any, params: Params) -> None:
    """Raises unless parameters have the structure and the shapes of those of the model of `causal_policy`.

    Raises:
        ValueError: a parameter differs. The message names the first one.
    """
    module = flax_families.causal_module(model)
    wanted = {path: leaf.shape for path, leaf in flatten_dict(_param_shapes(module)).items()}
    given = {path: jnp.shape(leaf) for path, leaf in flatten_dict(params).items()}
    for path in sorted(wanted.keys() | given.keys()):
        if wanted.get(path) != given.get(path):
            raise ValueError(
                f"params of the state: {'.'.join(path)} is {given.get(path, 'missing')}, and "
                f"{wanted.get(path, 'not there')} in the model; give params=model.params"
            )


def _param_shapes(module: flax.linen.Module) -> Params:
    chosen = choose_implementation(module.config, "auto", source=type(module).__name__)
    return load_implementation(chosen).param_shapes(module.config)
