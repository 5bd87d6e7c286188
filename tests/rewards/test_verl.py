"""compute_score functions of verl, as reward functions."""

import pytest

from grpo_jax.config.run import RewardConfig
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import RewardError, check_columns, check_rows, load_rewards
from grpo_jax.rewards.verl import adapt_compute_score
from grpo_jax.types import Example

FILE = """\
import asyncio

def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
    return scale * (solution_str == ground_truth)

def whatever(**kwargs):
    return len(kwargs)

def detailed(data_source, solution_str, ground_truth, extra_info):
    return {"score": 0.5, "acc": True}

def no_score(data_source, solution_str, ground_truth, extra_info):
    return {"acc": True, "pred": "1"}

def text(data_source, solution_str, ground_truth, extra_info):
    return "1"

def missing(data_source, solution_str, ground_truth, extra_info):
    return None

def broken(data_source, solution_str, ground_truth, extra_info):
    return 1 / len(solution_str)

def two(solution_str, ground_truth):
    return 0

async def later(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0)
    return {"score": float(solution_str == ground_truth)}

def reads_index(data_source, solution_str, ground_truth, extra_info):
    return float(extra_info.get("index", -1)) + len(data_source)
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "judge.py").write_text(FILE)

    def load(name, **arguments):
        function = f"verl:{tmp_path}/judge.py:{name}"
        return load_rewards([RewardConfig(function=function, weight=2, arguments=arguments)])[0]

    return load


def scored(reward, completions, **columns):
    return call_rewards([reward], ["p"] * len(completions), completions, columns)[:, 0].tolist()


def calls_with(**columns):
    """What compute_score is called with for one completion and these columns."""
    calls = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        calls.append((data_source, solution_str, ground_truth, extra_info))
        return 1.0

    function = adapt_compute_score(compute_score, {})
    chat = [[{"role": "assistant", "content": "said"}]]
    assert function(completions=chat, **columns) == [1.0]
    return calls


def test_columns_are_mapped():
    info = [{"index": 3}]
    assert calls_with(answer=[7]) == [("", "said", 7, {})]
    assert calls_with(answer=[7], ground_truth=["8"], data_source=["gsm8k"], extra_info=info) == [
        ("gsm8k", "said", "8", {"index": 3})
    ]
    nested = [{"style": "rule", "ground_truth": "9"}]
    assert calls_with(answer=[7], reward_model=nested) == [("", "said", "9", {})]


def test_a_compute_score_as_a_reward(load):
    reward = load("compute_score", scale=2.0)
    assert (reward.name, reward.weight) == ("compute_score", 2.0)
    assert scored(reward, ["7", "8"], ground_truth=["7", "7"], split=["a", "b"]) == [2, 0]
    assert scored(load("whatever", strict=True), ["7"], answer=["7"]) == [5]
    assert scored(load("detailed"), ["7", "8"], answer=["7", "7"]) == [0.5, 0.5]
    value = scored(load("missing"), ["7"], answer=["7"])[0]
    assert value != value


def test_an_async_compute_score(load):
    assert scored(load("later"), ["7", "8"], answer=["7", "7"]) == [1, 0]


def test_null_in_optional_columns(load):
    # case data-25: extra_info is an empty mapping where it is null
    columns = {"extra_info": [None, {"index": 2}], "data_source": ["abc", None]}
    assert scored(load("reads_index"), ["7", "7"], answer=["7", "7"], **columns) == [2, 2]


def test_the_data_must_have_a_truth(load):
    reward = load("compute_score")
    check_columns([reward], ["answer"])
    check_columns([reward], ["reward_model", "data_source"])
    with pytest.raises(ValueError, match="needs one of the columns `ground_truth`, `reward_model`, `answer`"):
        check_columns([reward], ["data_source"])


@pytest.mark.parametrize(
    "column, value, match",
    [
        ("reward_model", None, "column `reward_model` is None, not a mapping with `ground_truth`"),
        ("reward_model", "{'ground_truth': 7}", "is \"{'ground_truth': 7}\", not a mapping"),
        ("reward_model", {"style": "rule"}, "is {'style': 'rule'}, not a mapping"),
        ("reward_model", {"ground_truth": None}, "`reward_model.ground_truth` is null"),
        ("ground_truth", None, "`ground_truth` is null"),
        ("answer", None, "`answer` is null"),
    ],
)
def test_a_row_without_a_truth_is_found_at_the_start(load, column, value, match):
    # case data-25
    good = {"ground_truth": "7"} if column == "reward_model" else "7"
    examples = [Example("p", {column: each}) for each in (good, value, good)]
    ((row, reason),) = check_rows([load("compute_score")], examples)
    assert row == 1 and reason.startswith("reward `compute_score`: ") and match in reason


@pytest.mark.parametrize(
    "name, arguments, match",
    [
        ("two", {}, "`two` .*has no parameter `data_source`; verl calls compute_score"),
        ("compute_score", {"scal": 1}, "takes no argument `scal`; did you mean `scale`"),
        ("detailed", {"scale": 1}, "takes no argument `scale`; it takes none"),
        ("compute_score", {"ground_truth": 1}, "`ground_truth` cannot be given"),
        ("comput_score", {}, "has no `comput_score`; did you mean `compute_score`"),
    ],
)
def test_mistakes_are_found_at_load_time(load, name, arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        load(name, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, match",
    [
        ("no_score", "mapping without `score`: it has acc, pred.*row 0"),
        ("text", "returned '1' of type str for row 0"),
        ("broken", r"raised ZeroDivisionError.* at judge.py:22 on a batch of 2 rows; row 1"),
    ],
)
def test_wrong_values_are_named(load, name, match):
    with pytest.raises(RewardError, match=match):
        scored(load(name), ["7", ""], answer=["7", "7"])
