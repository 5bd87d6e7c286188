"""Objects of a Python program in the places of a config where a file has names.

A reward function, a task, a recipe, an optimizer and a tracker may be given as themselves. In config.yaml and
in everything else that is written down, a text stands for each.
"""

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from grpo_jax.named_objects import IN_PYTHON


def label_of(value: Any) -> str:
    """Returns the text that stands for an object: `module:name` if that imports it, or `python:name`.

    >>> import math
    >>> label_of(math.floor), label_of(lambda x: x)
    ('math:floor', 'python:<lambda>')
    """
    if isinstance(value, str):
        return value
    name = next(
        (n for n in (getattr(value, key, None) for key in ("__name__", "name")) if isinstance(n, str)),
        type(value).__name__,
    )
    module = getattr(value, "__module__", None)
    found = getattr(sys.modules.get(module or ""), name, None)
    return f"{module if found is value and module != '__main__' else IN_PYTHON}:{name}"


def is_setting(value: Any) -> bool:
    """Says whether a value is one that a config file can hold."""
    if type(value) in (list, tuple):
        return all(map(is_setting, value))
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and is_setting(each) for name, each in value.items())
    return value is None or isinstance(value, (str, bool, int, float))


def is_section(value: Any) -> bool:
    """Says whether a value is a record of the configuration."""
    is_ours = type(value).__module__.startswith("grpo_jax.config.")
    return is_ours and is_dataclass(value) and not isinstance(value, type)


def plain_settings(value: Any) -> Any:
    """Returns a config, or a part of it, as nested dicts and lists with a text for each object."""
    if is_section(value):
        return {field.name: plain_settings(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: plain_settings(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_settings(each) for each in value)
    return value if is_setting(value) else label_of(value)
