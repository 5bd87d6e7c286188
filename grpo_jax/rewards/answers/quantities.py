r"""Reads numbers with or without a unit, in the spellings that people and chat models use.

`1,250`, `1 250`, `3\frac{1}{2}`, `1.5 \times 10^4`, `2^{10}`, `50\%`, `\$18` and `18 square feet` are
quantities. `2x`, `5\pi`, `9 + 9` and `17 or 18` are not, and their last number never stands for them.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from grpo_jax.rewards.answers.text import CURRENCY

_MAX_BITS = 4000  # limit for a power
_MAX_DIGITS = 400

_NUMBER = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]+)"
    r"(?![0-9])"
    r"(?:\.[0-9]*)?|\.[0-9]+)"
)
_SIGN = r"(?:[-+] ?)?"
_EXPONENT = r" ?(?:\^|\*\*) ?(?:\{ ?([-+]? ?[0-9]{1,4}) ?\}|([-+]?[0-9]{1,4}))"
_PART = rf"(?:\{{ ?({_SIGN}{_NUMBER}) ?\}}|([0-9]))"
_FRACTION = re.compile(rf"\\frac ?{_PART} ?{_PART}", re.ASCII)
_OVER = re.compile(rf"({_NUMBER}) ?/ ?({_SIGN}{_NUMBER})(?![0-9.])", re.ASCII)
_PLAIN = re.compile(_NUMBER, re.ASCII)
_POWER = re.compile(rf"({_NUMBER}){_EXPONENT}", re.ASCII)
_TIMES_TEN = re.compile(rf"({_NUMBER}) ?[*xX] ?10{_EXPONENT}", re.ASCII)
_E = re.compile(rf"({_NUMBER})[eE]([-+]?[0-9]{{1,3}})(?![0-9A-Za-z])", re.ASCII)
_REPEATING = re.compile(r"([0-9]{0,50})\.([0-9]{0,50})\\overline ?\{ ?([0-9]{1,50}) ?\}", re.ASCII)
_MIXED = re.compile(r"([0-9]{1,9}(?:,[0-9]{3})*)( ?\\frac| (?=[0-9]{1,9} ?/))", re.ASCII)

_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
# Canonical units, each with its other spellings. A plural s is removed before the look-up.
_SPELLINGS = {
    "%": "percent pct percentage", CURRENCY: "dollar usd buck", "€": "euro eur", "£": "pound-sterling gbp",
    "¢": "cent", "deg": "degree", "m": "meter metre", "cm": "centimeter centimetre",
    "mm": "millimeter millimetre", "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet",
    "yd": "yard", "mi": "mile", "g": "gram gramme gm", "mg": "milligram", "kg": "kilogram kilo",
    "lb": "pound", "oz": "ounce", "s": "second sec", "min": "minute", "h": "hour hr", "ms": "millisecond",
    "day": "", "week": "wk", "month": "", "year": "yr", "L": "liter litre l",
    "mL": "milliliter millilitre ml", "gal": "gallon", "mph": "", "rad": "radian",
    "N": "newton", "J": "joule", "kJ": "kj kilojoule",
    "W": "watt", "kW": "kw kilowatt", "V": "volt", "Pa": "pascal", "Hz": "hertz hz", "K": "kelvin",
    "am": "a.m", "pm": "p.m", "unit": "", "degc": "celsiu celsius", "degf": "fahrenheit", "mol": "mole",
    "st": "", "nd": "", "rd": "", "th": "",
}  # fmt: skip
_UNITS = {spelling: unit for unit, others in _SPELLINGS.items() for spelling in (unit, *others.split())}
_LETTERS = set("mghsLlNJWVK")  # units of one letter, because any other letter is a variable
_FILLERS = {
    "per",
    "a",
    "an",
    "each",
    "of",
    "the",
    "in",
    "total",
    "every",
}  # words without a meaning in a unit
_NO_UNIT = {
    "or", "and", "to", "not", "is", "was", "are", "no", "than", "plus", "minus", "times", "over", "mod",
    "modulo", "half", "halve", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "quarter", "hundredth", "thousandth", "squared", "cubed", "factorial", "root", "sqrt", "pi", "tau", "sin",
    "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "det", "gcd", "lcm", "max", "choose", "if", "when",
    "where", "wrong", "incorrect", "negative", "positive", "between", "from", "more", "less", "fewer", "base",
    "remainder", "maybe", "perhaps", "but", "isn't", "solution", "unknown",
}  # fmt: skip

VARIABLE = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?[A-Za-z0-9]+\}?)?"
_MEMBER = re.compile(rf" ?({VARIABLE}) ?\\in(?![a-z]) ?")
_NAME = re.compile(
    rf" ?(?:\\angle )?(?:{VARIABLE}(?:'|\([A-Za-z0-9]{{1,4}}\))?|\([a-z](?:, ?[a-z]){{1,3}}\)|[A-Z]{{1,4}}"
    r"|[A-Za-z ]{3,30}) ?"
)
_VARIABLES = re.compile(r" ?[a-z](?: ?\+ ?[a-z]){1,4} ?")
_EXPRESSION_UNIT = re.compile(r" [A-Za-z]{2,20}(?:(?: |/)[A-Za-z]{2,20}){0,3}(?: ?\^ ?\{? ?[23] ?\}?)?$")
_ARITHMETIC = re.compile(rf"(?:[0-9 +*/().,^!{{}}%{CURRENCY}-]|\\frac)+")


@dataclass(frozen=True)
class Quantity:
    """An exact number and its unit.

    Args:
        value: the number.
        unit: canonical words of the unit, such as ("km", "h") for km/h. It is empty without a unit.
    """

    value: Fraction
    unit: tuple[str, ...] = ()


def read_quantity(text: str) -> Quantity | None:
    r"""Reads a text that is one number, with or without a unit.

    Args:
        text: a text that `clean_answer` returned.

    Returns:
        the number and its unit, or `None` for any other text, such as two numbers, an expression or a list.

    >>> read_quantity(r"3\frac{1}{2}"), read_quantity("1 2")
    (Quantity(value=Fraction(7, 2), unit=()), None)
    """
    text = text.strip()
    if len(text) > _MAX_DIGITS or text.endswith("..."):
        return None
    inside = re.fullmatch(r"\( ?([-+]? ?[^(),]+?) ?\)", text)
    if inside is not None:
        text = inside[1]
    match = re.match(rf"([-+]? ?)({CURRENCY}|€|£|¥|USD|EUR)? ?([-+]? ?)", text)
    before, money, after = match.groups()
    if before.strip() and after.strip():
        return None
    found = _number(text[match.end() :])
    if found is None:
        return None
    value, end = found
    unit = _unit(text[match.end() + end :], money and _UNITS.get(money.lower(), money))
    if unit is None:
        return None
    scale, words = unit
    sign = -1 if "-" in before + after else 1
    return Quantity(sign * value * scale, words)


def _number(text: str) -> tuple[Fraction, int] | None:
    """Reads the unsigned number at the start of a text. Returns (value, end), or `None`."""
    if mixed := _MIXED.match(text):
        whole = Fraction(mixed[1].replace(",", ""))
        start = mixed.end(1)
        part = _fraction(text[start:].lstrip())
        skipped = len(text[start:]) - len(text[start:].lstrip())
        if part is not None and 0 < part[0] < 1:
            return whole + part[0], start + skipped + part[1]
    if (part := _fraction(text)) is not None:
        return part
    if match := _REPEATING.match(text):
        whole, fixed, period = match.groups()
        scale = Fraction(1, 10 ** len(fixed))
        value = Fraction((whole or "0") + fixed) * scale + Fraction(period) * scale / (10 ** len(period) - 1)
        return value, match.end()
    if match := _TIMES_TEN.match(text):
        power = _power(Fraction(10), match[2] or match[3])
        return None if power is None else (_decimal(match[1]) * power, match.end())
    if match := _POWER.match(text):
        power = _power(_decimal(match[1]), match[2] or match[3])
        return None if power is None else (power, match.end())
    if match := _E.match(text):
        return _decimal(match[1]) * Fraction(10) ** int(match[2]), match.end()
    match = _PLAIN.match(text)
    return None if match is None else (_decimal(match[0]), match.end())


def _fraction(text: str) -> tuple[Fraction, int] | None:
    if match := _FRACTION.match(text):
        above = match[1] or match[2]
        below = match[3] or match[4]
    elif match := _OVER.match(text):
        above = match[1]
        below = match[2]
    else:
        return None
    below = _decimal(below)
    return None if below == 0 else (_decimal(above) / below, match.end())


def _decimal(digits: str) -> Fraction:
    digits = re.sub(r"[ ,]", "", digits)
    sign = -1 if digits.startswith("-") else 1
    return sign * Fraction(digits.lstrip("+-").removesuffix(".") or "0")


def _power(base: Fraction, exponent: str) -> Fraction | None:
    exponent = int(exponent.replace(" ", ""))
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent) > _MAX_BITS or (base == 0 and exponent <= 0):
        return None
    return base**exponent


def _unit(text: str, money: str | None = None) -> tuple[int, tuple[str, ...]] | None:
    """Reads the unit that follows a number.

    Args:
        text: the text after the number.
        money: the currency before the number, or `None`.

    Returns:
        (scale, canonical words of the unit, the currency first), or `None` if the text is not a unit.
    """
    attached = not text.startswith(" ")
    text = (
        re.sub(r" ?\^ ?\{? ?\\circ ?\}? ?", " deg ", text)
        .replace("%", " % ")
        .replace(CURRENCY, f" {CURRENCY} ")
    )
    text = re.sub(r"\( ?([A-Za-z ]+) ?\)", r" \1", text).replace("(s)", "").replace("-", " ").strip(" .")
    text = re.sub(r"\bdeg ?([CF])\b", lambda match: f"deg{match[1].lower()}", text)
    if not text:
        return 1, (money,) if money else ()
    scale = 1
    first, _, rest = text.partition(" ")
    if first.lower().rstrip("s") in _SCALES:
        scale = _SCALES[first.lower().rstrip("s")]
        text = rest.strip().removeprefix("of ")
        attached = False
    words = re.findall(r"[A-Za-z'.]+(?: ?\^ ?\{? ?-?[1-3] ?\}?)?|[%€£¢" + CURRENCY + "]|[^ ]", text)
    canonical = _canonical(words if money is None or words[:1] == [money] else [money, *words])
    if canonical is None or len(canonical) > 8 or (words and not canonical):
        return None
    # Without a space, `2m` is two times m and `2xyz` is a product, but `2kg` is a weight.
    first = canonical[0].split("^")[0] if canonical else ""
    is_variable = attached and first.isalpha() and (len(words[0]) == 1 or first not in _SPELLINGS)
    return None if is_variable else (scale, canonical)


def _canonical(words: list[str]) -> tuple[str, ...] | None:
    canonical: list[str] = []
    power = ""
    for word in words:
        name, raised, exponent = word.partition("^")
        name = name.strip().strip(".")
        lower = name.lower()
        if name in "/*" or lower in _FILLERS:
            continue
        if lower in ("square", "sq", "cubic", "cu"):
            power = "2" if lower.startswith("s") else "3"
            continue
        if lower in ("squared", "cubed") and canonical and canonical[-1] in _SPELLINGS:
            canonical[-1] += "^2" if lower == "squared" else "^3"
            continue
        unit = _name(name)
        if unit is None:
            return None
        exponent = re.sub(r"[{} ]", "", exponent) if raised else power
        canonical.append(f"{unit}^{exponent}" if exponent else unit)
        power = ""
    if canonical == ["mph"]:
        return "mi", "h"
    return tuple(canonical) if not power else (*canonical, f"unit^{power}")


def _name(word: str) -> str | None:
    """Returns the canonical name of one word of a unit, or `None` if the word is not a unit."""
    if len(word) == 1:
        known = word in _LETTERS or not word.isalpha()
        return _UNITS.get(word) if known else None
    lower = word.lower()
    singular = lower[:-1] if lower.endswith("s") and not lower.endswith("ss") and len(lower) > 2 else lower
    if word in _UNITS:
        return _UNITS[word]
    if lower in _NO_UNIT or singular in _NO_UNIT:
        return _UNITS["sec"] if lower == "sec" else None
    if lower in _UNITS or singular in _UNITS:
        return _UNITS.get(lower, _UNITS.get(singular))
    return singular if len(word) > 2 and word.replace("'", "").isalpha() else None


def split_equation(text: str) -> tuple[str, str]:
    """Splits `x = 18` and `9*2 = 18` into a name and the right side of the last equals sign.

    Args:
        text: a text that `clean_answer` returned.

    Returns:
        (name, right side), where the name is "" if the left side is a calculation. It is ("", text) for other
        texts, because equations such as `2x = 36` and `x + y = 5` are answers themselves.
    """
    member = _MEMBER.match(text)
    if member:
        return member[1], text[member.end() :]
    *left, right = text.split("=")
    if not left or not right.strip() or len(text) > 300:
        return "", text
    if all(_ARITHMETIC.fullmatch(side) or not side.strip() for side in left):
        return "", right.strip()
    if _NAME.fullmatch(left[0]) and all(_ARITHMETIC.fullmatch(side) for side in left[1:]):
        return re.sub(r"[ {}]", "", left[0]), right.strip()
    return "", text


def is_sum_of_variables(text: str) -> bool:
    """Says whether a text is a sum of letters such as `m + n`, which contests ask for."""
    return _VARIABLES.fullmatch(text) is not None


def split_unit(text: str) -> tuple[str, tuple[str, ...]]:
    r"""Splits an expression such as `2\sqrt{5} cm` into (expression, unit). Other texts have the unit ()."""
    match = _EXPRESSION_UNIT.search(text)
    unit = None if match is None or "\\" not in text[: match.start()] else _unit(match[0])
    if unit is None or unit[0] != 1 or not unit[1] or unit[1][0].split("^")[0] not in _SPELLINGS:
        return text, ()
    return text[: match.start()], unit[1]


def right_side(text: str) -> str:
    """Returns the right side of `x = 18` or `9*2 = 18`, or else the text itself."""
    return split_equation(text)[1]


def same_unit(given: tuple[str, ...], expected: tuple[str, ...]) -> bool:
    """Says whether answers with these units may be equal.

    Either answer may lack a unit. If both have one, their known units must be the same, in order. If no unit
    is known, the words of one must be among the words of the other.
    """
    if not given or not expected or given == expected:
        return True
    known = [[word for word in unit if word.split("^")[0] in _SPELLINGS] for unit in (given, expected)]
    if any(known):
        # `$12` and `$12 per hour` may be equal, but `5 m` and `5 m/s` are not.
        is_money = known[0][:1] == known[1][:1] == [CURRENCY] and min(map(len, known)) == 1
        return is_money or known[0] == known[1]
    words = set(given), set(expected)
    return words[0] <= words[1] or words[1] <= words[0]
