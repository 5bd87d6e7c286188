"""What a function gets besides the data if it names it: the shapes of TRL, here and in workers."""

import json
import math

import numpy as np
import pytest
import small_run

from grpo_jax.config.run import RewardConfig
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.extras import Extras, TrainerState, json_value
from grpo_jax.rewards.loading import RewardError, check_columns, close_rewards, load_rewards
from grpo_jax.rewards.reward import Reward
from grpo_jax.train import train

# The four shapes of the page of TRL's GRPOTrainer that version 0.1 refused, in our own words.
FILE = """\
import asyncio

def longer_ids(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

async def slow(prompts, completions, **kwargs):
    await asyncio.sleep(0.001)
    return [1.0 if text else 0.0 for text in completions]

def logs(completions, answer, log_extra, log_metric, **kwargs):
    right = [text == str(a) for text, a in zip(completions, answer)]
    log_extra("golden", list(answer))
    log_metric("accuracy", sum(right) / len(right))
    return [float(r) for r in right]

def curriculum(completions, trainer_state, **kwargs):
    progress = trainer_state.global_step / trainer_state.max_steps
    return [progress + trainer_state.epoch] * len(completions)

def everything(completions, **columns):
    return [float(len(columns))] * len(completions)

def broken(completions, completion_ids, log_metric):
    log_metric("tries", 1)
    return [1 / (len(ids) - 2) for ids in completion_ids]
"""
IDS = [[5, 6], [7], [8, 9, 10], []]
TEXTS = ["46", "15", "x", ""]
ANSWERS = {"answer": [46, 15, 55, 0]}


@pytest.fixture
def load(tmp_path):
    """A function that loads a reward of the file; its workers end with the test."""
    (tmp_path / "trl_like.py").write_text(FILE)
    loaded = []

    def load(name, **settings):
        (reward,) = load_rewards([RewardConfig(function=f"{tmp_path}/trl_like.py:{name}", **settings)])
        check_columns([reward], ANSWERS)
        loaded.append(reward)
        return reward

    yield load
    close_rewards(loaded)


def extras():
    state = TrainerState(global_step=3, max_steps=6, epoch=0.25)
    return Extras(completion_ids=IDS, trainer_state=state)


def scored(reward, given=None):
    return call_rewards([reward], ["p"] * 4, TEXTS, ANSWERS, extras=given)[:, 0].tolist()


@pytest.mark.parametrize("settings", [{}, {"timeout": 30.0}], ids=["here", "in a worker"])
def test_the_shapes_of_trls_documentation(load, settings):
    given = extras()
    assert scored(load("longer_ids", **settings), given) == [2, 1, 3, 0]
    assert scored(load("slow", **settings), given) == [1, 1, 1, 0]
    assert scored(load("curriculum", **settings), given) == [0.75] * 4
    assert given.logged.metrics == {} and given.logged.columns == {}
    assert scored(load("logs", **settings), given) == [1, 1, 0, 0]
    assert given.logged.metrics == {"accuracy": [0.5]}
    assert given.logged.columns == {"golden": [46, 15, 55, 0]}
    assert scored(load("everything", **settings), given) == [2] * 4  # prompts and answer


def test_several_calls_of_workers_log_their_own_rows(load):
    given = extras()
    assert scored(load("logs", timeout=30.0, workers=2), given) == [1, 1, 0, 0]
    assert sorted(given.logged.metrics["accuracy"]) == [0, 1]
    assert given.logged.columns == {"golden": [46, 15, 55, 0]}


def test_columns_and_arguments_of_the_same_name_win():
    def f(completions, trainer_state, log_metric):
        return [float(state + log_metric) for state in trainer_state]

    reward = Reward(name="f", function=f, arguments={"log_metric": 2})
    columns = {"trainer_state": [1, 2]}
    check_columns([reward], columns)
    assert call_rewards([reward], ["p"] * 2, ["a", "b"], columns, extras=extras())[:, 0].tolist() == [3, 4]


def test_a_function_gets_copies_of_the_ids():
    def f(completions, completion_ids):
        lengths = [len(ids) for ids in completion_ids]
        completion_ids[0].clear()
        completion_ids.clear()
        return lengths

    given = extras()
    rewards = [Reward(name="f", function=f), Reward(name="g", function=f)]
    scores = call_rewards(rewards, ["p"] * 4, TEXTS, {}, extras=given)
    np.testing.assert_array_equal(scores, [[2, 2], [1, 1], [3, 3], [0, 0]])
    assert given.completion_ids == [[5, 6], [7], [8, 9, 10], []]


def test_an_error_names_the_row_and_searching_for_it_logs_nothing(load):
    given = extras()
    with pytest.raises(RewardError, match=r"`broken` .*ZeroDivisionError.*; row 0 \(completion '46'\)"):
        scored(load("broken"), given)
    assert given.logged.metrics == {"tries": [1]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda metric, extra: metric("acc", math.nan), "acc is nan, and it must be a finite number"),
        (lambda metric, extra: metric("acc", "high"), "acc is 'high', and it must be a finite number"),
        (lambda metric, extra: metric(3, 1.0), "the name 3 is no text"),
        (lambda metric, extra: extra("gold", [1]), "1 values of 'gold' for 4 completions; give one for each"),
        (lambda metric, extra: extra("reward", [1] * 4), "'reward' cannot be a column .* another name"),
    ],
)
def test_wrong_logs_are_one_line(call, message):
    def f(completions, log_metric, log_extra):
        call(log_metric, log_extra)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=message) as error:
        scored(Reward(name="f", function=f), extras())
    assert "\n" not in str(error.value)


def test_scalars_of_arrays_are_numbers_and_everything_else_is_shown():
    assert json_value([np.float32(0.5), np.arange(2), (1, None), {3: "x"}, {1}]) == [
        0.5, [0, 1], [1, None], {"3": "x"}, "{1}",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_logs_them(tmp_path, shared_compilations):
    (tmp_path / "mine.py").write_text(FILE)
    names = ("logs", "longer_ids", "curriculum")
    rewards = json.dumps([{"function": f"{tmp_path}/mine.py:{name}"} for name in names])
    changes = {"training__num_steps": 2, "tracking__completions_every": 1}
    assert train(small_run.config(tmp_path / "run", rewards=rewards, **changes)) == 0
    rows = small_run.rows(tmp_path / "run")
    training = [row for row in rows if "loss" in row]
    measured = [row for row in rows if "eval/reward" in row]
    for row in training:
        assert row["accuracy"] == row["rewards/logs/mean"]
        assert 1 <= row["rewards/longer_ids/mean"] <= 5
    curriculum = [row["rewards/curriculum/mean"] for row in training]
    assert curriculum[0] == 0 and 0.5 < curriculum[1] < 0.51  # half of the steps, and 4 of the prompts
    assert [row["eval/accuracy"] for row in measured] == [row["eval/mean@2"] for row in measured]
    assert [row["eval/rewards/curriculum/mean"] for row in measured][1] > 1
    for row in small_run.rows(tmp_path / "run", "completions"):
        assert eval(row["prompt"].rstrip("=")) == int(row["golden"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", "loss"])
def test_a_metric_of_the_run_cannot_be_overwritten(tmp_path, shared_compilations, name):
    (tmp_path / "mine.py").write_text(FILE.replace('"accuracy"', f'"{name}"'))
    rewards = f"[{{function: '{tmp_path}/mine.py:logs'}}]"
    config = small_run.config(tmp_path / "run", rewards=rewards, evaluation__num_prompts=0)
    with pytest.raises(ValueError, match=f"logs a metric '{name}', which every .* has; give it another name"):
        train(config)
