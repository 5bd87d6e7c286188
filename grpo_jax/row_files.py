"""Rows of a file as dicts, each with its place: JSON lines, CSV, Parquet, or the paragraphs of a text."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # (place, row); the place is such as "line 3"


def read_rows(path: str | Path) -> Rows:
    """Reads the rows of a file, in the format that its suffix says.

    Args:
        path: .jsonl or .json (an object per line), .csv (a header line; every value is text), .parquet
            (extra `parquet`), or .txt (a row per paragraph, with the one column `text`).

    Yields:
        (place, row): the place as people count, "line 3" or "row 3" of the file.

    Raises:
        ValueError: an unknown suffix, or a broken row, named by file and place. ImportError: pyarrow is
            missing. OSError: the file cannot be read.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise ValueError(
            f"{path}: files of rows end in {', '.join(READERS)}, not in {suffix!r}"
            if suffix
            else f"{path}: the file's name needs a suffix that says its format: {', '.join(READERS)}"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file of rows; looked in {Path.cwd()}")
    return READERS[suffix](path)


def _read_json_lines(path: str | Path) -> Rows:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"line {number}", _parse_json(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error


def _parse_json(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object with a `prompt`, not {type(row).__name__}")
    return row


def _read_csv(path: str | Path) -> Rows:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        first = 1  # line on which the row begins; quoted fields hold line breaks
        header: list[str] = []
        try:
            for fields in reader:
                if not fields:
                    pass
                elif not header:
                    header = _checked_header(fields)
                elif len(fields) != len(header):
                    raise ValueError(f"{len(fields)} fields, but the header has {len(header)}")
                else:
                    yield f"line {first}", dict(zip(header, fields, strict=True))
                first = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text after line {reader.line_num} ({error})") from error
        except (ValueError, csv.Error) as error:
            what = f"not valid CSV ({error})" if isinstance(error, csv.Error) else error
            raise ValueError(f"{path}, line {first}: {what}") from error


def _checked_header(names: list[str]) -> list[str]:
    for i, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"the header has no name for column {i + 1}")
        if name in names[:i]:
            raise ValueError(f"the header names column `{name}` twice")
    return names


def _read_parquet(path: str | Path) -> Rows:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f'{path} is Parquet, which needs pyarrow: pip install "grpo-jax[parquet]" ({error})'
        ) from None
    number = 0
    with open(path, "rb") as file:
        try:
            for part in parquet.ParquetFile(file).iter_batches():
                for row in part.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except Exception as error:  # the kinds of pyarrow are many
            raise ValueError(f"{path}: not a Parquet file that can be read ({error})") from error


def _read_paragraphs(path: str | Path) -> Rows:
    """Yields the paragraphs of a text, which blank lines separate."""
    first, paragraph = 1, ""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    first = first if paragraph else number
                    paragraph += line
                elif paragraph:
                    yield f"line {first}", {"text": paragraph.rstrip()}
                    paragraph = ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    if paragraph:
        yield f"line {first}", {"text": paragraph.rstrip()}


READERS: dict[str, Callable[[str | Path], Rows]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
}
