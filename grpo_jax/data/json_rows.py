"""Reads rows of JSON in any usual layout, and names the place of every mistake."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_MAX_DEPTH = 100  # levels of lists and objects in a row, because later steps handle rows by recursion
_WRAPPERS = ("data", "rows", "examples", "records")  # keys under which other projects store their rows
_ROWS_ARE = 'rows are an array of objects, or one object per line (pandas: orient="records", lines=True)'


def read_json(
    path: str | Path, open_file: Callable[[], BinaryIO]
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Reads rows of JSON, whatever their layout.

    The layouts are one object per line, objects over several lines, one array of objects, and one object
    that holds such an array under its only key or under `data`, `rows`, `examples` or `records`. `NaN` and
    `Infinity`, which Python writes, are floats.

    Args:
        path: name for messages.
        open_file: function that opens the file again.

    Yields:
        (place, row), with a place such as "line 3" or, in an array, "row 3 (line 9)". For a row that cannot
        be used, the ValueError that says why takes its place, and the next rows follow.

    Raises:
        ValueError: the text is not JSON beyond some place, or it is not clear where the rows are.
    """
    with open_file() as file:
        by_line = _is_by_line(file)
    with open_file() as file:
        if by_line:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"line {number}", _read_line(line)
        else:
            try:
                text = file.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 text ({error})") from None
            yield from _read_document(path, text)


def _is_by_line(file: BinaryIO) -> bool:
    """Says whether each line of a file is a value of its own, judged by the first two lines."""
    lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)
    lines = (line for line in lines if line)
    first = next(lines, b"")
    second = next(lines, b"")
    if not first.startswith((b"{", b"[")):
        return True
    if not second:
        return not _is_json(first)
    if _is_json(first):
        return True
    # If an object goes on in the second line, that line begins with a key or the first one is open. Otherwise
    # the first line is broken.
    goes_on = second.startswith((b'"', b"}", b"]")) or first.endswith((b"[", b",", b":"))
    return first.startswith(b"{") and not goes_on


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_line(line: bytes) -> dict[str, Any] | ValueError:
    try:
        text = line.decode("utf-8-sig").strip()
        value, end = _parse(text, 0)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text ({error})")
    except json.JSONDecodeError as error:
        return ValueError(f"not valid JSON ({error})")
    except ValueError as error:
        return error
    return _as_row(value)


def _read_document(path: str | Path, text: str) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Yields the rows of a text that is one array, one object, or a sequence of objects."""
    is_array = text.lstrip().startswith("[")
    multi_line = "\n" in text.strip()
    position = _skip(text, 0)
    counted = 0
    line = 1
    number = 0
    if is_array:
        position = _skip(text, position + 1)
    try:
        while position < len(text) and not (is_array and text[position] == "]"):
            line += text.count("\n", counted, position)
            counted = position
            number += 1
            value, end = _parse(text, position)
            position = _skip(text, end)
            if is_array:
                yield f"row {number} (line {line})" if multi_line else f"row {number}", _as_row(value)
                position = _next_element(text, position)
            elif number == 1 and position == len(text) and isinstance(value, dict):
                yield from _rows_of_object(path, value)
            else:
                yield f"line {line}", _as_row(value)
        if is_array and (position >= len(text) or _skip(text, position + 1) < len(text)):
            raise json.JSONDecodeError("the array must end the file", text, min(position, len(text)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error})") from None


def _skip(text: str, position: int) -> int:
    """Returns the position of the next character that is not white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _next_element(text: str, position: int) -> int:
    """Returns the position of an array's next element, or of the bracket that ends it."""
    if text[position : position + 1] == ",":
        following = _skip(text, position + 1)
        if text[following : following + 1] != "]":
            return following
    elif text[position : position + 1] == "]":
        return position
    raise json.JSONDecodeError("Expecting ',' and an object, or ']'", text, position)


def _parse(text: str, position: int) -> tuple[Any, int]:
    """Returns the value at a position and the position after it.

    If JSON allows a value but we do not, the ValueError that says why takes the place of the value.

    Raises:
        json.JSONDecodeError: there is no valid JSON.
    """
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(name for name in members if names.count(name) > 1)
        return members

    try:
        value, end = json.JSONDecoder(object_pairs_hook=unique).raw_decode(text, position)
    except RecursionError:
        raise json.JSONDecodeError(f"nested deeper than {_MAX_DEPTH} levels", text, position) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise json.JSONDecodeError(str(error), text, position) from None
    if repeated:
        return ValueError(f"the key `{repeated[0]}` is there twice in one object"), end
    if text.count("[", position, end) + text.count("{", position, end) > _MAX_DEPTH and _is_deep(value):
        return ValueError(f"nested deeper than {_MAX_DEPTH} levels"), end
    return value, end


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def _as_row(value: Any) -> dict[str, Any] | ValueError:
    if isinstance(value, dict | ValueError):
        return value
    return ValueError(f"must be a JSON object with a `prompt`, not {type(value).__name__}")


def _rows_of_object(
    path: str | Path, value: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Yields the rows of a file that is one object: the rows that it wraps, or the object itself."""
    lists = [name for name, inner in value.items() if _is_table(inner)]
    named = [name for name in lists if len(value) == 1 or name in _WRAPPERS]
    keys = ", ".join(value) if len(value) < 10 else f"{', '.join([*value][:8])}, ... ({len(value)} keys)"
    if len(lists) == len(named) == 1 and "prompt" not in value:
        for number, row in enumerate(value[named[0]], start=1):
            yield f"row {number} of `{named[0]}`", _as_row(row)
    elif lists and "prompt" not in value:
        raise ValueError(
            f"{path}: one object with the keys {keys}, and it is not clear which of them holds the rows; "
            f"save {' or '.join(f'`{name}`' for name in lists[:3])} alone: {_ROWS_ARE}"
        )
    elif _is_by_column(value):
        raise ValueError(f"{path}: one object that holds columns ({keys}), not rows; {_ROWS_ARE}")
    else:
        yield "line 1", value


def _is_table(value: Any) -> bool:
    """Says whether a value is a list of objects, but not the messages of one chat."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and not {"role", "from"} & row.keys() for row in value)
    )


def _is_by_column(value: dict[str, Any]) -> bool:
    """Says whether an object looks like {column: values} or {index: row}, as pandas writes them."""
    values = list(value.values())
    if all(isinstance(inner, dict) for inner in values):
        return len(values) > 1
    sizes = {len(inner) if isinstance(inner, list) else 0 for inner in values}
    return len(values) > 1 and len(sizes) == 1 and sizes != {0}
