"""Expressions: exact, and nothing but arithmetic is ever computed."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards.expressions import evaluate_expression, find_expression, reaches_target


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, [7]),
        (" 1 + 2*3 ", 7, [1, 2, 3]),
        ("(1+2)*3", 9, [1, 2, 3]),
        ("1/3*3", 1, [1, 3, 3]),
        ("8/(3-8/3)", 24, [8, 3, 8, 3]),
        ("10 - -4", 14, [10, 4]),
        ("-(3-5)", 2, [3, 5]),
        ("3 × 4 ÷ 2 − 1", 5, [3, 4, 2, 1]),
    ],
)
def test_values_of_expressions(text, value, numbers):
    assert evaluate_expression(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "1+", "2**3", "7//2", "7%2", "1.5", "1_000", "1e3", "007", "3(4)", "(1", "1,2", "1 2", "[1]",
        "1/0", "1/(2-2)", "__import__('os')", "1==1", "1 if 2 else 3", "True", "~1", "+1+", "١", "()",
        "1\n+2", "1" * 201, "(" * 99 + "1" + ")" * 99 + "+",
    ],
)  # fmt: skip
def test_texts_that_are_not_expressions(text):
    assert evaluate_expression(text) is None


@given(st.text(alphabet="0123456789+-*/() \n=<>answer\\{}box", max_size=60))
def test_no_text_raises(text):
    evaluate_expression(text)
    assert reaches_target(text, [1, 2], 3) in (True, False)


def test_deep_and_long_texts_cost_nothing():
    start = time.perf_counter()
    for text in ("(" * 100 + "1" + ")" * 99, "-" * 199 + "1", "9" * 98 + "*" + "9" * 98):
        evaluate_expression(text)
    reaches_target("<answer>" * 50_000 + "\\boxed{" * 50_000 + "</answer>", [1], 1)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" 3*4\nNumbers: 5", "3*4"),
        ("\n\n 3*4 = 12\n", "3*4"),
        ("First 1+1. <answer>1+2</answer> or <answer> (3+4) = 7 </answer>", "(3+4)"),
        ("so \\boxed{3 \\times 4} it is", "3 * 4"),
        ("\\boxed{1+1} <answer>2+2</answer>", "2+2"),
        ("<answer>1+1", "<answer>1+1"),
        ("</answer> 1", "</answer> 1"),
        ("", ""),
    ],
)
def test_where_the_expression_is(text, found):
    assert find_expression(text) == found


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        (" 3*4 + 5", True),
        (" (3+5)*4 - 5 - 10", False),  # 5 twice, and no 10
        ("17", False),  # not one of the numbers
        (" 3*4", False),
        ("5 + 4*3 = 99", True),
        ("I do not know", False),
    ],
)
def test_an_expression_must_reach_the_target(text, reached):
    assert reaches_target(text, [3, 4, 5], 17) is reached


def test_each_number_may_be_used_once():
    assert reaches_target("3+3", [3, 3], 6) and not reaches_target("3+3", [3, 5], 6)
    assert reaches_target("6", [6, 1], 6)  # not all numbers are needed
    assert evaluate_expression("1/3 + 1/6") == (Fraction(1, 2), [1, 3, 1, 6])
