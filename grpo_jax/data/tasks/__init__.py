"""The built-in tasks, by name."""

from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.data.tasks.addition import make_addition
from grpo_jax.data.tasks.arithmetic import make_arithmetic
from grpo_jax.data.tasks.completion import COMPLETION
from grpo_jax.data.tasks.countdown import make_countdown
from grpo_jax.data.tasks.gsm8k import GSM8K
from grpo_jax.data.tasks.reasoning_gym import make_reasoning_gym
from grpo_jax.data.tasks.task import HubData, RowTask, Task, check_arguments
from grpo_jax.rewards.reasoning_gym import PREFIX
from grpo_jax.spelling import nearest

__all__ = ["ROW_TASKS", "TASKS", "HubData", "RowTask", "Task", "check_name", "load_task"]

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
