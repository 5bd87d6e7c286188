"""Finds the answer in a text, by its mark or by its numbers.

Numbers are exact fractions, so that ``0.1``, ``.10`` and ``1/10`` are one value. The texts come from a
model, so every pattern here runs in linear time, and numbers are limited in length.
`grpo_jax/rewards/answers/equality.py` compares the answers.
"""

import math
import numbers
import re
from fractions import Fraction
from typing import Literal, get_args

from grpo_jax.rewards.answers.quantities import read_quantity, right_side
from grpo_jax.rewards.answers.text import clean_answer, without_lead

# A sign belongs to the number only where it cannot be a minus between two terms: "7-5" is 7 and 5, but
# "= -2" is -2. Digits inside a word ("GPT2", "x1") are not numbers. A unit may follow ("5kg", "50%").
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])"
    r"((?:(?<![)\]])[-+])?)"
    r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))(\.[0-9]+)?"
    r"(?:([eE][-+]?[0-9]{1,3})(?![0-9A-Za-z]))?"
    r"(?:[ ]?/[ ]?([0-9]+)(?![0-9]|[./][0-9]))?",
    re.ASCII,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([-+]?[0-9]+)\}\{([0-9]+)\}")
# Spaces that separate groups of three digits in LaTeX and in typography, as a comma does.
_GROUP_SPACE = re.compile(r"(?<=[0-9])(?:\\[, ]|[\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_BOX_OR_BRACE = re.compile(
    r"(?P<box>\\(?:boxed|fbox|framebox)\s*\{)"
    r"|\\(?:boxed|fbox)\s*(?P<word>[-+.0-9][^\s{}$\\]*|\\[dt]?frac\{[^{}]*\}\{[^{}]*\}|(?<=\s)[A-Za-z](?![A-Za-z]))"
    r"|\\\\(?!boxed|fbox|framebox)|\\[{}]|[{}]"
)
_FIRST_WORDS = re.compile(r"^\\(?:text|textbf|mathrm)\{([^{}]{1,60}[:=] ?)\}")
_REST_OF_LINE = re.compile(r"\s*([^\n]*)")
_MAX_CHARACTERS = 400  # limit for one number: longer digit strings are noise, and slow to convert

Where = Literal["boxed", "hashes", "tag", "last_number", "first_number", "text"]
PLACES: tuple[str, ...] = get_args(Where)


def find_numbers(text: str) -> list[Fraction]:
    """Finds the numbers of a text, in order.

    It understands signs (also the Unicode minus), thousands commas, decimals, exponents and fractions of two
    integers (``3/4``, ``\\frac{3}{4}``). What directly follows a number is left out, so ``5kg`` is 5 and
    ``50%`` is 50. Digits inside a word and divisions by zero are not numbers.

    >>> [float(x) for x in find_numbers("1,250 apples - 2.5 = -3/4")]
    [1250.0, 2.5, -0.75]
    """
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace("{,}", ",").replace(r",\!", ",")
    text = _LATEX_FRACTION.sub(r"\1/\2", _GROUP_SPACE.sub(",", text))
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
    r"""Returns the content of the last complete ``\boxed{...}`` or ``\fbox{...}``, or `None` without one.

    Braces inside must be balanced, and escaped braces (``\{``) do not count. Without braces, the next word
    is the content, as in ``\boxed 18``. A box that is never closed, as when the token limit truncates a
    completion, is not an answer.

    >>> last_boxed(r"\boxed{7}, corrected: \boxed {18}. Let me check: \boxed{")
    '18'
    """
    return None if (found := _last_box(text)) is None else found[0]


def _last_box(text: str) -> tuple[str, int] | None:
    """Returns (content, end) of the complete box that starts last. It passes over the text once."""
    start = -1
    content = ""
    end = -1
    open_braces: list[tuple[int, int]] = []  # (start of its box or -1, start of its content)
    for match in _BOX_OR_BRACE.finditer(text):
        if match["box"] is not None or match[0] == "{":
            open_braces.append((-1 if match[0] == "{" else match.start(), match.end()))
        elif match["word"] is not None:
            start = match.start()
            content = match["word"]
            end = match.end()
        elif match[0] == "}" and open_braces:
            opened, inside = open_braces.pop()
            if opened > start:
                start = opened
                content = text[inside : match.start()]
                end = match.end()
    return None if start < 0 else (content, end)


def tag_answer(text: str, tag: str = "answer") -> str | None:
    """Returns the content of the last complete ``<tag>...</tag>``, or `None` without one.

    >>> tag_answer("<think>2 or 3?</think><answer> 3 </answer>")
    '3'
    """
    return None if (found := _last_tag(text, tag)) is None else found[0]


def _last_tag(text: str, tag: str) -> tuple[str, int] | None:
    """Returns (content, end) of the last complete tag."""
    start = text.rfind(f"<{tag}>", 0, max(text.rfind(f"</{tag}>"), 0))
    if start < 0:
        return None
    end = text.find(f"</{tag}>", start)
    return text[start + len(tag) + 2 : end].strip(), end + len(tag) + 3


def _last_hashes(text: str) -> tuple[str, int] | None:
    """Returns (content, end) of the line after the last ``####``, or of the next line if that is empty."""
    start = text.rfind("####")
    if start < 0:
        return None
    match = _REST_OF_LINE.match(text, start + 4)
    return match[1].strip(), match.end()


def marked_answer(text: str, *, tag: str = "answer") -> str | None:
    r"""Returns the answer at the last mark of a text (a box, a tag or ``####``), or `None` without a mark.

    >>> marked_answer(r"<think>\boxed{17}?</think> <answer>18</answer>")
    '18'
    """
    found = [
        place for place in (_last_box(text), _last_tag(text, tag), _last_hashes(text)) if place is not None
    ]
    return _inner(max(found, key=lambda place: place[1])[0]) if found else None


def has_open_mark(text: str, *, tag: str = "answer") -> bool:
    r"""Says whether a text ends inside a tag or a box, as a truncated completion does."""
    opened = text.rfind("\\boxed{")
    return text.rfind(f"<{tag}>") > text.rfind(f"</{tag}>") or (opened >= 0 and "}" not in text[opened:])


def _inner(answer: str) -> str:
    """Returns a marked answer without a second box around it, and without words such as `The answer is`."""
    boxed = last_boxed(answer)
    answer = (answer if boxed is None else boxed).strip()
    return without_lead(_FIRST_WORDS.sub(r"\1 ", answer))


def extract_answer(text: str, *, where: Where, tag: str = "answer") -> str | None:
    r"""Returns the part of a text that is its answer, or `None` if there is no such part.

    Args:
        text: a completion.
        where: place of the answer: the last complete ``\boxed{}`` (`boxed`), the rest of the line after the
            last ``####`` (`hashes`), the last complete ``<tag>...</tag>`` (`tag`), the `last_number` or
            `first_number`, or the whole `text`. If a mark contains a box, the content of the box is the
            answer. Words such as `The answer is` are removed from the content of a mark.
        tag: name of the tag that `where="tag"` looks for.

    >>> extract_answer("so 7. #### 7 ", where="hashes")
    '7'
    """
    if where not in PLACES:
        raise ValueError(f"where={where!r}: choose one of {', '.join(PLACES)}")
    if where == "text":
        return text.strip()
    if where in ("last_number", "first_number"):
        found = find_numbers(text)
        return str(found[-1 if where == "last_number" else 0]) if found else None
    place = {"boxed": _last_box, "hashes": _last_hashes}.get(where)
    marked = _last_tag(text, tag) if place is None else place(text)
    return None if marked is None else _inner(marked[0])


def extract_number(text: str, *, which: Literal["last", "first"] = "last") -> Fraction | None:
    r"""Extracts the number that a text gives as its answer.

    The content of the last complete ``\boxed{...}`` counts first, and then the line after the last ``####``.
    It must be one number, with or without a unit. An expression or `17 or 18` is not a number. In a text
    without a mark, the last (or first) number counts.

    Args:
        text: a completion.
        which: number that counts in a text without a mark, the `last` or the `first`.

    Returns:
        the number, or `None` if there is none.

    >>> extract_number("3 + 4 is 7. #### 7"), extract_number(r"\boxed{5\pi}")
    (Fraction(7, 1), None)
    """
    if which not in ("last", "first"):
        raise ValueError(f"which={which!r}: choose 'last' or 'first'")
    marked = _last_box(text) or _last_hashes(text)
    if marked is not None:
        return _single_number(_inner(marked[0]))
    found = find_numbers(text)
    if not found:
        return None
    return found[-1] if which == "last" else found[0]


def _single_number(text: str) -> Fraction | None:
    """Reads a marked answer as one number, also in `x = 18`, or as the only number among words."""
    cleaned = right_side(clean_answer(text))
    quantity = read_quantity(cleaned)
    if quantity is not None:
        return quantity.value
    found = find_numbers(cleaned)
    is_maths = re.search(r"[\\^_*/+<>=()\[\]]|[0-9][A-Za-z]", cleaned) is not None
    return found[0] if len(found) == 1 and not is_maths else None


def as_number(value: object) -> Fraction:
    """Converts an expected answer to an exact number.

    Args:
        value: a number, or a text. A text is one number in a spelling that `read_quantity` knows, with or
            without a unit, or it marks such a number by ``####`` or by a box.

    Raises:
        ValueError: there is no number, there is more than a number with a unit, or the number is NaN or
            infinite.
    """
    if isinstance(value, str):
        marked = _last_hashes(value) or _last_box(value)
        text = _inner(value if marked is None else marked[0])
        quantity = read_quantity(right_side(clean_answer(text)))
        if quantity is not None:
            return quantity.value
        if not find_numbers(text):
            raise ValueError(f"the expected answer {_shown(value)} has no number in it")
        raise ValueError(
            f"the expected answer {_shown(value)} is more than a number with a unit; use answer_match or "
            "math_answer"
        )
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        # A float is read by its shortest spelling, not its binary value: the answer 0.1 means one tenth.
        exact = isinstance(value, (int, Fraction))
        return Fraction(value) if exact else Fraction(repr(float(value)))
    raise ValueError(f"the expected answer {value!r} is not a finite number")


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else repr(text[:38] + " ... " + text[-38:])
