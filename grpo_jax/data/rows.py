"""Reads the rows of files as dicts, each with its place: JSON, tables, Parquet, or paragraphs of text."""

import bz2
import functools
import glob
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

from grpo_jax.data.csv_rows import read_csv
from grpo_jax.data.json_rows import read_json

Row = dict[str, Any]
# (place, row), with a place such as "line 3". For a row that cannot be read, a ValueError takes its place.
Rows = Iterator[tuple[str, Row | ValueError]]

_Open = Callable[[], BinaryIO]
COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MAGIC = {  # first bytes of files that are not text -> (their kind, what to do)
    b"\x1f\x8b": ("compressed by gzip", "end its name in .gz"),
    b"BZh": ("compressed by bzip2", "end its name in .bz2"),
    b"\xfd7zXZ": ("compressed by xz", "end its name in .xz"),
    b"PK\x03\x04": ("a zip archive (or .xlsx)", "unpack it, or save it as text"),
    b"PAR1": ("Parquet", "end its name in .parquet"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
}


def find_files(names: str | Sequence[str]) -> list[str]:
    """Finds the files that names and globs stand for, in the order of the names.

    Args:
        names: one name or several. A name that is not a file and contains `*`, `?` or `[` is a glob, in which
            `**` goes through folders.

    Returns:
        the names of the files. Those of one glob are sorted. A name that is not a glob is returned unchanged.

    Raises:
        FileNotFoundError: a glob matches no file.
        ValueError: there is no name, or a file is named twice.
    """
    found: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if not glob.has_magic(name) or Path(name).exists():
            matches = [name]
        else:
            matches = [path for path in sorted(glob.glob(name, recursive=True)) if Path(path).is_file()]
            if not matches:
                advice = "; quote the globs of a list: ['*.jsonl']" if name.startswith("[") else ""
                raise FileNotFoundError(f"{name}: no file has such a name; looked in {Path.cwd()}{advice}")
        for match in matches:
            if match in found:
                raise ValueError(f"{match} is named twice, by {names}; its rows would count twice")
            found.append(match)
    if not found:
        raise ValueError("a list of files is empty; name at least one")
    return found


def stem(path: str | Path) -> str:
    """Returns a file's name without the suffixes for its format and compression."""
    name = Path(path)
    return Path(name.stem).stem if name.suffix.lower() in COMPRESSIONS else name.stem


def read_rows(path: str | Path) -> Rows:
    """Reads the rows of a file, in the format that its suffix names.

    Args:
        path: name of the file: .jsonl or .json (see `read_json`), .csv or .tsv (with a line of names, and
            every value is text), .parquet (extra `parquet`), or .txt (a row per paragraph, with the one
            column `text`). Text may be compressed: .jsonl.gz, .csv.bz2, .txt.xz, and so on.

    Yields:
        (place, row): the place is counted from 1, such as "line 3" or "row 3" of the file. For a row that
        cannot be read, the ValueError that says why takes its place, and reading goes on.

    Raises:
        ValueError: the suffix is unknown, or the file cannot be read beyond some place.
        ImportError: pyarrow is missing.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    inner = Path(path.stem) if compression else path
    suffix = inner.suffix.lower()
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise ValueError(
            f"{path}: files of rows end in {known}, not in {suffix + compression!r}"
            if suffix or compression
            else f"{path}: the file's name needs a suffix that says its format: {known}"
        )
    if compression and suffix == ".parquet":
        raise ValueError(f"{path}: Parquet is compressed inside; unpack the file to {inner.name}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a directory; name its files, such as {path}/*{suffix}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of rows; looked in {Path.cwd()}")
    if not compression and suffix != ".parquet":
        _check_start(path)
    opener = COMPRESSIONS.get(compression, open)
    return _unpacked(path, READERS[suffix](path, functools.partial(opener, path, "rb")))


def _check_start(path: Path) -> None:
    """Raises if the first bytes of a file show that it is not text."""
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, (what, fix) in _MAGIC.items():
        if start.startswith(magic):
            raise ValueError(f"{path}: the file is {what}; {fix}")


def _unpacked(path: Path, rows: Rows) -> Rows:
    """Yields rows, and turns errors of the file's compression into messages."""
    try:
        yield from rows
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged, or not compressed as its name says ({error})") from error
    except OSError as error:
        if error.errno is not None or path.suffix.lower() not in COMPRESSIONS:
            raise
        raise ValueError(f"{path}: damaged, or not compressed as its name says ({error})") from error


def _read_parquet(path: str | Path, open_file: _Open) -> Rows:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f'{path} is Parquet, which needs pyarrow: pip install "grpo-jax[parquet]" ({error})'
        ) from None
    number = 0
    with open_file() as file:
        try:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"the column `{repeated[0]}` is there twice")
            for part in table.iter_batches():
                for row in part.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except Exception as error:  # pyarrow raises many kinds of errors
            raise ValueError(f"{path}: not a Parquet file that can be read ({error})") from error


def _read_paragraphs(path: str | Path, open_file: _Open) -> Rows:
    """Yields the paragraphs of a text, which are separated by blank lines."""
    first = 1
    paragraph = ""
    try:
        with TextIOWrapper(open_file(), encoding="utf-8-sig") as file:
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


READERS: dict[str, Callable[[str | Path, _Open], Rows]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, separator="\t"),
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
}
