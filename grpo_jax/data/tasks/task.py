"""What a task is: examples to train on, examples held out, and the rewards that go with them."""

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.spelling import nearest
from grpo_jax.types import Example


@dataclass(frozen=True)
class Task:
    """Prompts to learn from, held-out prompts to measure on, and the default rewards.

    Args:
        name: the task's name in the registry, or the stem of the training file.
        train: examples of the optimizer steps.
        evaluation: held-out examples; may be empty.
        rewards: names of the reward functions used when the configuration names none.
        reward_arguments: keyword arguments of these functions, by name.
        notes: what the user should know about the data before the first step, a line each.
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
        name: in the registry.
        make_rows: (row, **arguments) -> rows with `prompt`; raises ValueError for a row that is none of the
            task's. Its keyword-only parameters are the task's arguments.
        rewards: as in Task.
        hub: read when the configuration names no file and no data set; None: it has to.
        eval_fraction: share of the prompts held out when the configuration says nothing about it.
    """

    name: str
    make_rows: Callable[..., Iterable[dict[str, Any]]]
    rewards: tuple[str, ...]
    hub: HubData | None
    eval_fraction: float


def check_arguments(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Checks arguments against the keyword-only parameters of a task's function, names and types.

    Args:
        name: of the task, for messages.
        function: makes the task.
        arguments: given by the user.

    Raises:
        ValueError: an argument that is none (the message suggests the nearest), or of another type.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    types = typing.get_type_hints(function)
    for argument, value in arguments.items():
        if argument not in known:
            near = nearest(argument, known, likeness=0.5)
            hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise ValueError(f"data.task_arguments: {name} has no argument {argument!r}; {hint}")
        if type(value) is not types[argument]:
            raise ValueError(
                f"data.task_arguments: {argument} of {name} is of type {types[argument].__name__}, "
                f"not {value!r}"
            )


def require(condition: bool, message: str) -> None:
    """Raises unless an argument of a task has a value that makes sense."""
    if not condition:
        raise ValueError(f"data.task_arguments: {message}")
