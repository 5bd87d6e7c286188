"""Reads tables in text, whose cells are separated by commas, semicolons, tabs or bars."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

_SEPARATORS = ",;\t|"
_SAMPLE = 50  # number of rows from which the separator is chosen
_MAX_CELL = 2**31 - 1  # characters; the default of the csv module is 131,072


def read_csv(
    path: str | Path, open_file: Callable[[], BinaryIO], *, separator: str | None = None
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Reads the rows of a table, in which every value is text.

    Args:
        path: name for messages.
        open_file: function that opens the file again.
        separator: character between two cells. None means a comma, semicolon, tab or bar: the one that
            divides more of the first rows into as many cells as there are names. The comma wins a tie.

    Yields:
        (place, row): the place is the line on which the row begins, such as "line 3". If a row has another
        number of cells than there are names, a ValueError that says so takes the place of the row.

    Raises:
        ValueError: the first line does not name every column once, a quote is broken, or the text is not
            UTF-8.
    """
    csv.field_size_limit(_MAX_CELL)
    line = 0
    first = 1  # a row may begin before the line that ends it: a cell may hold line breaks
    header: list[str] = []
    try:
        named = _named_separator(open_file)
        separator = separator or named or _choose_separator(open_file)
        spaced = _is_spaced(open_file, separator)
        with _open_text(open_file) as file:
            skipped = 1 if named else 0
            reader = _reader(islice(file, skipped, None), separator, spaced)
            first += skipped
            for cells in reader:
                line = skipped + reader.line_num
                if not cells:
                    pass
                elif not header:
                    header = _checked_header(cells)
                elif len(cells) != len(header):
                    error = ValueError(f"{len(cells)} fields, but the header has {len(header)}")
                    yield f"line {first}", error
                else:
                    yield f"line {first}", dict(zip(header, cells, strict=True))
                first = line + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text after line {line} ({error})") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {first}: not valid CSV ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}, line {first}: {error}") from error


def _reader(lines: Iterable[str], separator: str, spaced: bool = False) -> Any:
    return csv.reader(lines, strict=True, delimiter=separator, skipinitialspace=spaced)


def _open_text(open_file: Callable[[], BinaryIO]) -> TextIOWrapper:
    return TextIOWrapper(open_file(), encoding="utf-8-sig", newline="")


def _named_separator(open_file: Callable[[], BinaryIO]) -> str | None:
    """Returns the separator that the first line names, such as the `sep=;` that Excel writes, or None."""
    with _open_text(open_file) as file:
        found = re.fullmatch(r'"?sep=(.)"?', file.readline(100).rstrip("\r\n"))
    return found[1] if found else None


def _is_spaced(open_file: Callable[[], BinaryIO], separator: str) -> bool:
    """Says whether the names have a space after each separator. The cells then have it as well."""
    with _open_text(open_file) as file:
        names: list[str] = next(filter(None, _reader(file, separator)), [])
    return any(name.startswith(" ") and name.strip() for name in names[1:])


def _choose_separator(open_file: Callable[[], BinaryIO]) -> str:
    """Returns the character that divides the most of the first rows as it divides the names, or a comma."""
    shares = {separator: _share_divided(open_file, separator) for separator in _SEPARATORS}
    best = max(shares, key=shares.__getitem__)  # the first one wins a tie, and the comma is the first
    return best if shares[best] > 0 else ","


def _share_divided(open_file: Callable[[], BinaryIO], separator: str) -> float:
    """Returns the share of the first rows with as many cells as names. For a single name it is 0."""
    counts = []
    with _open_text(open_file) as file:
        try:
            for cells in islice(filter(None, _reader(file, separator)), _SAMPLE):
                counts.append(len(cells))
        except csv.Error:
            counts.append(0)
    if not counts or counts[0] < 2:
        return 0.0
    return counts.count(counts[0]) / len(counts)


def _checked_header(cells: list[str]) -> list[str]:
    """Returns the names of the columns without the white space around them."""
    names = [name.strip() for name in cells]
    for i, name in enumerate(names):
        if not name:
            raise ValueError(f"the header has no name for column {i + 1}")
        if name in names[:i]:
            raise ValueError(f"the header names column `{name}` twice")
    return names
