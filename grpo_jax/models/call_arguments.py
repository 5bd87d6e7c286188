"""How a model that somebody wrote is called: what its parameters' names say of them."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from grpo_jax.policy.from_apply import MASK_NAMES, POSITION_NAMES, WRAPPED

# What a model does while it is trained otherwise: dropout, statistics of batches. A policy does neither.
_SWITCHES = {
    "deterministic": True,
    "train": False,
    "training": False,
    "is_training": False,
    "enable_dropout": False,
    "decode": False,
}
# (tokens, mask, positions) -> keyword arguments of the model. The tokens are its first, positional argument.
Arguments = Callable[[Array, Array], dict[str, Any]]


def arguments_of(call: Callable, name: str) -> Arguments:
    """Reads from the signature of a model how its mask and its positions are handed to it.

    The first parameter is the tokens, whatever its name. `mask` and `input_mask` get a bool mask,
    `attention_mask` gets int32 as in transformers, and `positions`, `position_ids`, `pos` and their like get
    the positions. `deterministic` is True, and `train` and its like are False. A parameter that is not named
    keeps its default.

    Args:
        call: the bound `__call__` of the model.
        name: name of the model in messages.

    Returns:
        A function (mask [B,L], positions [B,L]) -> keyword arguments.

    Raises:
        ValueError: a parameter is required and its name says nothing, or two say the same.
    """
    signature = inspect.signature(call)
    parameters = list(signature.parameters.values())
    first = parameters[0] if parameters else None
    others = parameters[1:]
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise ValueError(f"{name}{signature} has no first argument for the tokens; write {WRAPPED}")
    if first.name in (*MASK_NAMES, *POSITION_NAMES, *_SWITCHES):
        raise ValueError(f"{name}{signature} takes {first.name} before the tokens; write {WRAPPED}")
    masks = _only([p.name for p in others if p.name in MASK_NAMES], name, signature)
    positions = _only([p.name for p in others if p.name in POSITION_NAMES], name, signature)
    switches = {p.name: _SWITCHES[p.name] for p in others if p.name in _SWITCHES}
    for parameter in others:
        known = parameter.name in {*masks, *positions, *switches}
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind == parameter.POSITIONAL_ONLY and (known or parameter.default is parameter.empty):
            raise ValueError(f"{name}{signature} takes {parameter.name} only by its place; write {WRAPPED}")
        if not known and parameter.default is parameter.empty:
            raise ValueError(
                f"{name}{signature} requires {parameter.name}, and its name does not say what that is; write "
                f"{WRAPPED}"
            )

    def arguments(mask: Array, places: Array) -> dict[str, Any]:
        as_given = {key: mask.astype(jnp.int32) if key == "attention_mask" else mask for key in masks}
        return as_given | dict.fromkeys(positions, places) | switches

    return arguments


def _only(names: list[str], model: str, signature: inspect.Signature) -> list[str]:
    if len(names) > 1:
        raise ValueError(f"{model}{signature} has both {names[0]} and {names[1]}; write {WRAPPED}")
    return names


def takes_apply_arguments(function: Any) -> bool:
    """Says whether a function's parameters are those of `policy_from_apply`, by their names.

    The first two may have any name. The third and the fourth are a mask and positions, and no further one is
    required.
    """
    try:
        _, _, mask, positions, *rest = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [p for p in rest if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return mask.name in MASK_NAMES and positions.name in POSITION_NAMES and not required


def logits_of(outputs: Any) -> Any:
    """Returns the logits of what a model returns, which may be a record with a field of that name."""
    return getattr(outputs, "logits", outputs)
