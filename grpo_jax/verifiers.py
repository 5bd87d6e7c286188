"""Read an answer out of a text and compare it with the expected one.

Numbers are exact fractions, so that ``0.1``, ``.10`` and ``1/10`` are one value. The texts come from a
model: every pattern here runs in linear time and no number is large enough to hurt.
"""

import math
import numbers
import re
from fractions import Fraction
from typing import Literal

# A sign belongs to the number only where it cannot be a minus between two terms: "7-5" is 7 and 5,
# "= -2" is -2. Digits inside a word ("GPT2", "x1") are not numbers; a unit may follow ("5kg", "50%").
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])"
    r"((?:(?<![)\]])[-+])?)"
    r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))(\.[0-9]+)?"
    r"(?:([eE][-+]?[0-9]{1,3})(?![0-9A-Za-z]))?"
    r"(?:[ ]?/[ ]?([0-9]+)(?![0-9]|[./][0-9]))?",
    re.ASCII,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([-+]?[0-9]+)\}\{([0-9]+)\}")
_MAX_CHARACTERS = 400  # of one number; a longer digit string is noise, and slow to turn into an integer


def find_numbers(text: str) -> list[Fraction]:
    """Finds the numbers of a text, in order.

    Understood are signs (also the Unicode minus), thousands commas, decimals, exponents, fractions of two
    integers (``3/4``, ``\\frac{3}{4}``) and anything glued behind a number (``5kg``; ``50%`` is 50).
    Digits inside a word and divisions by zero are not numbers.

    >>> [float(x) for x in find_numbers("1,250 apples - 2.5 = -3/4")]
    [1250.0, 2.5, -0.75]
    """
    text = text.replace("\u2212", "-").replace("{,}", ",")
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    found = (_value(match) for match in _NUMBER.finditer(text))
    return [value for value in found if value is not None]


def _value(match: re.Match) -> Fraction | None:
    if match.end() - match.start() > _MAX_CHARACTERS:
        return None
    sign, whole, decimals, exponent, denominator = match.groups()
    value = Fraction((whole.replace(",", "") or "0") + (decimals or "") + (exponent or ""))
    if denominator is not None:
        if int(denominator) == 0:
            return None
        value /= int(denominator)
    return -value if sign == "-" else value


def last_boxed(text: str) -> str | None:
    """Returns what the last ``\\boxed{...}`` holds (braces balanced), None without a complete one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def extract_number(text: str, *, which: Literal["last", "first"] = "last") -> Fraction | None:
    """Extracts the number that a text gives as its answer.

    A marked answer wins: the content of the last ``\\boxed{...}``, else what follows the last ``####``.
    Without a mark it is the last (or first) number of the whole text.

    Args:
        text: a completion, or an expected answer.
        which: which number counts when there are several.

    Returns:
        The number, None when there is none.

    >>> extract_number("3 + 4 is 7. #### 7")
    Fraction(7, 1)
    """
    if which not in ("last", "first"):
        raise ValueError(f"which={which!r}: choose 'last' or 'first'")
    marked = last_boxed(text)
    if marked is None and "####" in text:
        marked = text.rsplit("####", 1)[1]
    found = find_numbers(text if marked is None else marked)
    if not found:
        return None
    return found[-1] if which == "last" else found[0]


def as_number(value: object) -> Fraction:
    """Turns an expected answer, a number or a text with one, into an exact number.

    Raises:
        ValueError: no number in it, NaN or infinite.
    """
    if isinstance(value, str):
        found = extract_number(value)
        if found is None:
            raise ValueError(f"the expected answer {value!r} has no number in it")
        return found
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        # repr, not the binary value: the answer 0.1 means one tenth
        exact = isinstance(value, (int, Fraction))
        return Fraction(value) if exact else Fraction(repr(float(value)))
    raise ValueError(f"the expected answer {value!r} is not a finite number")


def numbers_equal(a: Fraction, b: Fraction, *, tolerance: float = 1e-6) -> bool:
    """Compares two numbers: ``|a - b| <= tolerance * max(1, |b|)``; a tolerance of 0 means exactly."""
    return abs(a - b) <= Fraction(tolerance) * max(Fraction(1), abs(b))


def texts_equal(a: str, b: str) -> bool:
    """Compares two texts without the white space around them."""
    return a.strip() == b.strip()
