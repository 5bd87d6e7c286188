"""Templates that make a prompt from the columns of a row. They must not print null values."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

Template = jinja2.Template


class _NotPrintable(ValueError):
    """A template prints a value that is null or not a number."""


class _Missing:
    """A null in a row. It is false and equals None in a template, and is an error where it becomes text."""

    __module__ = "builtins"  # so that jinja2 calls it a "null object" in messages

    def __init__(self, path: str):
        self._path = path

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Missing)

    def __hash__(self) -> int:
        return hash(None)

    def _refuse(self, *_: object) -> NoReturn:
        raise _NotPrintable(f"prints `{self._path}`, which is null in this row")

    __str__ = __repr__ = __format__ = __add__ = __radd__ = _refuse


_Missing.__name__ = "null"


class _NotANumber(float):
    """A NaN in a row. It is an error where it becomes text."""

    path = ""

    def _refuse(self, *_: object) -> NoReturn:
        raise _NotPrintable(f"prints `{self.path}`, which is NaN (not a number) in this row")

    __str__ = __repr__ = __format__ = _refuse


def compile_template(source: str) -> Template:
    """Compiles the source of a template.

    Raises:
        ValueError: the source is broken.
    """
    # The sandbox keeps a template from the internet from reaching Python. An unknown name is an error.
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_finalize
    )
    environment.tests["none"] = lambda value: value is None or isinstance(value, _Missing)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False, "default": _to_json}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"data.prompt_template, line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise ValueError("data.prompt_template: its expressions are nested too deeply") from None


def render(template: Template, row: Mapping[str, Any]) -> str:
    """Returns the text that a template makes from a row.

    A null or NaN of the row, also inside a nested column, may be tested (`{% if hint %}`,
    `{{ hint or "" }}`, `hint is none`), but not printed.

    Args:
        template: template from `compile_template`.
        row: columns by name.

    Raises:
        ValueError: a name is not a column, a null is printed, or an expression raises an error.
    """
    try:
        return template.render({name: _guarded(value, name) for name, value in row.items()})
    except _NotPrintable as error:
        raise ValueError(
            f"data.prompt_template {error}; test it there, such as by {{% if ... %}}, or leave such rows out"
        ) from None
    except jinja2.UndefinedError as error:
        raise ValueError(
            f"data.prompt_template: {error.message}; the columns are: {', '.join(row) or 'none'}"
        ) from None
    except Exception as error:  # expressions may raise anything
        raise ValueError(f"data.prompt_template: {type(error).__name__}: {error}") from None


def _guarded(value: Any, path: str) -> Any:
    """Copies a value of a row. Nulls and NaNs in the copy raise an error where they are printed."""
    if value is None:
        return _Missing(path)
    if isinstance(value, float) and math.isnan(value):
        guarded = _NotANumber(value)
        guarded.path = path
        return guarded
    if isinstance(value, dict):
        return {key: _guarded(inner, f"{path}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [_guarded(inner, f"{path}[{i}]") for i, inner in enumerate(value)]
    return value


def _finalize(value: Any) -> Any:
    """Refuses to print the value of an expression that is null or NaN."""
    if value is None:
        raise _NotPrintable("prints the result of an expression that is null for this row")
    if isinstance(value, float) and not isinstance(value, _NotANumber) and math.isnan(value):
        raise _NotPrintable("prints the result of an expression that is NaN for this row")
    return value


def _to_json(value: Any) -> None:
    """Returns None for a value that the filter `tojson` should write as null."""
    if not isinstance(value, _Missing):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
