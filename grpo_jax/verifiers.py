"""Read an answer out of a text and compare it with the expected one.

Numbers are exact fractions, so that ``0.1``, ``.10`` and ``1/10`` are one value. The texts come from a
model: every pattern here runs in linear time and no number is large enough to hurt.
"""

import math
import numbers
import re
import threading
from fractions import Fraction
from typing import Literal, get_args

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
_MATH_SECONDS = 5  # of math-verify for one text, where it can measure them

Where = Literal["boxed", "hashes", "tag", "last_number", "first_number", "text"]
PLACES: tuple[str, ...] = get_args(Where)


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


def tag_answer(text: str, tag: str = "answer") -> str | None:
    """Returns what the last complete ``<tag>...</tag>`` holds, None without one.

    >>> tag_answer("<think>2 or 3?</think><answer> 3 </answer>")
    '3'
    """
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end].strip()


def extract_answer(text: str, *, where: Where, tag: str = "answer") -> str | None:
    r"""Returns the part of a text that is its answer, None when it is not there.

    Args:
        text: a completion.
        where: the last ``\boxed{}`` (`boxed`), behind the last ``####`` (`hashes`), in the last
            ``<tag>...</tag>`` (`tag`), the `last_number` or `first_number`, or the whole `text`.
        tag: of `tag`.

    >>> extract_answer("so 7. #### 7 ", where="hashes")
    '7'
    """
    if where not in PLACES:
        raise ValueError(f"where={where!r}: choose one of {', '.join(PLACES)}")
    if where == "boxed":
        return None if (boxed := last_boxed(text)) is None else boxed.strip()
    if where == "hashes":
        return text.rsplit("####", 1)[1].strip() if "####" in text else None
    if where == "tag":
        return tag_answer(text, tag)
    if where == "text":
        return text.strip()
    found = find_numbers(text)
    return str(found[-1 if where == "last_number" else 0]) if found else None


def answers_equal(a: str, b: str, *, tolerance: float = 1e-6) -> bool:
    """Compares two answers: as numbers where each is one and nothing else, else as texts.

    >>> answers_equal("$1,250.0", "1250"), answers_equal("Paris", "paris")
    (True, False)
    """
    numbers_ = [_only_number(text) for text in (a, b)]
    if None in numbers_:
        return texts_equal(a, b)
    return numbers_equal(*numbers_, tolerance=tolerance)


def _only_number(text: str) -> Fraction | None:
    text = text.strip().strip("$").removesuffix(".").strip()
    text = _LATEX_FRACTION.sub(r"\1/\2", text.replace("\u2212", "-").replace("{,}", ","))
    match = _NUMBER.fullmatch(text)
    return None if match is None else _value(match)


def load_math_verify():
    """Imports math-verify, which decides whether two expressions are equal.

    Raises:
        ImportError: it is not installed; the message says how.
    """
    try:
        import math_verify
    except ImportError as error:
        raise ImportError(
            f'comparing expressions needs the package math-verify ({error}): pip install "grpo-jax[math]"'
        ) from None
    return math_verify


def math_equal(text: str, answer: str) -> bool | None:
    r"""Says whether a text gives the expected answer, as mathematics: ``\frac{1}{2}`` is ``0.5``.

    Args:
        text: a completion; math-verify looks for LaTeX (``\boxed{}`` first) and plain expressions in it.
        answer: expected; plain, in ``$...$``, or a text with the answer in ``\boxed{}``.

    Returns:
        None when math-verify finds no mathematics in the expected answer.
    """
    math_verify = load_math_verify()
    # Its time limits are alarms, which only a main thread may set. Elsewhere a reward's timeout bounds it.
    seconds = _MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    if not re.search(r"\$|\\boxed|\\\(|\\\[", answer):  # LaTeX is read in an environment only
        answer = f"\\boxed{{{answer}}}"
    expected = math_verify.parse(answer, parsing_timeout=seconds)
    if not expected:
        return None
    given = math_verify.parse(text, parsing_timeout=seconds)
    return bool(math_verify.verify(expected, given, timeout_seconds=seconds))


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
