"""The built-in tasks, by name."""

import difflib
from collections.abc import Callable

from grpo_jax.tasks.arithmetic import make_arithmetic
from grpo_jax.tasks.task import Example, Task

__all__ = ["TASKS", "Example", "Task", "load_task"]

TASKS: dict[str, Callable[[], Task]] = {"arithmetic": make_arithmetic}


def load_task(name: str) -> Task:
    """Builds a built-in task.

    Raises:
        ValueError: the name is not registered; the message lists the names and suggests the nearest.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
        suggestion = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(
            f"data.task: {name!r} is not a built-in task{suggestion} "
            f"The tasks are: {', '.join(sorted(TASKS))}. For prompts of your own, give data.train_file."
        )
    return TASKS[name]()
