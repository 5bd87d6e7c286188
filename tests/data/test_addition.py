"""Addition after solved examples."""

import re

import pytest

from grpo_jax.config.run import RewardConfig
from grpo_jax.data.tasks import load_task
from grpo_jax.data.tasks.addition import MAX_HELD_OUT, MAX_PAIRS, split_problems
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import check_columns, load_rewards


@pytest.mark.parametrize("digits", [1, 2, 3, 9])
def test_split(digits):
    train, held_out = split_problems(digits)
    low = 0 if digits == 1 else 10 ** (digits - 1)
    assert all(low <= number < 10**digits for problem in train + held_out for number in problem)
    assert len(set(train + held_out)) == len(train + held_out)
    sides = [{frozenset(problem) for problem in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert {(b, a) for a, b in train} == set(train) and {(b, a) for a, b in held_out} == set(held_out)
    pairs = {1: 55, 2: 4095}.get(digits, MAX_PAIRS)
    assert (len(sides[0]) + len(sides[1]), len(sides[1])) == (pairs, 20 if digits == 1 else MAX_HELD_OUT)


def test_split_is_fixed():
    # Literal: numbers reported for this task must mean the same problems tomorrow.
    assert split_problems(1)[1][:4] == [(4, 0), (4, 2), (8, 8), (5, 9)]
    assert split_problems(3)[1][:2] == [(357, 593), (804, 230)]


def test_prompt():
    task = load_task("addition", {"digits": 1, "shots": 2})
    assert (task.name, task.rewards) == ("addition", ("numeric_answer",))
    assert len(task.train) + len(task.evaluation) == 100
    for example in [*task.train, *task.evaluation]:
        assert re.fullmatch(
            r"(Q: What is \d \+ \d\?\nA: \d+\n\n){2}Q: What is \d \+ \d\?\nA:", example.prompt
        )
        *shots, (a, b, _) = re.findall(r"Q: What is (\d) \+ (\d)\?\nA:(?: (\d+))?", example.prompt)
        assert example.columns == {"answer": str(int(a) + int(b))}
        assert all(int(x) + int(y) == int(z) for x, y, z in shots)
        assert len({frozenset((x, y)) for x, y, *_ in [*shots, (a, b)]}) == 3
    assert load_task("addition", {"shots": 0}).train[0].prompt.startswith("Q: ")


def test_no_held_out_problem_is_a_solved_example():
    task = load_task("addition", {"digits": 1, "shots": 16})
    _, held_out = split_problems(1)
    solved = {
        (int(a), int(b))
        for example in [*task.train, *task.evaluation]
        for a, b in re.findall(r"Q: What is (\d) \+ (\d)\?\nA: ", example.prompt)
    }
    assert len(solved) > 40 and not solved & set(held_out)


def test_the_first_number_counts():
    task = load_task("addition")
    rewards = load_rewards(
        [RewardConfig(function=name, arguments=dict(task.reward_arguments[name])) for name in task.rewards]
    )
    check_columns(rewards, task.train[0].columns)
    completions = [" 7\n\nQ: What is 2 + 9?\nA: 11", " 11, or 7", "7", "no"]
    assert call_rewards(rewards, ["p"] * 4, completions, {"answer": ["7"] * 4})[:, 0].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digit": 2}, r"data\.task_arguments: addition has no argument 'digit'; did you mean 'digits'\?"),
        ({"zzz": 2}, r"addition has no argument 'zzz'; it takes digits, shots"),
        ({"digits": "two"}, r"data\.task_arguments: digits of addition is of type int, not 'two'"),
        ({"shots": True}, r"shots of addition is of type int, not True"),
        ({"digits": 0}, r"data\.task_arguments: digits: 0; it must be 1 to 9"),
        ({"shots": 17}, r"data\.task_arguments: shots: 17; it must be 0 to 16"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task("addition", arguments)
