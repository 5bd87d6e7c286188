"""Makes a `Policy` of a module that somebody wrote, in flax.linen or in flax.nnx, which has no cache."""

from collections.abc import Mapping
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from grpo_jax.models.call_arguments import arguments_of, logits_of
from grpo_jax.policy.from_apply import WRAPPED, policy_from_apply
from grpo_jax.types import Params, Policy

_POLICIES: dict[Any, Policy] = {}  # what is called -> its policy, so that nothing is compiled twice


def linen_policy(module: flax.linen.Module) -> Policy:
    """Makes the policy of a linen module, see `policy_of`.

    Its parameters are `variables["params"]` of `variables = module.init(...)`, or those variables as they are
    if they hold nothing else.

    Raises:
        ValueError: its arguments have names that say nothing, or its variables are more than parameters.
    """
    name = type(module).__name__
    try:
        key = (linen_policy, module)
        hash(key)
    except TypeError:  # a field is a list, for example
        key = (linen_policy, id(module))  # the policy keeps the module, so no other gets its id
    if key not in _POLICIES:
        arguments = arguments_of(module.__call__, name)

        def apply_fn(params: Params, tokens: Array, mask: Array, positions: Array) -> Array:
            variables = _variables(params, name)
            return logits_of(module.apply(variables, tokens, **arguments(mask, positions)))

        _POLICIES[key] = policy_from_apply(apply_fn)
    return _POLICIES[key]


def _variables(params: Params, name: str) -> Mapping[str, Any]:
    if not isinstance(params, Mapping) or "params" not in params:
        return {"params": params}
    others = sorted(set(params) - {"params"})
    if others:
        raise ValueError(
            f"the variables of {name} hold {', '.join(others)} beside params, and an optimizer would train "
            f"them too: give variables['params'], and put the others into {WRAPPED}"
        )
    return params


def nnx_policy(model: nnx.Module | nnx.GraphDef) -> Policy:
    """Makes the policy of an nnx module, or of its graphdef if it has nothing but parameters.

    Its parameters are `nnx.state(module, nnx.Param)`, or their pure dict. Everything else that the module
    holds becomes a constant of the policy. The module stays as it is, and the policy computes in the mode of
    `module.eval()`.

    Raises:
        ValueError: its arguments have names that say nothing, or the parameters are not those of the module,
            which shows when it is first traced.
    """
    if isinstance(model, nnx.GraphDef):
        graphdef = model
        wanted = None
        rest = ()
    else:
        arguments_of(model.__call__, type(model).__name__)  # its refusal should not wait for the first call
        graphdef, params, *rest = nnx.split(model, nnx.Param, ...)
        wanted = _shapes(params)
    constants = jax.tree.leaves(rest)
    key = (graphdef, *map(id, constants))  # the policy keeps the constants, so no others get their ids
    if key not in _POLICIES:

        def apply_fn(params: Params, tokens: Array, mask: Array, positions: Array) -> Array:
            if wanted is not None:
                _check_state(params, wanted)
            module = nnx.merge(graphdef, params, *rest)
            module.eval()
            arguments = arguments_of(module.__call__, type(module).__name__)
            return logits_of(module(tokens, **arguments(mask, positions)))

        _POLICIES[key] = policy_from_apply(apply_fn)
    return _POLICIES[key]


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a state or of a pure dict, by its dotted name."""
    flat = (
        nnx.to_flat_state(params) if isinstance(params, nnx.State) else nnx.to_flat_state(nnx.State(params))
    )
    return {".".join(map(str, path)): jnp.shape(jax.tree.leaves(leaf)[0]) for path, leaf in flat}


def _check_state(params: Params, wanted: dict[str, tuple[int, ...]]) -> None:
    found = _shapes(params)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"parameters of the nnx module: {name} is {found.get(name, 'missing')}, and "
                f"{wanted.get(name, 'not there')} in the module; give nnx.state(module, nnx.Param)"
            )
