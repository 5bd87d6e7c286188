"""Makes a `Policy` of any model in memory: of transformers, of flax.linen, of flax.nnx, or a bare function.

`train_step` makes one for a plain flax `TrainState`, whose `apply_fn` is `model.__call__`, `module.apply`, an
nnx module or such a function.
"""

import inspect
import os
from typing import Any

import flax.linen
from flax import nnx

from grpo_jax.models.call_arguments import takes_apply_arguments
from grpo_jax.models.own_modules import linen_policy, nnx_policy
from grpo_jax.policy.from_apply import policy_from_apply
from grpo_jax.types import Params, Policy

_ADVICE = (
    "give a FlaxAutoModelForCausalLM or its `__call__`, a flax.linen module or its `apply`, or a flax.nnx "
    "module; for any other model write policy = grpo_jax.policy_from_apply(lambda params, tokens, mask, "
    "positions: ...), whose function returns logits, and make the state with "
    "grpo_jax.init_train_state(policy, params, optimizer)"
)


def policy_of(model: Any) -> Policy:
    """Makes the policy of a causal language model, for `generate`, `completion_log_probs` and `train_step`.

    | model | params |
    |---|---|
    | `FlaxXxxForCausalLM` of transformers, its `__call__` or module | `model.params` |
    | flax.linen module, or its `apply` | `module.init(...)["params"]` |
    | flax.nnx module, or its graphdef | `nnx.state(module, nnx.Param)` |
    | function of (params, tokens, mask, positions) with these names | its own |

    A model of transformers is computed by our own decoder if that knows the model type, or else by the class
    of transformers, with a cache. Its logits are float32, and it computes in the dtype of the model.

    The others have no cache, so decoding is slow, see `policy_from_apply`. Such a module returns logits
    [B,L,V], or a record with a field `logits`, and is causal. The first argument of its `__call__` is the
    tokens [B,L]. Arguments called `mask`, `attention_mask`, `positions` or `position_ids` are given if there
    are any: real tokens come first in each row. Dropout is off.

    Args:
        model: the model. A `Policy` is returned as it is, and what `load_model` gives has one.

    Returns:
        The policy. Equal models have the same policy, so that nothing is compiled twice.

    Raises:
        ValueError: it is no such model, or a model of transformers that would not be computed as PyTorch
            computes it. The message says what to do.
    """
    if isinstance(model, Policy):
        return model
    if isinstance(policy := getattr(model, "policy", None), Policy):
        return policy
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        raise ValueError(f"{name!r} is a name and no model: give grpo_jax.models.load_model({name!r})")
    owner, method = _owner(model)
    if _is_of_transformers(owner):
        # It imports transformers, which other models do not need.
        from grpo_jax.models.causal_flax_models import causal_policy

        policy = causal_policy(owner)
        if policy is None:
            raise ValueError(f"{_name(model)} is no causal Flax language model of transformers: {_ADVICE}")
        return policy
    if isinstance(owner, flax.linen.Module) and method in (None, "apply", "__call__"):
        return linen_policy(owner)
    if isinstance(owner, nnx.Module | nnx.GraphDef) and method in (None, "apply", "__call__"):
        return nnx_policy(owner)
    if takes_apply_arguments(model):
        return policy_from_apply(model)
    raise ValueError(f"{_name(model)} is no model that grpo_jax knows: {_ADVICE}")


def check_params(model: Any, params: Params) -> None:
    """Raises unless parameters are those of a model of transformers, see `policy_of`.

    Other models say so themselves when they are first traced.

    Raises:
        ValueError: a parameter differs. The message names the first one.
    """
    owner, _ = _owner(model)
    if _is_of_transformers(owner):
        from grpo_jax.models.causal_flax_models import check_causal_params

        check_causal_params(owner, params)


def _owner(model: Any) -> tuple[Any, str | None]:
    """Returns the object that a bound method belongs to and the method's name, or (model, None)."""
    method = inspect.unwrap(model, stop=inspect.ismethod) if callable(model) else model  # jax.jit wraps
    return (method.__self__, method.__name__) if inspect.ismethod(method) else (model, None)


def _is_of_transformers(owner: Any) -> bool:
    """Says whether it is a Flax model or module of transformers, which need not be imported for that."""
    classes = [f"{cls.__module__}.{cls.__name__}" for cls in type(owner).__mro__]
    is_module = isinstance(owner, flax.linen.Module) and classes[0].startswith("transformers.")
    return is_module or any(name.endswith(".FlaxPreTrainedModel") for name in classes)


def _name(model: Any) -> str:
    return model.__qualname__ if inspect.isroutine(model) else type(model).__name__
