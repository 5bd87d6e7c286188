"""An optimizer of the user's own, which a config names or a Python program gives."""

import inspect
from typing import Any

import optax

from grpo_jax.config.in_memory import label_of
from grpo_jax.error_text import one_line
from grpo_jax.named_objects import find_object

_WANTED = (
    "it must be an optax optimizer, or a function of the learning rate that returns one, such as optax.lion"
)


def own_optimizer(named: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer that `training.optimizer` stands for.

    Args:
        named: `package.module:name`, `path/file.py:name`, an optax optimizer, or a function.
        schedule: learning rate of each step, which a function is called with.

    Raises:
        ValueError: it cannot be loaded, or it is no optimizer.
    """
    label = label_of(named)
    found = _find(named)
    if is_optimizer(found):
        return found
    if not callable(found):
        raise ValueError(f"training.optimizer: {label} is of type {type(found).__name__}; {_WANTED}")
    try:
        made = found(schedule)
    except Exception as error:  # whatever somebody's function raises
        raise ValueError(f"training.optimizer: {label} raised {one_line(repr(error))}; {_WANTED}") from error
    if not is_optimizer(made):
        raise ValueError(f"training.optimizer: {label} returned a {type(made).__name__}; {_WANTED}")
    return made


def takes_schedule(named: Any) -> bool:
    """Says whether the learning rate of the config has a part in the optimizer. `None` means AdamW."""
    return named is None or not is_optimizer(_find(named))


def is_optimizer(value: Any) -> bool:
    """Says whether a value is an optimizer of optax: it has functions `init` and `update`."""
    functions = (getattr(value, name, None) for name in ("init", "update"))
    return not inspect.isclass(value) and all(map(callable, functions))


def _find(named: Any) -> Any:
    return find_object(named, kind="optimizer")[1] if isinstance(named, str) else named
