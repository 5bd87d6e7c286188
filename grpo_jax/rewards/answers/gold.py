"""Reads the values that a data column may have for a built-in reward: accepted answers and whole numbers.

A value has many possible types, depending on the file. A Parquet file gives `Decimal`, `bytes` or NumPy
scalars, a CSV file gives text, and pandas turns a column of whole numbers with a gap into floats. Every
function here reads the values that have one meaning and raises ValueError for all others, so that no type
gives a reward of 0 in silence.
"""

import ast
import math
import numbers
import re
from collections.abc import Set
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

_MAX_EXPONENT = 400  # limit for a Decimal: more digits are not an answer, and slow to write out
_MAX_LIST_CHARACTERS = 10_000  # limit for a list that is written as text
_WHOLE_FLOAT = re.compile(r"[-+]?[0-9]+\.0", re.ASCII)
_NUMBERS = re.compile(r"[-+]?[0-9]+(?:[\s,;]+[-+]?[0-9]+)*", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


class MissingAnswerError(ValueError):
    """A row has no expected answer: it is null, NaN, an empty text or an empty list."""


def accepted_answers(value: Any) -> tuple[str, ...]:
    """Returns the texts that count as the right answer, for one row of a column.

    Args:
        value: a text, a number (also a Decimal, Fraction or NumPy scalar), a bool, UTF-8 bytes, or a list of
            these. Any answer of a list is right.

    Returns:
        one or more texts. A float that is whole has two spellings: 46.0 gives `46` and `46.0`. A bool gives
        `True` and `true`.

    Raises:
        MissingAnswerError: the value is null, NaN or empty, or it is a list that is empty or has such an
            entry.
        ValueError: the value has another type, is infinite, holds half a character, or is a list of texts
            that is written as a text.

    >>> accepted_answers(46.0), accepted_answers(["105", 106])
    (('46', '46.0'), ('105', '106'))
    """
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.ndim else value[()]
    if not isinstance(value, (list, tuple, Set)):
        if isinstance(value, str) and _is_list_of_texts(value):
            raise ValueError(
                f"the expected answer {_shown(value)} is a list written as text, as in a cell of a CSV file; "
                "give the list itself in a .jsonl or .parquet file, or a list of this one text"
            )
        return _spellings(value)
    if not value:
        raise MissingAnswerError("the expected answer is an empty list")
    spelled = (_spellings(entry) for entry in value)
    return tuple(dict.fromkeys(text for texts in spelled for text in texts))


def _is_list_of_texts(text: str) -> bool:
    """Says whether a text is a list of texts such as `["a", "b"]`. `[1, 2]` may well be an interval."""
    text = text.strip()
    if not (text[:2] in ('["', "['") and text.endswith("]") and len(text) <= _MAX_LIST_CHARACTERS):
        return False
    try:
        entries = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)


def _spellings(value: Any) -> tuple[str, ...]:
    """Returns the texts of a single answer."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"the expected answer {_shown(value)} is not UTF-8 text") from None
    if isinstance(value, str):
        if not value.strip():
            raise MissingAnswerError("the expected answer is an empty text")
        text = str(value)
        if found := _SURROGATE.search(text):
            raise ValueError(
                f"the expected answer {_shown(text)} holds half a character (at position {found.start()}), "
                "which no completion does: the text was truncated inside it"
            )
        # A CSV file that pandas wrote has `46.0` where the column had a gap.
        return (text, text.strip()[:-2]) if _WHOLE_FLOAT.fullmatch(text.strip()) else (text,)
    if value is None:
        raise MissingAnswerError("the expected answer is null (None)")
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)), str(bool(value)).lower()
    if isinstance(value, (int, np.integer)):
        return (str(int(value)),)
    if isinstance(value, Fraction):
        return (str(value),)
    if isinstance(value, (float, np.floating, Decimal)):
        return _decimal_spellings(value)
    raise ValueError(
        f"the expected answer {_shown(value)} is of type {type(value).__name__}; give text, a number or a "
        "list of these"
    )


def _decimal_spellings(value: float | np.floating | Decimal) -> tuple[str, ...]:
    # A float is read by its shortest spelling, so that the float32 0.1 means one tenth.
    exact = value if isinstance(value, Decimal) else Decimal(str(value))
    if exact.is_nan():
        raise MissingAnswerError(f"the expected answer is not a number ({value})")
    if exact.is_infinite() or abs(exact.adjusted()) > _MAX_EXPONENT:
        raise ValueError(f"the expected answer {value} is not a finite number of ordinary size")
    own = str(value)
    if exact == exact.to_integral_value():
        return tuple(dict.fromkeys((str(int(exact)), own)))
    shortest = format(exact.normalize(), "f")
    return tuple(dict.fromkeys((own, shortest)))


def whole_number(value: Any) -> int:
    """Reads a whole number: an integer, a float or Decimal that is whole, or a text that is one.

    Raises:
        ValueError: the value is anything else.

    >>> whole_number("46"), whole_number(46.0)
    (46, 46)
    """
    if isinstance(value, (str, bytes)):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if re.fullmatch(r"[-+]?[0-9]{1,400}(\.0+)?", text.strip(), re.ASCII):
            return int(text.strip().split(".")[0])
    elif isinstance(value, numbers.Number) and _is_whole(value):
        return int(value)
    raise ValueError(f"{_shown(value)} is not a whole number")


def _is_whole(value: Any) -> bool:
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool)
    known = isinstance(value, (float, np.floating, Decimal, Fraction))
    return known and math.isfinite(value) and value == int(value)


def whole_numbers(value: Any) -> list[int]:
    """Reads a list of whole numbers: a list or an array of them, or a text such as `[12, 34]` or `12 34`.

    Raises:
        ValueError: the value is anything else, or an empty list.

    >>> whole_numbers("[12, 34]")
    [12, 34]
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        text = value.strip()
        if text and text[-1] == _BRACKETS.get(text[0]):
            text = text[1:-1].strip()
        if not _NUMBERS.fullmatch(text):
            raise ValueError(f"{_shown(value)} is not a list of whole numbers such as [12, 34]")
        return [whole_number(number) for number in re.split(r"[\s,;]+", text)]
    if not isinstance(value, (list, tuple, np.ndarray)) or not len(value):
        raise ValueError(f"{_shown(value)} is not a list of whole numbers such as [12, 34]")
    return [whole_number(number) for number in value]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
