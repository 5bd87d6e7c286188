"""What a reward function gets besides the data if its signature names it, as TRL passes it.

| parameter | what it is |
|---|---|
| `completion_ids` | the token ids of each completion, a list of B lists |
| `trainer_state` | a `TrainerState` |
| `log_metric` | a function (name, value): the mean of a step's values is logged under this name |
| `log_extra` | a function (column, values): B values, which go into the table of completions |

A function with `**columns` alone gets none of them. A column of the data, or an argument of the config, with
such a name wins.
"""

import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.rewards.reward import Reward, parameters_of

EXTRAS = ("completion_ids", "trainer_state", "log_metric", "log_extra")
_ROW_NAMES = ("step", "prompt", "completion", "reward", "advantage")  # columns that every table has


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """How far the training is, with TRL's names.

    Args:
        global_step: number of optimizer steps so far.
        max_steps: number of optimizer steps of the whole run.
        epoch: number of passes over the training prompts so far.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0


@dataclass(kw_only=True)
class Logged:
    """What reward functions have logged about one batch of B completions.

    Args:
        metrics: name -> the values of all calls.
        columns: column -> B values.
    """

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What the functions may be given for one batch, and where they log to.

    Args:
        completion_ids: token ids of the B completions. `None` means that they are unknown.
        trainer_state: how far the training is.
        logged: what the functions have logged so far.
    """

    completion_ids: Sequence[Sequence[int]] | None = None
    trainer_state: TrainerState = TrainerState()
    logged: Logged = field(default_factory=Logged)

    def alone(self, row: int) -> "Extras":
        """Returns the extras of one row, whose log nobody reads."""
        ids = None if self.completion_ids is None else self.completion_ids[row : row + 1]
        return Extras(completion_ids=ids, trainer_state=self.trainer_state)

    def arguments(self, reward: Reward, columns: Collection[str], size: int) -> dict[str, Any]:
        """Returns the keyword arguments that a function is called with for a batch.

        Args:
            reward: the reward function.
            columns: names of the columns of the data.
            size: B.
        """
        given: dict[str, Callable[[], Any]] = {
            "trainer_state": lambda: self.trainer_state,
            "log_metric": lambda: self._log_metric,
            "log_extra": lambda: self._log_extra(reward, size),
        }
        completion_ids = self.completion_ids
        if completion_ids is not None:
            given["completion_ids"] = lambda: [list(ids) for ids in completion_ids]
        return {name: given[name]() for name in wanted_extras(reward, columns) if name in given}

    def _log_metric(self, name: str, value: Any) -> None:
        number = float(np.asarray(value)) if is_number(value) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"log_metric: the name {name!r} is no text; call log_metric(name, value)")
        if number is None or not math.isfinite(number):
            raise ValueError(f"log_metric: {name} is {value!r:.80}, and it must be a finite number")
        self.logged.metrics.setdefault(name, []).append(number)

    def _log_extra(self, reward: Reward, size: int) -> Callable[[str, Sequence[Any]], None]:
        def log_extra(column: str, values: Sequence[Any]) -> None:
            if not isinstance(column, str) or column in _ROW_NAMES or column.startswith("rewards/"):
                raise ValueError(
                    f"log_extra: {column!r} cannot be a column of the table of completions, which has "
                    f"{', '.join(_ROW_NAMES)} already; give it another name"
                )
            values = list(values)
            if len(values) != size:
                raise ValueError(
                    f"log_extra: {len(values)} values of {column!r} for {size} completions; give one for each"
                )
            self.logged.columns[column] = [json_value(value) for value in values]

        return log_extra


def wanted_extras(reward: Reward, columns: Collection[str]) -> list[str]:
    """Returns the extras that a function names and that neither the data nor its arguments have."""
    parameters, _ = parameters_of(reward)
    return [n for n in EXTRAS if n in parameters and n not in columns and n not in reward.arguments]


def json_value(value: Any) -> Any:
    """Returns a value that JSON can hold: itself, or a text that shows it."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(name): json_value(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(each) for each in value]
    return json_value(value.tolist()) if hasattr(value, "tolist") else repr(value)


def is_number(value: Any) -> bool:
    """Says whether a value is a number of Python, or a scalar of an array library."""
    if isinstance(value, numbers.Real):
        return True
    try:  # scalars of NumPy and JAX
        array = np.asarray(value)
    except Exception:  # whatever the foreign type raises, it is not a number
        return False
    return array.ndim == 0 and array.dtype.kind in "biuf"
