"""A reward of a run: a function with its weight and its arguments, and what its signature says."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.rewards.builtin import REWARDS
from grpo_jax.rewards.pool import RewardPool


class RewardError(ValueError):
    """A reward function failed or returned no valid rewards. The message names function and row."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One reward function of a run.

    Args:
        name: name that is unique in the run. Metrics are called `rewards/<name>/...`.
        function: f(prompts, completions, **columns) -> list of B numbers or None.
        weight: factor in the sum.
        arguments: fixed keyword arguments of the function.
        source: origin of the function, for messages.
        pool: processes that call the function with a timeout. None calls it in this process.
        one_of: columns of which the data must have at least one.
        check_row: function that raises ValueError with a reason if the columns of a row cannot be used. None
            means that every row is fine.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source: str = "built in"
    pool: RewardPool | None = None
    one_of: tuple[str, ...] = ()
    check_row: Callable[[Mapping[str, Any]], None] | None = None


def named(reward: Reward) -> str:
    return f"reward `{reward.name}` ({reward.source})"


def parameters_of(reward: Reward) -> tuple[dict[str, inspect.Parameter], bool]:
    """Returns (parameters by name, whether it takes any keyword)."""
    parameters = inspect.signature(reward.function).parameters.values()
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (
        {p.name: p for p in parameters if p.kind in keywords},
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
    )


def takes(reward: Reward, name: str) -> bool:
    """Says whether a function is called with a column. Keyword-only parameters of built-ins never are."""
    parameters, takes_any = parameters_of(reward)
    if name not in parameters:
        return takes_any
    is_argument = parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    return not (is_argument and reward.function in REWARDS.values())
