"""The built-in tasks, by name."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_jax.data.tasks.addition import make_addition
from grpo_jax.data.tasks.arithmetic import make_arithmetic
from grpo_jax.data.tasks.completion import COMPLETION
from grpo_jax.data.tasks.countdown import make_countdown
from grpo_jax.data.tasks.gsm8k import GSM8K
from grpo_jax.data.tasks.reasoning_gym import make_reasoning_gym
from grpo_jax.data.tasks.task import HubData, RowTask, Task, check_arguments
from grpo_jax.named_objects import find_object
from grpo_jax.rewards.reasoning_gym import PREFIX
from grpo_jax.spelling import nearest
from grpo_jax.types import Example

__all__ = [
    "ROW_TASKS",
    "TASKS",
    "HubData",
    "RowTask",
    "Task",
    "TaskMaker",
    "check_name",
    "find_task",
    "load_task",
    "make_task",
]

# These tasks make their own problems. Their keyword-only parameters are the task's arguments.
TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": make_arithmetic,
    "addition": make_addition,
    "countdown": make_countdown,
}
# These tasks read rows.
ROW_TASKS: dict[str, RowTask] = {task.name: task for task in (COMPLETION, GSM8K)}


def check_name(name: str) -> None:
    """Raises unless there is a task of that name.

    Raises:
        ValueError: there is none. The message lists the names and suggests the nearest.
    """
    known = [*TASKS, *ROW_TASKS]
    if name in known or name.startswith(PREFIX):
        return
    near = nearest(name, known, likeness=0.4)
    suggestion = f"; did you mean {near!r}?" if near else "."
    raise ValueError(
        f"data.task: {name!r} is not a built-in task{suggestion} "
        f"The tasks are: {', '.join(known)}, {PREFIX}<name>. For prompts of your own, give "
        "data.train_file."
    )


@dataclass(frozen=True)
class TaskMaker:
    """A task that makes its own problems, before it has made them.

    Args:
        name: name of the task in messages.
        make: function of the task's arguments that returns the task.
    """

    name: str
    make: Callable[[Mapping[str, Any]], Task]


def find_task(named: Any) -> RowTask | TaskMaker:
    """Finds the task that a config names.

    Args:
        named: name of a built-in task, `package.module:name`, `path/file.py:name`, or such an object itself:
            a function that returns a `Task` and whose keyword-only parameters are the task's arguments, or a
            `Task`, or a `RowTask`.

    Raises:
        ValueError: there is no such task, or it is something else.
    """
    name = named
    found = named
    place = ""
    if isinstance(named, str):
        if ":" not in named or named.startswith(PREFIX):
            check_name(named)
            if named in ROW_TASKS:
                return ROW_TASKS[named]
            return TaskMaker(named, functools.partial(load_task, named))
        _, found, line = find_object(named, kind="task", built_in=[*TASKS, *ROW_TASKS])
        place = f" at {line}"
    else:
        name = getattr(named, "__name__", None) or getattr(named, "name", None) or repr(named)
    if isinstance(found, RowTask):
        return found
    if isinstance(found, Task):
        return TaskMaker(name, lambda arguments: _without_arguments(found, name, arguments))
    if not callable(found) or inspect.isclass(found):
        raise ValueError(
            f"data.task: {name!r}{place} is {_kind(found)}, and it must be a function that returns a "
            "grpo_jax.data.Task, or such a Task"
        )

    def make(arguments: Mapping[str, Any]) -> Task:
        check_arguments(name, found, arguments)
        return found(**arguments)

    return TaskMaker(name, make)


def make_task(maker: TaskMaker, arguments: Mapping[str, Any]) -> Task:
    """Makes the problems of a task.

    Raises:
        ValueError: the task has no such arguments, or what it makes is no task with examples.
    """
    task = maker.make(arguments)
    if not isinstance(task, Task):
        raise ValueError(f"data.task: {maker.name} returns {_kind(task)}, and it must return a Task")
    if not len(task.train):
        raise ValueError(f"data.task: {maker.name} has no examples to train on")
    for example in (task.train[0], *task.evaluation[:1]):
        if not isinstance(example, Example):
            raise ValueError(f"data.task: {maker.name} has {_kind(example)} among its examples, no Example")
    return task


def _without_arguments(task: Task, name: str, arguments: Mapping[str, Any]) -> Task:
    if arguments:
        raise ValueError(f"data.task_arguments: {name} is a Task already and takes no {min(arguments)!r}")
    return task


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if inspect.isclass(value) else f"of type {type(value).__name__}"


def load_task(name: str, arguments: Mapping[str, Any] | None = None) -> Task:
    """Builds a task that makes its own problems.

    Args:
        name: a key of TASKS, or `reasoning_gym:<name>`.
        arguments: keyword arguments of the task.

    Raises:
        ValueError: there is no such task, or it has no such arguments.
        ImportError: reasoning-gym is missing.
    """
    check_name(name)
    arguments = arguments or {}
    if name.startswith(PREFIX):
        return make_reasoning_gym(name.removeprefix(PREFIX), arguments)
    if name in ROW_TASKS:
        raise ValueError(f"data.task: {name} reads rows; load it by `load_data`, from a file or a data set")
    check_arguments(name, TASKS[name], arguments)
    return TASKS[name](**arguments)
