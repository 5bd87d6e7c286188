"""What the columns of the data may hold for the built-in rewards, checked over all rows."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from grpo_jax.config.data import DataConfig
from grpo_jax.config.run import RewardConfig
from grpo_jax.data.loading import load_data
from grpo_jax.rewards.answers.gold import MissingAnswerError, accepted_answers, whole_number, whole_numbers
from grpo_jax.rewards.builtin import answer_match, countdown, exact_match, numeric_answer
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import check_rows, load_rewards
from grpo_jax.types import Example


@pytest.mark.parametrize(
    "value, accepted",
    [
        ("105", ("105",)),
        (" a b\n", (" a b\n",)),
        ("46.0", ("46.0", "46")),  # as pandas writes it to a CSV file
        ("46.00", ("46.00",)),
        ("[12, 34]", ("[12, 34]",)),  # an interval, or a vector
        (['["a"]'], ('["a"]',)),
        (105, ("105",)),
        (105.0, ("105", "105.0")),  # pandas writes a whole column with a gap so
        (0.5, ("0.5",)),
        (1e22, ("10000000000000000000000", "1e+22")),
        (1.6e-19, ("1.6e-19", "0.00000000000000000016")),
        (Decimal("105.00"), ("105", "105.00")),
        (Decimal("105.50"), ("105.50", "105.5")),
        (Fraction(3, 4), ("3/4",)),
        (b"Z\xc3\xbcrich", ("Zürich",)),
        (True, ("True", "true")),
        (np.bool_(False), ("False", "false")),
        (np.int8(5), ("5",)),
        (np.float32(0.1), ("0.1",)),
        (np.float64(7.0), ("7", "7.0")),
        (np.str_("a"), ("a",)),
        (np.array(7), ("7",)),
        (["105", "0105"], ("105", "0105")),
        (("a", 2.0, True), ("a", "2", "2.0", "True", "true")),
        (np.array(["a", "b"]), ("a", "b")),
        (np.array(["a", 2], dtype=object), ("a", "2")),
    ],
)
def test_values_that_are_accepted_as_answers(value, accepted):
    assert accepted_answers(value) == accepted


@pytest.mark.parametrize(
    "value", [None, "", " \n", b"", float("nan"), np.nan, Decimal("NaN"), [], ["a", None], [""]]
)
def test_missing_answers_are_refused(value):
    with pytest.raises(MissingAnswerError, match="the expected answer"):
        accepted_answers(value)


@pytest.mark.parametrize(
    "value, message",
    [
        ('["105", "0105"]', "is a list written as text, as in a cell of a CSV file"),
        ("['105', '0105']", "is a list written as text"),
        ({"a": 1}, r"\{'a': 1\} is of type dict"),
        ([["a"]], r"\['a'\] is of type list"),
        (b"\xff", r"b'\\xff' is not UTF-8 text"),
        ("3\ud83d", r"'3\\ud83d' holds half a character \(at position 1\)"),
        (float("inf"), "inf is not a finite number"),
        (Decimal("1e999999"), "not a finite number of ordinary size"),
        (np.datetime64("2026-01-01"), "type datetime64"),
    ],
)
def test_values_of_other_types_are_refused(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        accepted_answers(value)
    assert not isinstance(caught.value, MissingAnswerError)


def test_an_empty_or_null_gold_pays_nobody():
    for gold in (None, "", "  ", float("nan"), b"", [], [""]):
        for said in ("", " ", "None", "nan", "[]", "null"):
            assert exact_match([said], [gold]) == [0.0], (gold, said)
            assert answer_match([said], [gold], where="text") == [0.0], (gold, said)
            assert answer_match([f"<answer>{said}</answer>"], [gold], where="tag") == [0.0], (gold, said)
            assert answer_match([rf"\boxed{{{said}}}"], [gold], where="boxed") == [0.0], (gold, said)
        with pytest.raises(ValueError, match="the expected answer"):
            numeric_answer(["0"], [gold])


def test_any_answer_of_a_list_is_right():
    golds = [["105", "0105"]] * 3
    assert exact_match(["105", "0105", "106"], golds) == [1, 1, 0]
    assert numeric_answer(["105", "#### 105.0", "106"], golds) == [1, 1, 0]
    assert answer_match(["#### 105", "#### 0105", "#### 5"], golds, where="hashes") == [1, 1, 0]


def test_floats_decimals_bytes_and_bools_are_read():
    golds = [46.0, Decimal("46.00"), b"46", np.float32(46), True]
    assert exact_match(["46"] * 4 + ["true"], golds) == [1] * 5
    assert exact_match(["47"] * 4 + ["false"], golds) == [0] * 5
    assert numeric_answer(["is 46"] * 4, golds[:4]) == [1] * 4
    assert answer_match(["46.0"] * 4 + ["True"], golds, where="text") == [1] * 5


# ------------------------------------------------------------------------------- numbers of a task


@pytest.mark.parametrize("value", ["12", " 12 ", "12.0", 12, 12.0, Decimal(12), np.int8(12), b"12", "+12"])
def test_whole_numbers_are_read(value):
    assert whole_number(value) == 12


@pytest.mark.parametrize(
    "value",
    ["", "a", "1.5", 1.5, None, True, float("nan"), float("inf"), Decimal("NaN"), [12], "1 2", "9" * 500],
)
def test_values_that_are_not_whole_numbers(value):
    with pytest.raises(ValueError, match="is not a whole number"):
        whole_number(value)


@pytest.mark.parametrize(
    "value",
    [[12, 34], (12, 34.0), ["12", "34"], np.array([12, 34]), "[12, 34]", "12,34", "(12 34)", b"[12, 34]"],
)
def test_lists_of_whole_numbers_are_read(value):
    assert whole_numbers(value) == [12, 34]


@pytest.mark.parametrize(
    "value", [None, [], "", "[]", "[12, x]", "[12, 34", [1.5], 12, {"a": 1}, [[1]], "1-2"]
)
def test_values_that_are_not_lists_of_whole_numbers(value):
    with pytest.raises(ValueError, match=r"not a (list of )?whole number"):
        whole_numbers(value)


def test_countdown_reads_the_cells_of_a_csv_file():
    right, wrong = "12 + 34", "12 + 35"
    assert countdown([right, wrong], ["[12, 34]"] * 2, ["46", 46.0]) == [1, 0]


# ----------------------------------------------------------------------------------------- all rows


def checked(name, rows, **arguments):
    rewards = load_rewards([RewardConfig(function=name, arguments=arguments)])
    return check_rows(rewards, [Example("p", row) for row in rows])


@pytest.mark.parametrize("bad", ["no real solution", None, float("nan"), ["7", "x"], True, ""])
def test_one_bad_gold_is_found_among_many(bad):
    rows = [{"answer": str(i)} for i in range(40)]
    rows[29] = {"answer": bad}
    [(index, reason)] = checked("numeric_answer", rows)
    assert index == 29 and reason.startswith("reward `numeric_answer`: the expected answer")
    assert "\n" not in reason


def test_rewards_that_compare_texts_take_any_text():
    rows = [{"answer": a} for a in ("Paris", None, 5, ["a", "b"], {"a": 1}, "")]
    for name, arguments in (("exact_match", {}), ("answer_match", {"where": "tag"})):
        assert [index for index, _ in checked(name, rows, **arguments)] == [1, 4, 5]


def test_the_columns_of_the_tasks_are_checked():
    rows = [
        {"numbers": "[12, 34]", "target": "46"},
        {"numbers": "twelve", "target": 46},
        {"numbers": [12], "target": None},
    ]
    assert checked("countdown", rows) == [
        (1, "reward `countdown`: `numbers`: 'twelve' is not a list of whole numbers such as [12, 34]"),
        (2, "reward `countdown`: `target`: None is not a whole number"),
    ]


def test_rows_of_reasoning_gym_are_checked():
    pytest.importorskip("reasoning_gym")
    entry = {"question": "q", "answer": "4", "metadata": {"source_dataset": "leg_counting"}}
    other = {**entry, "metadata": {"source_dataset": "legs"}}
    rows = [{"entry": e} for e in (entry, None, {"answer": "4"}, "{}", "text", other)]
    found = checked("reasoning_gym", rows)
    assert [index for index, _ in found] == [1, 2, 3, 4, 5]
    assert "the task 'legs', which reasoning-gym does not have" in found[-1][1]


def test_a_row_is_named_once_and_other_rewards_are_not_asked():
    rewards = load_rewards(
        [RewardConfig(function=name) for name in ("exact_match", "numeric_answer", "distinct_words")]
    )
    found = check_rows(rewards, [Example("p", {"answer": a}) for a in ("1", None, "x")])
    assert [(index, reason.split(":")[0]) for index, reason in found] == [
        (1, "reward `exact_match`"),
        (2, "reward `numeric_answer`"),
    ]


def test_solutions_with_a_mark_are_fine():
    steps = "She sells <<3*4=12>>12 eggs a day for $2 each, which is 24 dollars.\n" * 4
    rows = [{"answer": f"{steps}#### {i:,}"} for i in range(1000, 1010)]
    assert checked("numeric_answer", rows) == []


# ------------------------------------------------------------------------------------------- files


def loaded(path):
    return load_data(DataConfig(train_file=str(path))).train


def test_the_types_of_a_parquet_file_are_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "decimal": pa.array([Decimal(46), Decimal(47)], pa.decimal128(10, 2)),
        "float": pa.array([46.0, 47.0]),
        "bytes": pa.array([b"46", b"47"]),
        "list": pa.array([["46", "046"], ["47"]]),
        "int8": pa.array([46, 47], pa.int8()),
        "dictionary": pa.array(["46", "47"]).dictionary_encode(),
    }
    for name, column in columns.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pa.table({"prompt": ["12+34=", "12+35="], "answer": column}), path)
        golds = [example.columns["answer"] for example in loaded(path)]
        assert exact_match(["46", "47"], golds) == [1, 1], name
        assert numeric_answer(["46", "48"], golds) == [1, 0], name


def test_the_cells_of_a_csv_file_are_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        'prompt,numbers,target,answer\n12+34=,"[12, 34]",46,46.0\nx,"[12, 34]",47,"[""7"", ""8""]"\n'
    )
    rows = loaded(path)
    rewards = load_rewards([RewardConfig(function=name) for name in ("countdown", "exact_match")])
    [(index, reason)] = check_rows(rewards, rows)
    assert index == 1 and "list written as text, as in a cell of a CSV file" in reason
    columns = {name: [row.columns[name] for row in rows[:1]] for name in ("numbers", "target", "answer")}
    assert call_rewards(rewards, ["p"], ["12 + 34"], columns).tolist() == [[1, 0]]
    assert call_rewards(rewards, ["p"], ["46"], columns).tolist() == [[0, 1]]
