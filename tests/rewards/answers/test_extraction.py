import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards.answers.extraction import (
    PLACES,
    as_number,
    extract_answer,
    extract_number,
    find_numbers,
    last_boxed,
    marked_answer,
    tag_answer,
)


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
        ("10,\\!000 1\\,250 1\u202f250", [10000, 1250, 1250]),
        ("\u20133", [-3]),  # an en dash
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
    assert extract_number("#### 18\nchecked in 3 steps") == 18
    assert extract_number(r"\boxed{x = 18}") == extract_number("#### 9 * 2 = 18") == 18


@pytest.mark.parametrize(
    "boxed", [r"5\pi", r"\sqrt{18}", "(17, 18)", r"17 \text{ or } 18", "10:18", "x^18", "2x"]
)
def test_the_last_number_of_a_marked_expression_is_not_an_answer(boxed):
    assert extract_number(rf"so \boxed{{{boxed}}}") is None


def test_boxes_are_balanced():
    assert last_boxed(r"\boxed{a{b}c} d}") == "a{b}c"
    assert last_boxed(r"\boxed{a") is None
    assert last_boxed("a") is None
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed(r"\boxed{\left\{ 1 \right.} 2") == r"\left\{ 1 \right."


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{7}, corrected: \boxed{18}", "18"),
        (r"\boxed{18}. Let me check: \boxed{", "18"),
        (r"\boxed{18}. Let me check: \boxed{\frac{1}{", "18"),
        (r"\boxed{ \text{not} \boxed{18}", "18"),
        (r"\boxed{so \boxed{18}}", "18"),
        (r"\boxed {18}", "18"),
        (r"\fbox{18}", "18"),
        (r"\boxed 18", "18"),
        (r"\boxed18.", "18."),
        (r"\boxed\frac{3}{4}", r"\frac{3}{4}"),
        (r"\\boxed{18}", "18"),  # escaped twice, as in JSON
        (r"{ \boxed{18}", "18"),
        (r"} \boxed{18}", "18"),
        (r"\boxed{18", None),
        (r"\boxed", None),
        (r"\boxed ", None),
    ],
)
def test_the_last_complete_box(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"<think>\boxed{17}?</think><answer>18</answer>", "18"),
        (r"<answer>17</answer>, no: \boxed{18}", "18"),
        ("#### 18\n\nQ: What is 2 + 2?\nA: 4", "18"),
        (r"#### \boxed{18}", "18"),
        (r"<answer>It is \boxed{18}.</answer>", "18"),
        ("<answer>The answer is: 18</answer>", "18"),
        ("<answer> 18", None),
        (r"18 \boxed{", None),
        ("18", None),
    ],
)
def test_the_last_mark_of_a_text(text, expected):
    assert marked_answer(text) == expected


@pytest.mark.parametrize(
    "tokens", ["9", "1,111", "-", "1 / ", "1.", r"\boxed{", "1e999 ", "####", r"\boxed ", "}{", "#### 1\n"]
)
def test_hostile_texts_cost_linear_time(tokens):
    start = time.perf_counter()
    extract_number(tokens * 20_000)
    assert time.perf_counter() - start < 2


def test_a_number_of_too_many_digits_is_ignored():
    assert extract_number("5 " + "9" * 5000) == 5
    assert extract_number("1e999999999") == 1  # no such exponent: read like "1 e..."


def test_expected_answers_may_be_numbers_or_texts():
    assert as_number(0.1) == as_number("0.1") == as_number("1/10") == Fraction(1, 10)
    assert as_number(np.int64(7)) == as_number(np.float64(7)) == as_number("It is 7. #### 7") == 7
    assert as_number(Fraction(1, 3)) == Fraction(1, 3)
    for bad in ("seven", float("nan"), float("inf"), None, True, [7]):
        with pytest.raises(ValueError, match="expected answer"):
            as_number(bad)


@pytest.mark.parametrize(
    "gold, number",
    [
        ("18 dollars", 18),
        (r"\$1,250.50", "2501/2"),
        (r"50\%", 50),
        (r"3\frac{1}{2}", "7/2"),
        (r"1.5 \times 10^4", 15000),
        ("2^{10}", 1024),
        (r"10,\!000", 10000),
        ("x = 18", 18),
        ("The answer is 18.", 18),
        (r"Then $2x = 36$, so \boxed{18}.", 18),
        ("1331 square feet", 1331),
    ],
)
def test_expected_answers_that_are_a_number_with_a_unit(gold, number):
    assert as_number(gold) == Fraction(number)


@pytest.mark.parametrize(
    "gold",
    [
        r"\sqrt{2}", r"2\sqrt{3}", r"\frac{\sqrt{3}}{2}", r"5\pi", "x^2+2x+1", "(1, 2)", "[0, 1)", "10:30",
        "1331 and 1728", "17 or 18", "1, 2", "1 2", "2 hours 30 minutes", "It is 7.", "2x", "[12, 34]",
    ],
)  # fmt: skip
def test_an_expected_answer_that_is_more_is_never_read_as_its_last_number(gold):
    with pytest.raises(ValueError, match="more than a number with a unit; use answer_match or math_answer"):
        as_number(gold)


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
