"""Answers as data sets and chat models write them: equal ones are paid, different ones never."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.tasks import load_task
from grpo_jax.rewards.answers.equality import answers_equal, compare_answers, numbers_equal, texts_equal
from grpo_jax.rewards.answers.mathematics import math_equal
from grpo_jax.rewards.answers.polynomials import canonical_form
from grpo_jax.rewards.answers.quantities import read_quantity
from grpo_jax.rewards.builtin import answer_match, math_answer, numeric_answer

# Every line: what the data holds, what a model wrote, where to look, and whether it is right by common sense.
PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "fixtures" / "answer_pairs.jsonl")
    .read_text("utf-8")
    .splitlines()
]
GOLDS, COMPLETIONS = ([pair[name] for pair in PAIRS] for name in ("gold", "completion"))


def wrong_ones(rewards):
    """The pairs whose reward is not what common sense says."""
    return [(pair, reward) for pair, reward in zip(PAIRS, rewards, strict=True) if reward != pair["right"]]


def test_the_table_has_right_and_wrong_answers():
    assert len(PAIRS) > 400 and sum(not pair["right"] for pair in PAIRS) > 100


def test_answer_match_on_the_table():
    rewards = [answer_match([p["completion"]], [p["gold"]], where=p["where"])[0] for p in PAIRS]
    assert wrong_ones(rewards) == []


@pytest.mark.parametrize("with_place", [True, False])
def test_math_answer_on_the_table(with_place):
    pytest.importorskip("math_verify")
    rewards = [
        math_answer([p["completion"]], [p["gold"]], where=p["where"] if with_place else None)[0]
        for p in PAIRS
    ]
    assert wrong_ones(rewards) == []


@pytest.mark.parametrize("pair", [p for p in PAIRS if not p["right"]][::7])
def test_a_wrong_answer_is_wrong_in_a_list_of_golds_too(pair):
    assert answer_match([pair["completion"]], [[pair["gold"], "zzz"]], where=pair["where"]) == [0.0]


# --------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "gold, said, equal",
    [
        ("1000001", "1000000", False),
        ("838102050", "838102000", False),
        ("2147483647", "2147483648", False),
        ("100000000000000000000", "100000000000000000001", False),
        ("1.6e-19", "0", False),
        ("1.6e-19", "9e-7", False),
        ("0.0000005", "0", False),
        ("0", "0.0000001", False),
        ("1.6e-19", "1.6000000001e-19", True),
        ("0.5", "0.5000004", True),
        ("0.3333333333", "1/3", True),
        ("0.333", "1/3", False),
        ("7", "7.0", True),
    ],
)
def test_whole_numbers_are_equal_or_not_and_the_rest_is_relative(gold, said, equal):
    assert numeric_answer([said], [gold]) == [equal]
    assert answer_match([said], [gold], where="text") == [equal]
    assert answer_match([f"#### {said}"], [gold], where="hashes") == [equal]


def test_math_answer_compares_numbers_by_the_same_rule():
    pytest.importorskip("math_verify")
    said = [r"\boxed{1000000}", r"\boxed{0}", r"\boxed{9e-7}", r"\boxed{1/3}", r"\boxed{0.5000004}"]
    assert math_answer(said, ["1000001", "1.6e-19", "1.6e-19", "0.333", "0.5"]) == [0, 0, 0, 0, 1]


def test_wrong_sums_of_many_digits_are_not_paid():
    for digits in (6, 7, 8, 9):
        task = load_task("addition", {"digits": digits})
        golds = [row.columns["answer"] for row in task.evaluation[:50]]
        arguments = task.reward_arguments["numeric_answer"]
        for off in (1, 5, 50, 500):
            assert not any(numeric_answer([f" {int(g) + off}" for g in golds], golds, **arguments))
        assert all(numeric_answer([f" {g}" for g in golds], golds, **arguments))


def test_equality_is_tolerant_and_can_be_exact():
    third = Fraction("0.333333333")
    assert numbers_equal(third, Fraction(1, 3))
    assert not numbers_equal(third, Fraction(1, 3), tolerance=0)
    assert not numbers_equal(Fraction(7), Fraction(8))
    assert not numbers_equal(Fraction(10**9 + 1), Fraction(10**9), tolerance=0.1)
    assert numbers_equal(Fraction("3.2"), Fraction(3), tolerance=0.1)
    assert numbers_equal(Fraction("2.72"), Fraction(3), tolerance=0.1)  # a tenth of 3, not of 2.72
    assert not numbers_equal(Fraction("3.4"), Fraction(3), tolerance=0.1)
    assert texts_equal(" a b\n", "a b") and not texts_equal("a  b", "a b")


@given(st.integers(-(10**12), 10**12), st.integers(1, 1000))
def test_any_whole_number_equals_itself_and_no_other(n, off):
    for spelling in (
        f"{n}",
        f"{n:,}",
        rf"\${n}",
        f"$ {n} $",
        rf"\text{{{n}}}",
        f"x = {n}",
        f"{n} apples",
        f"**{n}**.",
    ):
        assert answers_equal(spelling, str(n))
        assert not answers_equal(spelling, str(n + off))


@given(st.fractions(-1000, 1000, max_denominator=10**4))
def test_any_fraction_equals_itself(x):
    latex = rf"{'-' if x < 0 else ''}\frac{{{abs(x.numerator)}}}{{{x.denominator}}}"
    assert answers_equal(latex, str(x)) and read_quantity(latex).value == x
    assert not answers_equal(latex, str(x + 1))


# ------------------------------------------------------------------- expressions, lists and words


@pytest.mark.parametrize(
    "a, b, equal",
    [
        ("7", "7.0", True),
        ("1,250", "1250", True),
        ("7/2", "3.5.", True),
        ("\u22123", "-3", True),
        ("7", "8", False),
        ("7 kg", "7", True),  # one of them has no unit
        ("7 kg", "7 pounds", False),
        ("7 kg", " 7 kilograms", True),
        ("7 apples", "7 red apples", True),
        ("7 apples", "7 pears", False),
        ("Paris", "Paris\n", True),
        ("Paris", "paris", True),
        ("Paris", "Rome", False),
        ("", "0", False),
        ("", "", False),
        ("1/0", "1/0", True),
    ],
)
def test_answers_are_equal_in_both_directions(a, b, equal):
    assert answers_equal(a, b) == equal
    assert answers_equal(b, a) == equal


@pytest.mark.parametrize(
    "a, b",
    [
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"\sqrt[3]{54}", r"3\sqrt[3]{2}"),
        (r"(x+1)(x-1)", "x^2-1"),
        (r"\frac{a}{b} + 1", "1 + a/b"),
        (r"(1+\sqrt{2})^2", r"3+2\sqrt{2}"),
    ],
)
def test_expressions_have_one_canonical_form(a, b):
    assert canonical_form(a) == canonical_form(b) is not None


@pytest.mark.parametrize(
    "text",
    ["", "cat", "1 2", r"3\frac{1}{2}", "x^", "(x", "x)", "2^{1000}", r"\sin x", "x2",
     r"\frac{1}{0}", "1/(x+1)", "((" * 50, "(a+b+c+d+e)^{12}", "x" * 300,
     r"\sqrt{x}", r"\sqrt{-1}", "9" * 150 + "^{12}"],
)  # fmt: skip
def test_other_texts_have_no_canonical_form(text):
    assert canonical_form(text) is None


@given(st.text(alphabet="0123456789 .,-+*/^_=<>(){}[]\\$%|abxpi&~'\"", max_size=40), st.text(max_size=20))
def test_no_text_breaks_the_comparison(a, b):
    assert compare_answers(a, b) in (True, False, None)
    assert compare_answers(b, a) in (True, False, None)


@pytest.mark.parametrize(
    "text",
    [
        "1 ",
        "1,",
        "(",
        "[1,",
        "\\frac",
        "\\text{",
        "{",
        "a ",
        "x = ",
        "\\pm ",
        "<",
        "**",
        "$",
        " or ",
        "^2",
        "1 111 ",
    ],
)
def test_hostile_answers_are_compared(text):
    for length in (200, 990, 100_000):
        hostile = (text * length)[:length]
        assert compare_answers(hostile, "18") is not True
        assert answer_match([f"<answer>{hostile}</answer>"], ["18"], where="tag") == [0]


# ------------------------------------------------------------------------------------ math-verify


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


def test_pairs_that_only_math_verify_can_decide():
    pytest.importorskip("math_verify")
    pairs = [
        (r"\frac{x^2-1}{x+1}", "x - 1"),
        (r"\frac{1}{1+\sqrt{2}}", r"\sqrt{2} - 1"),
        (r"9 \times 2", "18"),
    ]
    for said, gold in pairs:
        assert math_answer([rf"\boxed{{{said}}}"], [gold]) == [1.0]
        assert answer_match([rf"\boxed{{{said}}}"], [gold], where="boxed") == [0.0]


@pytest.mark.parametrize(
    "text, gold, reward",
    [
        ("so she has 18 left.", "18", 1),
        ("3 + 4 = 7, and 7 + 11 is 18.", "18", 1),
        ("The answer is 18. I hope this helps!", "18", 1),
        ("It could be 16, or 17, or 18", "18", 0),
        ("It is 17 or 18.", "18", 0),
        ("The answer is 16, 17, 18.", "18", 0),
        ("It is 1,250.", "1250", 1),
        ("<answer> 18", "18", 0),
        (r"18 \boxed{18", "18", 0),
        (r"$\frac{36}{2}$", "18", 1),
    ],
)
def test_math_answer_on_completions_without_a_mark(text, gold, reward):
    pytest.importorskip("math_verify")
    assert math_answer([text], [gold]) == [reward]


def test_mathematics_outside_the_main_thread():
    """math-verify measures time with signals, which only a main thread may set."""
    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(math_equal, r"\boxed{\sqrt{4}}", "2").result() is True


def test_without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"needs the package math-verify .*grpo-jax\[math\]"):
        math_equal("7", "7")
