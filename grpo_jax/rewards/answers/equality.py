r"""Decides whether two answers are equal: as quantities, lists, intervals, expressions or words.

The rules would rather refuse a right answer than pay a wrong one. They never take the last number out of a
longer answer, and a unit counts wherever both answers have one.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from grpo_jax.rewards.answers.polynomials import canonical_form, is_rational
from grpo_jax.rewards.answers.quantities import (
    VARIABLE,
    is_sum_of_variables,
    read_quantity,
    same_unit,
    split_equation,
    split_unit,
)
from grpo_jax.rewards.answers.text import MAX_CHARACTERS, clean_answer

_MAX_ITEMS = 50
_NEGATIVE_INFINITY = r"-\infty"
_INFINITY = r"\infty"
_RELATION = re.compile(r"(<|>|\\le(?![a-z])|\\ge(?![a-z]))")
_OPENERS = "([{"
_CLOSERS = ")]}"
_SEPARATOR = re.compile(r"(?:,|;)?(?:^| )(?:and|or)(?: |$)|,|;|\\cup(?![A-Za-z])")
_CLOCK = re.compile(r"([0-9]{1,2} ?: ?[0-9]{2})(?: ?([AaPp])\.? ?[Mm]\.?)?", re.ASCII)
# `1 2` is not 12, `10:30` is not a number, `101_2` is not 101, and `2024-01-05` is not a subtraction.
_NO_MATHEMATICS = re.compile(
    r"[0-9] [0-9]|[0-9] ?[:_] ?\{?[0-9]|(?<![0-9])[0-9]{1,4}([-/])[0-9]{1,2}\1[0-9]{1,4}(?![0-9])"
)
_CHOICE = re.compile(r"(?:(?:option|choice|answer) )?\(? ?([A-Za-z]) ?[).:]*", re.I)


def numbers_equal(a: Fraction, b: Fraction, *, tolerance: float = 1e-6) -> bool:
    """Compares two numbers: whole numbers exactly, and others by ``|a - b| <= tolerance * |b|``.

    Args:
        a: the number given.
        b: the number expected.
        tolerance: relative tolerance. It never makes two whole numbers equal. 0 means exactly equal.
    """
    if a.denominator == 1 and b.denominator == 1:
        return a == b
    return abs(a - b) <= Fraction(tolerance) * abs(b)


def texts_equal(a: str, b: str) -> bool:
    """Compares two texts without the white space around them."""
    return a.strip() == b.strip()


def answers_equal(given: str, expected: str, *, tolerance: float = 1e-6) -> bool:
    r"""Compares two answers as people read them: numbers with their units, lists, expressions or words.

    Args:
        given: the answer of a completion.
        expected: the right answer.
        tolerance: relative tolerance of numbers that are not whole, see `numbers_equal`.

    >>> answers_equal(r"\$1,250.0", "1250"), answers_equal("paris", "Paris")
    (True, True)
    >>> answers_equal("2 hours", "2 minutes"), answers_equal("17 or 18", "18")
    (False, False)
    """
    return compare_answers(given, expected, tolerance=tolerance) is True


def compare_answers(given: str, expected: str, *, tolerance: float = 1e-6) -> bool | None:
    """Compares two answers. `None` means that this module knows too little mathematics to decide."""
    if max(len(given), len(expected)) > MAX_CHARACTERS:
        return texts_equal(given, expected)
    a = clean_answer(given)
    b = clean_answer(expected)
    return False if not a or not b else _compare(a, b, tolerance, depth=0)


def _compare(a: str, b: str, tolerance: float, depth: int) -> bool | None:
    left_a, a = _without_left_side(a)
    left_b, b = _without_left_side(b)
    if left_a and left_b and left_a != left_b:
        return False
    sides = a.split("=")
    if "=" not in b and len(sides) > 1 and is_sum_of_variables(sides[0]):
        a = sides[-1].strip()
    a, unit_a = split_unit(a)
    b, unit_b = split_unit(b)
    if not same_unit(unit_a, unit_b):
        return False
    number_a = read_quantity(a)
    number_b = read_quantity(b)
    if number_a is not None and number_b is not None:
        if numbers_equal(number_a.value, number_b.value, tolerance=tolerance):
            return same_unit(number_a.unit, number_b.unit)
        return False
    times = _CLOCK.fullmatch(a), _CLOCK.fullmatch(b)
    if all(times):
        (time_a, half_a), (time_b, half_b) = (time.groups() for time in times)
        same_half = not half_a or not half_b or half_a.lower() == half_b.lower()
        return same_half and time_a.replace(" ", "") == time_b.replace(" ", "")
    if number_a is None and number_b is None and _compact(a) == _compact(b):
        return True
    if depth < 4:
        decided = _compare_structures(_structure(a), _structure(b), tolerance, depth)
        if decided is not _NO_STRUCTURE:
            return decided
    if (words := _compare_words(a, b)) is not None:
        return words
    if number_a is None and number_b is None and (form := canonical_form(a)) is not None:
        other = canonical_form(b)
        if other is not None and form == other and not is_rational(form):
            return True
    if any(_NO_MATHEMATICS.search(text) for text in (a, b)):
        return False
    # A number equals neither a relation nor a set of numbers with a property.
    one_number = (number_a is None) != (number_b is None)
    return False if one_number and any(_RELATION.search(text) or "\\ne" in text for text in (a, b)) else None


def _compact(text: str) -> str:
    """Returns a text without white space and braces that have no meaning."""
    text = re.sub(r"([_^])\{([0-9A-Za-z])\}", r"\1\2", text)
    text = re.sub(
        r"(?<![0-9A-Za-z]) +| +(?![0-9A-Za-z])|(?<=[0-9]) +(?=[A-Za-z])|(?<=[A-Za-z]) +(?=[0-9])", "", text
    )
    text = re.sub(r"\\frac\{?([0-9A-Za-z])\}?\{?([0-9A-Za-z])\}?(?![0-9A-Za-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt([0-9A-Za-z])(?![0-9A-Za-z])", r"\\sqrt{\1}", text)
    return re.sub(r"(?<=[0-9)}])\*(?=[A-Za-z\\(])", "", text)


def _without_left_side(text: str) -> tuple[str, str]:
    # `x = 1, y = 2` is a list. Its items are split later.
    return ("", text) if _split(text)[1] else split_equation(text)


@dataclass(frozen=True)
class _Structure:
    """The brackets ("" for a bare list) and the items of a list, tuple, interval, set or matrix."""

    brackets: str
    items: tuple[str, ...]


_NO_STRUCTURE = object()


def _structure(text: str) -> _Structure | None:
    """Reads a text as several items. Returns `None` if it is a single item."""
    if (interval := _interval(text)) is not None:
        return interval
    if "\\pm" in text and text.count("\\pm") == 1 and "," not in text:
        both = (text.replace("\\pm", sign).strip() for sign in "+-")
        return _Structure("", tuple(item.removeprefix("+").strip() for item in both))
    match = re.fullmatch(r"\\begin\{matrix\}(.*)\\end\{matrix\}", text)
    if match and "\\begin" not in match[1]:
        rows = [row.split("&") for row in re.sub(r"\\\\ *$", "", match[1]).split("\\\\")]
        shape = "x".join(str(len(row)) for row in rows)
        return _Structure(f"matrix {shape}", tuple(entry.strip() for row in rows for entry in row))
    parts, several = _split(text)
    if several:
        return None if len(parts) > _MAX_ITEMS else _Structure("", parts)
    braces = re.fullmatch(r"\\\{(.*)\\\}", text)
    if braces or (len(text) > 2 and text[0] in "([" and text[-1] in ")]"):
        inside = braces[1] if braces else text[1:-1]
        parts, several = _split(inside, thousands=", " in inside)
        if several and len(parts) <= _MAX_ITEMS:
            return _Structure("{}" if braces else text[0] + text[-1], parts)
    return None


def _split(text: str, *, thousands: bool = True) -> tuple[tuple[str, ...], bool]:
    """Splits a text at the separators outside brackets. Returns (items, whether there are several)."""
    if (
        "," not in text
        and ";" not in text
        and " or " not in text
        and " and " not in text
        and "\\cup" not in text
    ):
        return (text,), False
    depths = []
    depth = 0
    for character in text:
        depth += (character in _OPENERS) - (character in _CLOSERS)
        depths.append(depth)
    if depth != 0 or min(depths) < 0:
        return (text,), False
    parts = []
    start = 0
    number = thousands and re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])", re.ASCII)
    inside_numbers = {i for m in number.finditer(text) for i in range(*m.span())} if number else set()
    for match in _SEPARATOR.finditer(text):
        if depths[match.start()] == 0 and match.start() not in inside_numbers:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    parts.append(text[start:].strip())
    parts = [part for part in parts if part]
    return tuple(parts), len(parts) > 1


def _interval(text: str) -> _Structure | None:
    r"""Reads `0 \le x < 1`, `x > 3` or `3 < x` as an interval, or returns `None`."""
    if "<" not in text and ">" not in text and "\\le" not in text and "\\ge" not in text:
        return None
    parts = [part.strip() for part in _RELATION.split(text)]
    if len(parts) == 3:
        left, sign, right = parts
        is_left = re.fullmatch(VARIABLE, left) is not None
        if is_left == (re.fullmatch(VARIABLE, right) is not None):
            return None
        bound, is_upper = (right, sign in ("<", "\\le")) if is_left else (left, sign in (">", "\\ge"))
        closed = sign.startswith("\\")
        if is_upper:
            return _Structure("(" + ("]" if closed else ")"), (_NEGATIVE_INFINITY, bound))
        return _Structure(("[" if closed else "(") + ")", (bound, _INFINITY))
    if len(parts) == 5 and re.fullmatch(VARIABLE, parts[2]):
        low, first, _, second, high = parts
        if {first, second} <= {">", "\\ge"}:
            low, first, second, high = high, second, first, low
        elif not {first, second} <= {"<", "\\le"}:
            return None
        brackets = ("[" if first.startswith("\\") else "(") + ("]" if second.startswith("\\") else ")")
        return _Structure(brackets, (low, high))
    return None


def _compare_structures(
    a: _Structure | None, b: _Structure | None, tolerance: float, depth: int
) -> bool | object | None:
    if a is None and b is None:
        return _NO_STRUCTURE
    if a is None or b is None:
        one = a or b
        # A single value equals neither a set nor several numbers. A bare list may still be words.
        return (
            False if one.brackets != "" or all(read_quantity(item) for item in one.items) else _NO_STRUCTURE
        )
    unordered = {a.brackets, b.brackets} <= {"", "{}"}
    if (a.brackets != b.brackets and not unordered) or len(a.items) != len(b.items):
        return False
    in_order = [_compare(x, y, tolerance, depth + 1) for x, y in zip(a.items, b.items, strict=True)]
    if all(in_order):
        return True
    is_words = any(re.search(r"[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", "", item)) for item in b.items)
    if not unordered or (is_words and b.brackets != "{}"):
        return None if None in in_order and False not in in_order else False
    return _match_all(a.items, b.items, tolerance, depth)


def _match_all(a: tuple[str, ...], b: tuple[str, ...], tolerance: float, depth: int) -> bool | None:
    """Compares two collections whose order does not matter."""
    left = list(b)
    unclear = False
    for item in a:
        verdicts = [_compare(item, other, tolerance, depth + 1) for other in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            unclear = True
        else:
            return False
    return None if unclear else True


def _compare_words(a: str, b: str) -> bool | None:
    """Compares answers if one of them consists of words. Otherwise it returns `None`."""
    a, b = (re.sub(r"\\emptyset", "emptyset", text) for text in (a, b))
    choices = [_CHOICE.fullmatch(text) for text in (a, b)]
    if all(choices):
        return choices[0][1].lower() == choices[1][1].lower()
    prose = [re.search(r"[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", "", text)) is not None for text in (a, b)]
    plain = [re.fullmatch(r"[^\W\d_]+(?:[ .'’!?-]+[^\W\d_]+)*[.!?]*", text) is not None for text in (a, b)]
    if not (any(prose) or all(plain)):
        return None
    return _folded(a) == _folded(b)


def _folded(text: str) -> str:
    return " ".join(re.sub(r"[.!?]+(?= |$)", "", text.casefold()).split()).strip("\"' ")
