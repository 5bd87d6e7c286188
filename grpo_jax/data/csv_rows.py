"""Rows of a table in text: separated by commas, semicolons, tabs or bars, after a line with the names."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

_SEPARATORS = ",;\t|"
_SAMPLE = 50  # rows by which the separator is chosen
_MAX_CELL = 2**31 - 1  # characters; the csv module allows 131,072 unless told


def read_csv(
    path: str | Path, open_file: Callable[[], BinaryIO], *, separator: str | None = None
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Reads the rows of a table; every value is text.

    Args:
        path: name for messages.
        open_file: opens the file anew.
        separator: character between two cells. None: a comma, semicolon, tab or bar, whichever divides
            more of the first rows as it divides the names; of equals, the comma.

    Yields:
        (place, row): "line 3", the line on which the row begins. A row of another number of cells than
        there are names is the ValueError that says so.

    Raises:
        ValueError: the first line does not name every column once, a broken quote, or no UTF-8 text.
    """
    csv.field_size_limit(_MAX_CELL)
    line, first = 0, 1  # a row may begin before the line that ends it: quoted cells hold line breaks
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
    """Returns the separator that a first line such as `sep=;` names, as Excel writes it."""
    with _open_text(open_file) as file:
        found = re.fullmatch(r'"?sep=(.)"?', file.readline(100).rstrip("\r\n"))
    return found[1] if found else None


def _is_spaced(open_file: Callable[[], BinaryIO], separator: str) -> bool:
    """Returns whether the names are written with a space after each separator; the cells then are, too."""
    with _open_text(open_file) as file:
        names = next(filter(None, _reader(file, separator)), [])
    return any(name.startswith(" ") and name.strip() for name in names[1:])


def _choose_separator(open_file: Callable[[], BinaryIO]) -> str:
    """Returns the character that divides the most of the first rows as it divides the names; else a comma."""
    shares = {separator: _share_divided(open_file, separator) for separator in _SEPARATORS}
    best = max(shares, key=shares.__getitem__)  # the first of equals, and the comma is the first of all
    return best if shares[best] > 0 else ","


def _share_divided(open_file: Callable[[], BinaryIO], separator: str) -> float:
    """Returns the share of the first rows with as many cells as there are names; 0 for a single name."""
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
