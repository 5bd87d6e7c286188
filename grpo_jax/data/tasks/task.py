"""A task: examples to train on, held-out examples, and the rewards that go with them."""

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.config.checks import Ranges, check_ranges
from grpo_jax.spelling import suggest
from grpo_jax.types import Example


@dataclass(frozen=True)
class Task:
    """Prompts to train on, held-out prompts to evaluate on, and the default rewards.

    Args:
        name: name of the task in the registry, or the stem of the training file.
        train: examples to train on.
        evaluation: held-out examples. There may be none.
        rewards: names of the reward functions that are used when the configuration names none.
        reward_arguments: keyword arguments of these functions, by the function's name.
        notes: lines about the data that the user should read before the first step.
    """

    name: str
    train: Sequence[Example]
    evaluation: Sequence[Example]
    rewards: tuple[str, ...]
    reward_arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A data set of the hub and the parts of it that a task uses."""

    dataset: str
    config: str | None
    train_split: str
    eval_split: str


@dataclass(frozen=True, kw_only=True)
class RowTask:
    """A task whose problems are rows of a file or a data set.

    Args:
        name: name of the task in the registry.
        make_rows: (row, **arguments) -> rows with `prompt`. It raises ValueError for a row that does not fit
            the task. Its keyword-only parameters are the task's arguments.
        rewards: names of the default reward functions, as in Task.
        hub: data set to read when the configuration names none. None makes a file or data set mandatory.
        eval_fraction: share of the prompts that is held out when the configuration does not say which.
    """

    name: str
    make_rows: Callable[..., Iterable[dict[str, Any]]]
    rewards: tuple[str, ...]
    hub: HubData | None
    eval_fraction: float


def check_arguments(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Checks arguments against the keyword-only parameters of a task's function, names and types.

    Args:
        name: name of the task, for messages.
        function: function that makes the task.
        arguments: arguments that the user gives.

    Raises:
        ValueError: an argument is unknown (the message suggests the nearest), or has another type.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    types = typing.get_type_hints(function)
    for argument, value in arguments.items():
        if argument not in known:
            otherwise = f"it takes {', '.join(known) or 'none'}"
            hint = suggest(argument, known, otherwise, likeness=0.5, quote="'")
            raise ValueError(f"data.task_arguments: {name} has no argument {argument!r}; {hint}")
        if type(value) is not types[argument]:
            raise ValueError(
                f"data.task_arguments: {argument} of {name} is of type {types[argument].__name__}, "
                f"not {value!r}"
            )


def check_argument_ranges(arguments: Mapping[str, Any], ranges: Ranges) -> None:
    """Checks the arguments of a task against a table, see `check_ranges`."""
    check_ranges("data.task_arguments: ", arguments, ranges)
