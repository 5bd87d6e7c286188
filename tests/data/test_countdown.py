"""Countdown: solvable problems, disjoint splits, and a reward that cannot be cheated."""

import pytest

from grpo_jax.config.run import RewardConfig
from grpo_jax.data.tasks import load_task
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.expressions import evaluate_expression, reaches_target
from grpo_jax.rewards.loading import check_columns, load_rewards


@pytest.fixture(scope="module")
def task():
    return load_task("countdown", {"size": 300, "held_out": 60})


def test_every_problem_is_solved_by_its_solution(task):
    assert (len(task.train), len(task.evaluation)) == (300, 60)
    for example in [*task.train, *task.evaluation]:
        numbers, target, solution = (example.columns[name] for name in ("numbers", "target", "solution"))
        assert evaluate_expression(solution) == (target, evaluate_expression(solution)[1])
        assert sorted(evaluate_expression(solution)[1]) == sorted(numbers)
        assert reaches_target(f" {solution}\n", numbers, target)
        assert len(numbers) == 3 and target not in numbers
        assert all(1 <= n <= 25 for n in numbers) and 1 <= target <= 100
        assert f"numbers {', '.join(map(str, numbers))}, each" in example.prompt
        assert example.prompt.endswith(f" make {target}.\nExpression:") and solution not in example.prompt


def test_splits_are_disjoint_and_fixed(task):
    def keys(examples):
        return [(tuple(sorted(e.columns["numbers"])), e.columns["target"]) for e in examples]

    both = keys(task.train) + keys(task.evaluation)
    assert len(set(both)) == len(both) == 360
    assert load_task("countdown", {"size": 300, "held_out": 60}) == task
    # Literal: the same in every version of Python.
    assert keys(task.evaluation)[:2] == [((2, 18, 21), 41), ((4, 19, 23), 46)]


def test_arguments_reach_the_problems():
    task = load_task(
        "countdown", {"num_numbers": 5, "max_number": 9, "max_target": 30, "size": 20, "held_out": 0}
    )
    assert len(task.train) == 20 and task.evaluation == []
    for example in task.train:
        assert len(example.columns["numbers"]) == 5 and max(example.columns["numbers"]) <= 9
        assert example.columns["target"] <= 30


def test_reward(task):
    rewards = load_rewards([RewardConfig(function=name) for name in task.rewards])
    check_columns(rewards, task.train[0].columns)
    examples = task.train[:3]
    columns = {name: [e.columns[name] for e in examples] for name in ("numbers", "target")}
    right = [e.columns["solution"] for e in examples]
    targets = [str(e.columns["target"]) for e in examples]
    prompts = [e.prompt for e in examples]
    assert call_rewards(rewards, prompts, right, columns)[:, 0].tolist() == [1, 1, 1]
    assert call_rewards(rewards, prompts, targets, columns)[:, 0].tolist() == [0, 0, 0]
    assert call_rewards(rewards, prompts, [right[1], right[2], right[0]], columns)[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_numbers": 1}, "num_numbers: 1; it must be 2 to 6"),
        ({"num_numbers": 7}, "num_numbers: 7; it must be 2 to 6"),
        ({"max_target": 0}, "max_target: 0; it must be at least 1"),
        ({"size": 0}, "size: 0; it must be at least 1"),
        ({"held_out": -1}, "held_out: -1; it must be 0 or more"),
        ({"max_numbers": 9}, "countdown has no argument 'max_numbers'; did you mean 'max_number'"),
        (
            {"num_numbers": 2, "max_number": 3, "size": 90, "held_out": 10},
            r"only \d+ of 100 countdown problems \(size \+ held_out\) were found; lower these or raise",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"data.task_arguments: .*{message}"):
        load_task("countdown", arguments)
