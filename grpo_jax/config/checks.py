"""Checks of what a user says: the ranges of single values, and conditions that join several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# names of settings, separated by spaces -> the condition on their values, in code, and in words that
# complete the sentence "it must be ..."
Ranges = Sequence[tuple[str, Callable[[Any], bool], str]]


def check_ranges(prefix: str, values: Mapping[str, Any], ranges: Ranges) -> None:
    """Checks values against a table. A value of None means that the setting is left out, and passes.

    Args:
        prefix: text before the names in the message, such as `training.`.
        values: values by name. Names that are not in the table are not looked at.
        ranges: the table.

    Raises:
        ValueError: the message names the setting, its value and the range.

    >>> check_ranges("training.", {"seed": -1}, [("seed", lambda x: x >= 0, "0 or more")])
    Traceback (most recent call last):
    ValueError: training.seed: -1; it must be 0 or more
    """
    for names, holds, wanted in ranges:
        for name in names.split():
            value = values[name]
            require(value is None or holds(value), f"{prefix}{name}: {value!r}; it must be {wanted}")


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
