"""Checks of what a user says: the ranges of single values, and conditions that join several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# names of settings, separated by spaces -> the condition on their values, in code, and in words that
# complete the sentence "it must be ..."
Ranges = Sequence[tuple[str, Callable[[Any], bool], str]]


class Problems(ValueError):
    """Several things that are wrong with what a user gave, each in a line of its own.

    Args:
        lines: what is wrong, two lines or more.
        hint: a line at the end, if there is more to say.
    """

    def __init__(self, lines: Sequence[str], *, hint: str | None = None):
        self.lines = tuple(lines)
        hints = [] if hint is None else [hint]
        super().__init__("\n  ".join([f"{len(self.lines)} problems with the config:", *self.lines, *hints]))


def problem_lines(error: ValueError) -> tuple[str, ...]:
    """Returns what an error says, one line for each problem."""
    return error.lines if isinstance(error, Problems) else (str(error),)


def as_error(lines: Sequence[str], *, hint: str | None = None) -> ValueError:
    """Returns a plain ValueError for one line, and `Problems` for more."""
    return ValueError(lines[0]) if len(lines) == 1 else Problems(lines, hint=hint)


def check_ranges(prefix: str, values: Mapping[str, Any], ranges: Ranges) -> None:
    """Checks values against a table. A value of None means that the setting is left out, and passes.

    Args:
        prefix: text before the names in the message, such as `training.`.
        values: values by name. Names that are not in the table are not looked at.
        ranges: the table.

    Raises:
        ValueError: the message names the setting, its value and the range. With several such values it is a
            `Problems`.

    >>> check_ranges("training.", {"seed": -1}, [("seed", lambda x: x >= 0, "0 or more")])
    Traceback (most recent call last):
    ValueError: training.seed: -1; it must be 0 or more
    """
    found = []
    for names, holds, wanted in ranges:
        for name in names.split():
            value = values[name]
            if value is not None and not holds(value):
                found.append(f"{prefix}{name}: {value!r}; it must be {wanted}")
    if found:
        raise as_error(found)


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
