import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest

import grpo_jax
from grpo_jax.config.run import RewardConfig
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import REWARDS, Reward, RewardError, check_columns, load_rewards


def load(function, weight=1.0, **arguments):
    return load_rewards([RewardConfig(function=function, weight=weight, arguments=arguments)])[0]


def give(*values):
    """A reward that returns these values."""
    return Reward(name="given", function=lambda completions: list(values))


def scored(reward, completions, prompts=None, **columns):
    return call_rewards([reward], prompts or ["p"] * len(completions), completions, columns)[:, 0].tolist()


def messages(text):
    return [{"role": "assistant", "content": text}]


# ---------------------------------------------------------------------------------------- built in


BUILT_IN = [
    ("exact_match", {}, {"answer": ["7", "7", 7, "8"]}, [" 7\n", "7.", "7", "7"], [1, 0, 1, 0]),
    ("numeric_answer", {}, {"answer": ["1,000", 0.5, "#### 3"]}, ["is 1e3.", "1/2", "2"], [1, 1, 0]),
    ("numeric_answer", {"which": "first"}, {"answer": [3, 3]}, ["3 or 4", "none"], [1, 0]),
    ("numeric_answer", {"tolerance": 0.1}, {"answer": [3, 3]}, ["3.2", "3.4"], [1, 0]),
    ("regex_format", {"pattern": "<a>.*</a>"}, {}, ["<a>1</a>", "x<a>1</a>", "<a>\n</a>"], [1, 0, 0]),
    ("regex_format", {"pattern": "(?s)<a>.*</a>", "search": True}, {}, ["x<a>\n</a>", "<a>"], [1, 0]),
    ("length_penalty", {"target": 4}, {}, ["", "1234", "123456", "1" * 9], [0, 0, -0.5, -1]),
    ("length_penalty", {"target": 0, "window": 10}, {}, ["", "1"], [0, -0.1]),
    ("length_penalty", {"target": 2, "unit": "words"}, {}, ["a b", "a  b\nc", "a b c d e"], [0, -0.5, -1]),
    (
        "answer_match",
        {"where": "boxed"},
        {"answer": ["1/2", 7, r"so \boxed{b}", "7"]},
        [r"\boxed{0.5}", r"\boxed{8} 7", r"\boxed{b}", "7"],
        [1, 0, 1, 0],
    ),
    ("answer_match", {"where": "hashes"}, {"answer": ["a #### 18", "18"]}, ["#### 18.0", "18"], [1, 0]),
    (
        "answer_match",
        {"where": "tag", "tag": "solution"},
        {"answer": ["Paris", "Paris"]},
        ["<solution>Paris</solution>", "<answer>Paris</answer>"],
        [1, 0],
    ),
    (
        "answer_match",
        {"where": "boxed"},
        {"answer": ["2+2 is 4 #### 4", "2+2 is 4 #### 4"]},
        ["so \\boxed{4}", "4"],
        [1, 0],
    ),
    ("answer_match", {"where": "first_number"}, {"answer": ["2+2 is 4 #### 4"] * 2}, ["4", "2"], [1, 0]),
    ("answer_match", {"where": "text"}, {"answer": ["#### A"] * 2}, ["#### A", "A"], [1, 0]),
    ("answer_match", {"where": "text", "tolerance": 0.1}, {"answer": [3, 3]}, ["3.2", "it is 3"], [1, 0]),
    (
        "think_format",
        {},
        {},
        [
            "<think>a</think><answer>b</answer>",
            " <think>a\n</think>\n<answer></answer>\n",
            "<think>a</think> b <answer>c</answer>",
            "<think>a</think><answer>b</answer> c",
            "<think>a<think></think><answer>b</answer>",
            "<answer>b</answer><think>a</think>",
            "<think>a</think>",
            "",
        ],
        [1, 1, 0, 0, 0, 0, 0, 0],
    ),
    (
        "think_format",
        {"tags": ["a.b"], "opened": True},
        {},
        ["x</a.b>", "<a.b>x</a.b>", "x</a_b>", "x"],
        [1, 0, 0, 0],
    ),
    (
        "repetition_penalty",
        {},
        {},
        ["a b c d", "a B c A b C", "x x x x x", "one two", ""],
        [0, -0.25, -2 / 3, 0, 0],
    ),
    ("repetition_penalty", {"ngram": 1}, {}, ["a a a a", "a b"], [-0.75, 0]),
    (
        "required_words",
        {"words": ["Sun", "moon"]},
        {},
        ["the SUN, the moon", "sunny moon", ""],
        [1, 0.5, 0],
    ),
    ("distinct_words", {}, {}, ["a b c", "a A a b", " .", "don't don't"], [1, 0.5, 0, 0.5]),
    ("countdown", {}, {"numbers": [[1, 2, 3]] * 3, "target": [6] * 3}, ["1*2*3", "3+3", "6"], [1, 0, 0]),
    ("reasoning_gym", {}, {"entry": []}, [], []),  # test_reasoning_gym has rows
]


@pytest.mark.parametrize("name, arguments, columns, texts, expected", BUILT_IN)
def test_built_in_rewards(name, arguments, columns, texts, expected):
    reward = load(name, **arguments)
    assert scored(reward, texts, **columns) == pytest.approx(expected)
    # the same under a conversational prompt, whether the completion is a string or a message already
    chat = [[{"role": "user", "content": "p"}]] * len(texts)
    assert scored(reward, texts, chat, **columns) == pytest.approx(expected)
    assert scored(reward, [messages(t) for t in texts], chat, **columns) == pytest.approx(expected)


def test_every_built_in_is_documented_and_tested():
    elsewhere = {
        "math_answer",
        "http_score",
        "reward_model",
    }  # below, and in files of theirs
    assert {case[0] for case in BUILT_IN} == set(REWARDS) - elsewhere
    assert all(function.__doc__ for function in REWARDS.values())


@pytest.mark.parametrize(
    "name, arguments, match",
    [
        ("regex_format", {}, "regex_format.*needs the argument `pattern`"),
        ("regex_format", {"patern": "a"}, "no argument `patern`; did you mean `pattern`"),
        ("regex_format", {"pattern": "("}, "is not a regular expression"),
        ("regex_format", {"pattern": 3}, "regex_format"),
        ("length_penalty", {"target": -1}, "target=-1"),
        ("length_penalty", {"target": 0}, "window"),
        ("length_penalty", {"target": "long"}, "length_penalty"),
        ("length_penalty", {"target": 1, "unit": "tokens"}, "unit='tokens'"),
        ("answer_match", {}, "needs the argument `where`"),
        ("answer_match", {"where": "box"}, "where='box': choose one of boxed, hashes"),
        ("answer_match", {"where": "tag", "tolerance": 1}, "tolerance=1"),
        ("think_format", {"tags": "think"}, "tags='think'"),
        ("think_format", {"tags": []}, "at least one name"),
        ("repetition_penalty", {"ngram": 0}, "ngram=0"),
        ("numeric_answer", {"which": "middle"}, "middle"),
        ("numeric_answer", {"tolerance": -1}, "tolerance=-1"),
        ("numeric_answer", {"answer": "7"}, "`answer` is a column"),
        ("required_words", {"words": "sun"}, "words='sun'"),
        ("required_words", {"words": []}, "at least one"),
        ("required_words", {"words": ["two words"]}, "'two words' is not a single word"),
        ("exact_match", {"completions": []}, "`completions` cannot be given"),
    ],
)
def test_wrong_arguments_are_found_at_load_time(name, arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        load(name, **arguments)
    assert "\n" not in str(caught.value)


def test_a_column_of_a_built_in_cannot_be_an_argument():
    """Data may well have a column that is called like an argument."""
    reward = load("numeric_answer")
    check_columns([reward], ["answer", "which"])
    assert scored(reward, ["1 2"], answer=[2], which=["first"]) == [1]


def test_the_format_takes_linear_time():
    hostile = ["<think>" + " \n" * 50_000, "<think>a</think>" + " " * 100_000 + "b", "</think>" * 20_000]
    started = time.perf_counter()
    assert scored(load("think_format"), hostile) == [0, 0, 0]
    assert time.perf_counter() - started < 1


def test_math_answer():
    pytest.importorskip("math_verify")
    texts = [r"\boxed{\frac12}", "0.5", "<answer>1/2</answer>", "1"]
    assert scored(load("math_answer"), [*texts[:2], texts[3]], answer=["0.5"] * 3) == [1, 1, 0]
    assert scored(load("math_answer", where="boxed"), texts, answer=["0.5"] * 4) == [1, 0, 0, 0]
    assert scored(load("math_answer", where="tag"), texts, answer=["0.5"] * 4) == [0, 0, 1, 0]
    assert scored(load("math_answer"), texts[:1], answer=["1 by 2 is a half #### 0.5"]) == [1]
    assert np.isnan(scored(load("math_answer"), ["1"], answer=[""])).all()  # nothing to compare with
    with pytest.raises(ValueError, match="where='box'"):
        load("math_answer", where="box")


def test_math_answer_without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install .grpo-jax\[math\]") as caught:
        load("math_answer")
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------- loading


def test_names_are_unique_and_weights_kept():
    specs = [
        RewardConfig(function="regex_format", arguments={"pattern": "a"}),
        RewardConfig(function="exact_match", weight=0.5),
        RewardConfig(function="regex_format", arguments={"pattern": "b"}, weight=0),
    ]
    rewards = load_rewards(specs)
    assert [r.name for r in rewards] == ["regex_format", "exact_match", "regex_format_2"]
    assert [r.weight for r in rewards] == [1, 0.5, 0]
    with pytest.raises(ValueError, match="weight nan"):
        load("exact_match", weight=float("nan"))


FILE = """\
from helper import BONUS

SCALE = 2
calls = []

def brevity(prompts, completions, scale=1, **columns):
    calls.append(sorted(columns))
    return [BONUS - scale * len(c) for c in completions]

class Judge:
    def __call__(self, completions, answer):
        return [float(c == a) for c, a in zip(completions, answer)]

judge = Judge()
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "helper.py").write_text("BONUS = 10\n")
    (tmp_path / "mine" / "my_rewards.py").write_text(FILE)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    return tmp_path / "mine" / "my_rewards.py"


@pytest.mark.parametrize("absolute", [False, True])
def test_a_function_of_a_file(file, absolute):
    path = str(file) if absolute else "mine/my_rewards.py"
    before = list(sys.path)
    reward = load(f"{path}:brevity", scale=2)
    assert sys.path == before
    assert reward.name == "brevity"
    assert scored(reward, ["a", "abc"], answer=["x", "y"]) == [8, 4]
    assert reward.function.__globals__["calls"] == [["answer"]]
    judge = load(f"{path}:judge")
    assert scored(judge, ["a", "b"], answer=["a", "c"]) == [1, 0]
    assert judge.function.__call__.__globals__ is reward.function.__globals__  # executed once


def test_an_edited_file_is_loaded_again(file):
    assert scored(load(f"{file}:brevity"), ["a"]) == [9]
    file.write_text(FILE.replace("BONUS - ", "BONUS + "))
    assert scored(load(f"{file}:brevity"), ["a"]) == [11]


def test_a_function_of_a_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judges_of_this_test.py").write_text(
        "def zero(completions):\n    return [0] * len(completions)\n"
    )
    (tmp_path / "broken_judges.py").write_text("\nimport no_such_package\n")
    assert scored(load("judges_of_this_test:zero"), ["a"]) == [0]
    with pytest.raises(ValueError, match="has no `zeros`; did you mean `zero` \\(line 1\\)"):
        load("judges_of_this_test:zeros")
    with pytest.raises(ValueError, match=r"broken_judges\.py:2: importing it raised ModuleNotFoundError"):
        load("broken_judges:zero")
    with pytest.raises(ValueError, match="no module named 'no_such_module_at_all'"):
        load("no_such_module_at_all.rewards:zero")
    with pytest.raises(ValueError, match="no parameter `completions`"):
        load("math:sin")


@pytest.mark.parametrize(
    "function, match",
    [
        ("exact_mach", "'exact_mach' is unknown; did you mean `exact_match`"),
        ("nothing_like_it_at_all", "built in are exact_match, .*package.module:function"),
        ("mine/my_rewards.py", "path/file.py:function"),
        ("mine/my_rewards.py:", "path/file.py:function"),
        ("mine/no.py:f", "no.py does not exist"),
        ("mine/my_rewards.py:brevty", "has no `brevty`; did you mean `brevity` \\(line 6\\)"),
        ("mine/my_rewards.py:xyz", "has no `xyz`; it defines SCALE, calls, brevity, Judge, judge"),
        ("mine.my_rewards.brevity", "did you mean `mine.my_rewards:brevity`"),
        ("mine/my_rewards.py:SCALE", "my_rewards.py:3 is a int, not a function"),
        ("mine/my_rewards.py:Judge", "my_rewards.py:10 is a class, not a function; .*judge = Judge\\(\\)"),
    ],
)
def test_functions_that_cannot_be_loaded_are_named_in_one_line(file, function, match):
    with pytest.raises(ValueError, match=match) as caught:
        load(function)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source, match",
    [
        ("x = 1\ndef f(:\n", r"bad\.py:2: SyntaxError"),
        ("\n\nx = 1 / 0\n", r"bad\.py:3: importing it raised ZeroDivisionError"),
        ("import sys\nsys.exit(1)\n", r"bad\.py:2: importing it raised SystemExit"),
        ("\nimport no_such_package\n", r"bad\.py:2: importing it raised ModuleNotFoundError"),
        ("def f(texts): ...", "no parameter `completions`"),
        ("def f(prompts, completions, /): ...", "no parameter `completions`"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, source, match):
    path = tmp_path / "bad.py"
    path.write_text(source)
    for _ in range(2):  # a failed import leaves nothing behind
        with pytest.raises(ValueError, match=match) as caught:
            load(f"{path}:f")
        assert "\n" not in str(caught.value)


def test_unknown_arguments_of_a_user_function(file):
    with pytest.raises(ValueError, match="no argument `scale`; it takes answer"):
        load(f"{file}:judge", scale=1)
    load(f"{file}:brevity", anything=1)  # lands in **columns


# ----------------------------------------------------------------------------------------- columns


def test_missing_columns_are_found_before_training(file):
    rewards = [load("exact_match"), load(f"{file}:brevity"), load("distinct_words")]
    check_columns(rewards, ["answer", "level"])
    with pytest.raises(ValueError, match=r"`exact_match` .*needs `answer`.*columns: `solution`, `level`"):
        check_columns(rewards, {"solution": [], "level": []})
    with pytest.raises(ValueError, match="columns: none"):
        check_columns(rewards, [])
    with pytest.raises(ValueError, match="argument `scale` hides the column `scale`"):
        check_columns([load(f"{file}:brevity", scale=2)], ["scale"])
    with pytest.raises(ValueError, match="column `completions`"):
        check_columns([], ["completions"])


def test_a_parameter_that_only_trl_passes(tmp_path):
    name = "environments"
    (tmp_path / "trl_like.py").write_text(
        f"def needs(completions, {name}, **kwargs): return [0.0] * len(completions)\n"
        f"def can_do_without(completions, {name}=None, **kwargs): return [1.0] * len(completions)\n"
    )
    with pytest.raises(ValueError, match=rf"needs `{name}`, which TRL passes and .*{name}=None"):
        check_columns([load(f"{tmp_path}/trl_like.py:needs")], ["answer"])
    check_columns([load(f"{tmp_path}/trl_like.py:needs")], ["answer", name])  # a column of the data
    reward = load(f"{tmp_path}/trl_like.py:can_do_without")
    check_columns([reward], ["answer"])
    assert scored(reward, ["a"], answer=[1]) == [1]


def test_functions_get_only_what_they_name():
    seen = {}

    def completions_only(completions):
        seen["few"] = completions
        return [0] * len(completions)

    def everything(**kwargs):
        seen["all"] = kwargs
        kwargs["completions"].clear()  # its own list: hurts nobody
        return [0] * 2

    rewards = [Reward(name=f.__name__, function=f) for f in (everything, completions_only)]
    call_rewards(rewards, ["p", "q"], ["a", "b"], {"answer": [1, 2]})
    assert seen["few"] == ["a", "b"]
    assert seen["all"] == {"prompts": ["p", "q"], "completions": [], "answer": [1, 2]}


def test_a_default_is_used_without_a_column():
    def f(completions, level=3, answer=None):
        assert level == 3
        return answer

    assert scored(Reward(name="f", function=f), ["a"], answer=[2]) == [2]


def test_conversational_prompts_hand_over_messages():
    seen = []

    def f(prompts, completions):
        seen.extend(completions)
        return [0] * len(completions)

    call_rewards([Reward(name="f", function=f)], ["text", [{"role": "user", "content": "q"}]], ["a", "b"], {})
    assert seen == ["a", messages("b")]


# ----------------------------------------------------------------------------------------- calling


def test_scores_are_float32_with_nan_for_none():
    rewards = [give(1, None, 0.1), give(True, np.bool_(False), np.float32(0.5))]
    scores = call_rewards(rewards, ["p"] * 3, ["a"] * 3, {})
    assert scores.dtype == np.float32 and scores.shape == (3, 2)
    np.testing.assert_array_equal(scores, np.array([[1, 1], [np.nan, 0], [0.1, 0.5]], np.float32))


@pytest.mark.parametrize(
    "values", [np.array([1.0, 2.0]), (1, 2), [np.int8(1), Fraction(2)], [np.array(1), 2.0]]
)
def test_any_sequence_of_numbers_will_do(values):
    assert scored(Reward(name="f", function=lambda completions: values), ["a", "b"]) == [1, 2]


@pytest.mark.parametrize(
    "returned, match",
    [
        (None, "`judge` .*returned NoneType, not a list of 2 numbers"),
        (1.0, "returned float, not a list"),
        ("11", "returned str"),
        ({0: 1, 1: 2}, "returned dict"),
        ((x for x in (1, 2)), "returned generator"),
        ([1], "returned 1 values for 2 completions"),
        ([1, 2, 3], "returned 3 values for 2 completions"),
        (np.zeros((2, 2)), "row 0"),
        ([0, "1"], "returned '1' of type str for row 1.*'second'"),
        ([0, [1]], r"returned \[1\] of type list for row 1"),
        ([0, [1, [2]]], "row 1"),
        ([0, 1j], "complex for row 1"),
        ([0, object()], "object for row 1"),
        ([0, float("nan")], "returned nan for row 1; .*missing one is None"),
        ([float("inf"), 0], "returned inf for row 0.*'first'"),
        ([0, np.float32("nan")], "for row 1"),
        ([0, 1e39], "1e.39 for row 1"),
        ([0, 10**400], "for row 1"),
    ],
)
def test_values_that_are_not_rewards_are_named(returned, match):
    reward = Reward(name="judge", function=lambda completions: returned)
    with pytest.raises(RewardError, match=match) as caught:
        scored(reward, ["first", "second"])
    assert len(str(caught.value)) < 300


def test_an_exception_names_function_row_and_place():
    def f(completions, answer):
        return [len(c) / a for c, a in zip(completions, answer, strict=True)]

    with pytest.raises(RewardError) as caught:
        scored(Reward(name="f", function=f, source="x.py:1"), ["a", "b", "c" * 500], answer=[1, 2, 0])
    text = str(caught.value)
    assert "reward `f` (x.py:1) raised ZeroDivisionError('division by zero')" in text
    assert "at test_loading.py:" in text
    assert "batch of 3 rows; row 2 (completion 'ccc" in text and "...)" in text
    assert len(text) < 400
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_that_no_single_row_causes():
    def f(completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match=r"too many.*no single row does so alone"):
        scored(Reward(name="f", function=f), ["a", "b"])


def test_a_built_in_names_the_row_of_a_bad_answer():
    with pytest.raises(RewardError, match=r"numeric_answer.*'many' has no number.*row 1"):
        scored(load("numeric_answer"), ["1", "2"], answer=["1", "many"])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 prompts, but `answer` has 1"):
        call_rewards([give(1, 1)], ["p", "q"], ["a", "b"], {"answer": [1]})
    with pytest.raises(ValueError, match="2 prompts, but `completions` has 1"):
        call_rewards([give(1)], ["p", "q"], ["a"], {})


def test_rewards_need_numpy_alone():
    code = (
        "import sys, grpo_jax.rewards.loading\n"
        "print([m for m in ('jax', 'transformers', 'orbax', 'rich') if m in sys.modules])"
    )
    # the package itself re-exports the algebra, so stand in for it
    stub = "import sys, types; p = types.ModuleType('grpo_jax'); p.__path__ = [sys.argv[1]]; "
    stub += "sys.modules['grpo_jax'] = p\n"
    path = grpo_jax.__path__[0]
    done = subprocess.run(
        [sys.executable, "-c", stub + code, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
