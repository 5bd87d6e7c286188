"""Gives the columns of a row the names that the configuration asks for."""

from collections.abc import Mapping
from typing import Any


def rename(row: Mapping[str, Any], columns: Mapping[str, str], *, strict: bool) -> dict[str, Any]:
    """Gives columns their new names.

    A name with dots that no column has reaches into nested columns: `reward_model.ground_truth` is the
    field `ground_truth` of the column `reward_model`, which is kept as it is.

    Args:
        row: columns by their names in the file.
        columns: {new name: name in the file}.
        strict: whether each of these columns must be in the row.

    Returns:
        the row. Columns with a new name no longer have the old one.

    Raises:
        ValueError: with `strict`, a column or a part of the path to a nested one is missing or null.
    """
    new: dict[str, Any] = {}
    for name, old in columns.items():
        if old in row:
            new[name] = row[old]
        elif strict:
            new[name] = _nested(row, old, name)
    return {name: value for name, value in row.items() if name not in columns.values()} | new


def _nested(row: Mapping[str, Any], path: str, name: str) -> Any:
    """Returns the value at a path such as `reward_model.ground_truth`."""
    value: Any = row
    done = ""
    rest = path
    while rest:
        if not isinstance(value, Mapping):
            what = "null" if value is None else f"{type(value).__name__}, without fields"
            raise ValueError(f"data.columns: {name} is `{path}`, but `{done}` is {what}")
        key = _first_key(value, rest)
        if key is None:
            if not done:
                raise ValueError(
                    f"data.columns: there is no column `{path}`; the columns are: {', '.join(row) or 'none'}"
                )
            raise ValueError(
                f"data.columns: {name} is `{path}`, but `{done}` has no `{rest}`; it has: "
                f"{', '.join(map(str, value)) or 'nothing'}"
            )
        value = value[key]
        done = f"{done}.{key}" if done else key
        rest = rest[len(key) + 1 :]
    if value is None:
        raise ValueError(f"data.columns: {name} is `{path}`, which is null here")
    return value


def _first_key(fields: Mapping[str, Any], path: str) -> str | None:
    """Returns the longest beginning of a path, up to a dot, that is a field."""
    parts = path.split(".")
    beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((beginning for beginning in beginnings if beginning in fields), None)
