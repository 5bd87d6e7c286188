"""Makes a `Policy` of a model object in memory, which is a `FlaxAutoModelForCausalLM` of transformers.

`train_step` makes one for a plain flax `TrainState`, whose `apply_fn` is `model.__call__`.
"""

import copy
import inspect
from typing import Any

import flax.linen
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from grpo_jax.models import flax_families
from grpo_jax.models.implementations import choose_implementation, load_implementation
from grpo_jax.types import Params, Policy

_POLICIES: dict[tuple, Policy] = {}  # (configuration, dtype) -> policy, so that nothing is compiled twice
_ADVICE = (
    "give the model or the `__call__` of a FlaxAutoModelForCausalLM; for any other model write a "
    "grpo_jax.Policy and make the state with grpo_jax.init_train_state(policy, params, optimizer)"
)


def policy_of(model: Any) -> Policy:
    """Makes the policy of a Flax language model of transformers, for `generate` and `completion_log_probs`.

    Its parameters are `model.params`, as they are. Dropout is off. Our own decoder computes it if it knows
    the model type, or else the class of transformers.

    Args:
        model: a `FlaxXxxForCausalLM` object, its bound `__call__`, its linen module or the bound `apply` of
            that module. A `Policy` is returned as it is.

    Returns:
        The policy. It computes in the dtype of the model, and its logits are float32. Models of the same
        configuration and dtype have the same policy.

    Raises:
        ValueError: it is no such model, or it would not be computed as PyTorch computes it.
    """
    if isinstance(model, Policy):
        return model
    module = _causal_module(model)
    config, dtype = module.config, jnp.dtype(module.dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"the model computes in {dtype}; load it with dtype=jnp.float32 or jnp.bfloat16")
    key = (type(config), config.to_json_string(), dtype)
    if key not in _POLICIES:
        config = copy.deepcopy(config)  # the caller's may change
        chosen = choose_implementation(config, "auto", source=f"this {type(module).__name__}")
        _POLICIES[key] = load_implementation(chosen).make_policy(config, dtype=module.dtype)
    return _POLICIES[key]


def check_params(model: Any, params: Params) -> None:
    """Raises unless parameters have the structure and the shapes of a Flax model's, see `policy_of`.

    Raises:
        ValueError: a parameter differs. The message names the first one.
    """
    if isinstance(model, Policy):
        return
    module = _causal_module(model)
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


def _causal_module(model: Any) -> flax.linen.Module:
    """Returns the linen module of a causal language model of transformers."""
    owner = model.__self__ if inspect.ismethod(model) else model
    module = flax_families.causal_module(owner)
    if module is None:
        name = model.__qualname__ if inspect.isroutine(model) else type(model).__name__
        raise ValueError(f"{name} is no causal Flax language model of transformers: {_ADVICE}")
    return module
