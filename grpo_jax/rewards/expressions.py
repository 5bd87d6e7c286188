"""Evaluates arithmetic expressions that a model wrote, exactly and without `eval`."""

import ast
import operator
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from grpo_jax.rewards.answers.extraction import last_boxed, tag_answer

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_CHARACTERS = re.compile(r"[0-9+\-*/() ]{1,200}")  # the limit bounds depth and size of everything below
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "\u00a0": " "})
_LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": ""}


def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Evaluates whole numbers joined by ``+ - * /`` and parentheses, exactly.

    Args:
        text: the expression alone.

    Returns:
        (value, the numbers in the expression), or `None` for other texts and for a division by zero.

    >>> evaluate_expression("(7 - 1) / 4")
    (Fraction(3, 2), [7, 1, 4])
    """
    text = text.translate(_SIGNS).strip()
    if not _CHARACTERS.fullmatch(text):
        return None
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise ValueError("not an arithmetic expression")

    try:
        return value(ast.parse(text, mode="eval").body), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def find_expression(text: str) -> str:
    r"""Returns the part of a completion that should be an expression.

    It is the content of the last ``<answer>...</answer>``, or without one of the last ``\boxed{...}``, or
    without either the first line with text. An equals sign ends it.
    """
    tagged = tag_answer(text)
    boxed = last_boxed(text)
    if tagged is not None:
        found = tagged
    elif boxed is not None:
        found = boxed
    else:
        found = next((line for line in text.splitlines() if line.strip()), "")
    for command, sign in _LATEX.items():
        found = found.replace(command, sign)
    return found.split("=")[0].strip()


def reaches_target(text: str, numbers: Sequence[int], target: int) -> bool:
    """Says whether a completion's expression equals the target and uses each number at most once."""
    evaluated = evaluate_expression(find_expression(text))
    if evaluated is None:
        return False
    value, used = evaluated
    return value == target and not Counter(used) - Counter(numbers)
