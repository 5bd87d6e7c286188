import doctest
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import verifiers
from grpo_jax.verifiers import (
    PLACES,
    answers_equal,
    as_number,
    extract_answer,
    extract_number,
    find_numbers,
    last_boxed,
    math_equal,
    numbers_equal,
    tag_answer,
    texts_equal,
)


def test_docstring_examples_hold():
    assert doctest.testmod(verifiers).failed == 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("no numbers", []),
        ("12", [12]),
        ("+5", [5]),
        ("= -2", [-2]),
        ("x=-5", [-5]),
        ("3-(-5)", [3, -5]),
        ("7-5", [7, 5]),  # a minus between two terms is no sign
        ("7 - 5", [7, 5]),
        ("(2)-3", [2, 3]),
        ("\u22123", [-3]),  # the Unicode minus
        ("3.", [3]),  # the end of a sentence
        ("3.5.", ["7/2"]),
        (".5 and -.25", ["1/2", "-1/4"]),
        ("$1,234.50", ["2469/2"]),
        ("12,345,678", [12345678]),
        ("1{,}234", [1234]),
        ("1,2,3", [1, 2, 3]),  # a list, not thousands
        ("1, 234", [1, 234]),
        ("1e3 2.5E-1", [1000, "1/4"]),
        ("5e", [5]),
        ("5kg at 50%", [5, 50]),
        ("GPT2 x1 a_3", []),
        ("3/4.", ["3/4"]),
        ("-3 / 4", ["-3/4"]),
        ("1/0", []),
        ("1/2.5", [1, "5/2"]),
        (r"\frac{-1}{2} \dfrac{3}{4}", ["-1/2", "3/4"]),
    ],
)
def test_numbers_are_found_exactly(text, expected):
    assert find_numbers(text) == [Fraction(x) for x in expected]


@given(st.integers(-(10**12), 10**12))
def test_any_integer_is_read_back_in_every_spelling(n):
    for spelling in (f"{n}", f"{n:,}", f"{n}.0", f"so it is {n:,}.", f"#### {n}"):
        assert extract_number(spelling) == n


@given(st.text(max_size=60))
def test_no_text_breaks_the_extraction(text):
    extract_number(text)


def test_the_last_or_the_first_number_counts():
    assert extract_number("3 + 4 = 7") == 7
    assert extract_number("3 + 4 = 7", which="first") == 3
    assert extract_number("none") is None
    with pytest.raises(ValueError, match="middle"):
        extract_number("1", which="middle")


def test_a_marked_answer_wins():
    assert extract_number("#### 18\nchecked in 3 steps", which="first") == 18
    assert extract_number(r"1 \boxed{2} 3") == 2
    assert extract_number(r"\boxed{1} then \boxed{-\frac{3}{4}} of 9") == Fraction(-3, 4)
    assert extract_number("#### none, 5 before: no") == 5
    assert extract_number("4 #### none") is None


def test_boxes_are_balanced():
    assert last_boxed(r"\boxed{a{b}c} d}") == "a{b}c"
    assert last_boxed(r"\boxed{a") is None
    assert last_boxed("a") is None


@pytest.mark.parametrize("tokens", ["9", "1,111", "-", "1 / ", "1.", r"\boxed{", "1e999 ", "####"])
def test_hostile_texts_cost_linear_time(tokens):
    start = time.perf_counter()
    extract_number(tokens * 20_000)
    assert time.perf_counter() - start < 2


def test_a_monstrous_number_is_noise():
    assert extract_number("5 " + "9" * 5000) == 5
    assert extract_number("1e999999999") == 1  # no such exponent: read like "1 e..."


def test_expected_answers_may_be_numbers_or_texts():
    assert as_number(0.1) == as_number("0.1") == as_number("1/10") == Fraction(1, 10)
    assert as_number(np.int64(7)) == as_number(np.float64(7)) == as_number("It is 7. #### 7") == 7
    assert as_number(Fraction(1, 3)) == Fraction(1, 3)
    for bad in ("seven", float("nan"), float("inf"), None, True, [7]):
        with pytest.raises(ValueError, match="expected answer"):
            as_number(bad)


def test_equality_is_tolerant_and_can_be_exact():
    third = as_number("0.333333333")
    assert numbers_equal(third, Fraction(1, 3))
    assert not numbers_equal(third, Fraction(1, 3), tolerance=0)
    assert not numbers_equal(Fraction(7), Fraction(8))
    assert numbers_equal(Fraction(10**9 + 1), Fraction(10**9))  # relative for large numbers
    assert texts_equal(" a b\n", "a b") and not texts_equal("a  b", "a b")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<answer> 3 </answer>", "3"),
        ("<answer>1</answer> no, <answer>2</answer>.", "2"),
        ("<answer>1</answer> and <answer>unfinished", "1"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer></answer>", ""),
        ("</answer><answer>", None),
        ("<answer>never closed", None),
        ("</answer>", None),
        ("", None),
    ],
)
def test_the_last_complete_tag(text, expected):
    assert tag_answer(text) == expected
    assert tag_answer(text.replace("answer", "x"), "x") == expected


EVERYWHERE = r"<answer>1</answer> \boxed{ 2 } or 3, even 7/2 #### 4 kg "


@pytest.mark.parametrize(
    "where, expected, without",
    [
        ("boxed", "2", None),
        ("hashes", "4 kg", None),
        ("tag", "1", None),
        ("last_number", "4", None),
        ("first_number", "1", None),
        ("text", EVERYWHERE.strip(), "none"),
    ],
)
def test_places_of_an_answer(where, expected, without):
    assert extract_answer(EVERYWHERE, where=where) == expected
    assert extract_answer(" none\n", where=where) == without
    assert where in PLACES


def test_an_unknown_place():
    with pytest.raises(ValueError, match="where='box': choose one of boxed, hashes, tag"):
        extract_answer("", where="box")


@pytest.mark.parametrize(
    "a, b, equal",
    [
        ("7", "7.0", True),
        ("1,250", "1250", True),
        ("$\\frac{1}{2}$", "0.5", True),
        ("7/2", "3.5.", True),
        ("\u22123", "-3", True),
        ("7", "8", False),
        ("7 kg", "7", False),  # text: the unit may be wrong
        ("7 kg", " 7 kg", True),
        ("Paris", "Paris\n", True),
        ("Paris", "paris", False),
        ("", "0", False),
        ("1/0", "1/0", True),
    ],
)
def test_answers_are_equal_as_numbers_or_as_texts(a, b, equal):
    assert answers_equal(a, b) == equal
    assert answers_equal(b, a) == equal


def test_answers_within_a_tolerance():
    assert answers_equal("3.2", "3", tolerance=0.1) and not answers_equal("3.4", "3", tolerance=0.1)


# Mathematics


@pytest.mark.parametrize(
    "text, answer, equal",
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", True),
        (r"so \boxed{0.5}", r"$\frac{1}{2}$", True),
        (r"$x^2 + 2x + 1$", r"\boxed{(x+1)^2}", True),
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}", True),
        (r"The answer is 7.", "7", True),
        (r"\boxed{8}", "7", False),
        ("no mathematics", "7", False),
        (r"\boxed{7}", "", None),
    ],
)
def test_equal_as_mathematics(text, answer, equal):
    pytest.importorskip("math_verify")
    assert math_equal(text, answer) is equal


def test_mathematics_outside_the_main_thread():
    """math-verify measures time with signals, which only a main thread may set."""
    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(math_equal, r"\boxed{\sqrt{4}}", "2").result() is True


def test_without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"needs the package math-verify .*grpo-jax\[math\]"):
        math_equal("7", "7")
