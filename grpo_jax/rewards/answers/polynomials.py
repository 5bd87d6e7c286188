r"""Brings a sum of products into canonical form, in which `2\sqrt{3}` and `\sqrt{12}` are equal.

It knows rational numbers, letters, roots of whole numbers, `+ - * /`, whole powers, `\frac` and `\sqrt`.
Expressions with anything else, such as a function, a relation or a word, have no form, and neither have
expressions that grow too large.
"""

import math
import re
from fractions import Fraction

# {((symbol, exponent), ...): coefficient}. The square root of a prime is (prime, 1/2).
Terms = dict[tuple, Fraction]

_MAX_CHARACTERS = 200
_MAX_DEPTH = 20
_MAX_TERMS = 100
_MAX_BITS = 2000
_MAX_POWER = 12
_MAX_ROOT = 10**6  # largest whole number below a root, because it is factored by trial division
_TOKEN = re.compile(
    r" *(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|\\([A-Za-z]+)|([A-Za-z])|([-+*/^_(){}\[\]]))", re.ASCII
)
_GREEK = {
    "pi", "alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "phi", "rho", "sigma",
    "tau", "omega", "Omega", "Delta",
}  # fmt: skip


class _Unknown(ValueError):
    """The text contains something that this module does not know."""


def canonical_form(text: str) -> Terms | None:
    r"""Returns the terms of an expression, or `None` if this module does not understand it.

    Args:
        text: a text that `clean_answer` returned.

    >>> canonical_form(r"\frac{\sqrt{12}}{4}") == canonical_form(r"\sqrt{3}/2")
    True
    """
    # `1 2` is not a product, and neither is the mixed number `3\frac{1}{2}`.
    if len(text) > _MAX_CHARACTERS or re.search(r"[0-9] +[0-9.]|[0-9] *\\frac *[0-9{]", text):
        return None
    if re.search(r"[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", "", text)):
        return None
    try:
        tokens = _tokens(text)
        terms, end = _sum(tokens, 0, 0)
        return terms if end == len(tokens) else None
    except (_Unknown, RecursionError, ZeroDivisionError, OverflowError):
        return None


def is_rational(terms: Terms) -> bool:
    """Says whether a form is a plain number."""
    return not terms or list(terms) == [()]


def _tokens(text: str) -> list[str]:
    tokens = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _Unknown
        number, command, letter, sign = match.groups()
        if command is not None and command not in _GREEK | {"frac", "sqrt"}:
            raise _Unknown
        tokens.append(number or (command and "\\" + command) or letter or sign)
        position = match.end()
    return tokens


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Terms, int]:
    if depth > _MAX_DEPTH:
        raise _Unknown
    total: Terms = {}
    sign = 1
    if at < len(tokens) and tokens[at] in "+-":
        sign = -1 if tokens[at] == "-" else 1
        at += 1
    while True:
        term, at = _product(tokens, at, depth)
        total = _add(total, term, sign)
        if at >= len(tokens) or tokens[at] not in ("+", "-"):
            return total, at
        sign = -1 if tokens[at] == "-" else 1
        at += 1


def _product(tokens: list[str], at: int, depth: int) -> tuple[Terms, int]:
    value, at = _factor(tokens, at, depth)
    while at < len(tokens):
        token = tokens[at]
        if token in ("*", "/"):
            factor, at = _factor(tokens, at + 1, depth)
            value = _multiply(value, _inverse(factor) if token == "/" else factor)
        elif token in ("+", "-", ")", "}", "]"):
            break
        elif token[0].isdigit():
            raise _Unknown  # `x2` is unclear
        else:
            factor, at = _factor(tokens, at, depth)
            value = _multiply(value, factor)
    return value, at


def _factor(tokens: list[str], at: int, depth: int) -> tuple[Terms, int]:
    value, at = _atom(tokens, at, depth)
    while at < len(tokens) and tokens[at] == "^":
        exponent, at = _argument(tokens, at + 1, depth)
        if not is_rational(exponent):
            raise _Unknown
        value = _power(value, exponent.get((), Fraction(0)))
    return value, at


def _atom(tokens: list[str], at: int, depth: int) -> tuple[Terms, int]:
    if at >= len(tokens):
        raise _Unknown
    token = tokens[at]
    if token in ("(", "{", "["):
        value, at = _sum(tokens, at + 1, depth + 1)
        if at >= len(tokens) or tokens[at] != {"(": ")", "{": "}", "[": "]"}[token]:
            raise _Unknown
        return value, at + 1
    if token == "\\frac":
        above, at = _argument(tokens, at + 1, depth)
        below, at = _argument(tokens, at, depth)
        return _multiply(above, _inverse(below)), at
    if token == "\\sqrt":
        degree = Fraction(2)
        if at + 1 < len(tokens) and tokens[at + 1] == "[":
            root, at = _atom(tokens, at + 1, depth)
            degree = root.get((), Fraction(0))
            at -= 1
        value, at = _argument(tokens, at + 1, depth)
        if degree not in (2, 3, 4) or not is_rational(value):
            raise _Unknown
        return _root(value.get((), Fraction(0)), int(degree)), at
    if token[0].isdigit() or token[0] == ".":
        return _constant(Fraction(token)), at + 1
    if token[0] == "\\" or token.isalpha():
        if at + 1 < len(tokens) and tokens[at + 1] == "_":
            index = tokens[at + 2 : at + 5]
            at += 1
            braced = index[:1] == ["{"]
            if len(index) < (3 if braced else 1) or (braced and index[2] != "}"):
                raise _Unknown
            return {((f"{token}_{index[1] if braced else index[0]}", Fraction(1)),): Fraction(1)}, at + (
                4 if braced else 2
            )
        return {((token, Fraction(1)),): Fraction(1)}, at + 1
    raise _Unknown


def _argument(tokens: list[str], at: int, depth: int) -> tuple[Terms, int]:
    r"""Reads an argument of a LaTeX command: a group, or a single digit or letter, as in `\frac34`."""
    if at < len(tokens) and re.fullmatch(r"[0-9]{2,}", tokens[at]):
        tokens[at : at + 1] = [tokens[at][0], tokens[at][1:]]
    if at < len(tokens) and tokens[at] == "-":
        value, at = _atom(tokens, at + 1, depth)
        return _multiply(value, _constant(Fraction(-1))), at
    return _atom(tokens, at, depth)


def _constant(value: Fraction) -> Terms:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise _Unknown
    return {(): value} if value else {}


def _add(a: Terms, b: Terms, sign: int) -> Terms:
    total = dict(a)
    for key, value in b.items():
        total[key] = total.get(key, Fraction(0)) + sign * value
    if len(total) > _MAX_TERMS:
        raise _Unknown
    return {key: value for key, value in total.items() if value}


def _multiply(a: Terms, b: Terms) -> Terms:
    if len(a) * len(b) > _MAX_TERMS:
        raise _Unknown
    product: Terms = {}
    for left, x in a.items():
        for right, y in b.items():
            exponents: dict = {}
            for symbol, exponent in (*left, *right):
                exponents[symbol] = exponents.get(symbol, Fraction(0)) + exponent
            value = x * y
            for symbol, exponent in list(exponents.items()):
                if isinstance(symbol, int):  # whole powers of the root of a prime are numbers
                    whole = math.floor(exponent)
                    value *= Fraction(symbol) ** whole
                    exponents[symbol] = exponent - whole
            key = tuple(sorted(((s, e) for s, e in exponents.items() if e), key=str))
            product = _add(product, {key: _constant(value).get((), Fraction(0))}, 1)
    return product


def _inverse(terms: Terms) -> Terms:
    if len(terms) != 1:
        raise _Unknown  # the denominator is a sum, or zero
    [(key, value)] = terms.items()
    return _multiply(
        {tuple((symbol, -exponent) for symbol, exponent in key): 1 / value}, _constant(Fraction(1))
    )


def _power(terms: Terms, exponent: Fraction) -> Terms:
    if exponent.denominator != 1 or abs(exponent) > _MAX_POWER:
        raise _Unknown
    base = terms if exponent >= 0 else _inverse(terms)
    value = _constant(Fraction(1))
    for _ in range(abs(int(exponent))):
        value = _multiply(value, base)
    return value


def _root(value: Fraction, degree: int) -> Terms:
    """Returns a root of a rational number as a coefficient times roots of primes."""
    if value < 0 or max(value.numerator, value.denominator) > _MAX_ROOT:
        raise _Unknown
    if value == 0:
        return {}
    result = _constant(Fraction(1))
    for number, sign in ((value.numerator, 1), (value.denominator, -1)):
        for prime, count in _factors(number):
            result = _multiply(result, {((prime, Fraction(sign * count, degree)),): Fraction(1)})
    return result


def _factors(number: int) -> list[tuple[int, int]]:
    found = []
    prime = 2
    while prime * prime <= number:
        count = 0
        while number % prime == 0:
            number //= prime
            count += 1
        if count:
            found.append((prime, count))
        prime += 1
    return found + ([(number, 1)] if number > 1 else [])
