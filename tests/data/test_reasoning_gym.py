"""The tasks of reasoning-gym: what we ask the library for, and the library itself where it is installed."""

import sys
import types

import pytest

from grpo_jax.config.run import RewardConfig
from grpo_jax.data.tasks import load_task
from grpo_jax.rewards import reasoning_gym
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import check_columns, load_rewards


@pytest.fixture
def created(monkeypatch):
    """A stand-in for the library that notes what is created."""
    calls = []

    def create_dataset(name, **settings):
        calls.append((name, settings))
        if "legs" in settings:
            raise TypeError("unexpected keyword argument 'legs'")
        questions = [i % 30 for i in range(settings["size"])]
        return (
            {"question": f"{i}?", "answer": str(i), "metadata": {"source_dataset": name}} for i in questions
        )

    def get_score_answer_fn(name):
        assert name == "leg_counting"
        return lambda answer, entry: 1.0 if answer == entry["answer"] else 0.01

    module = types.ModuleType("reasoning_gym")
    module.create_dataset, module.get_score_answer_fn = create_dataset, get_score_answer_fn
    module.factory = types.ModuleType("reasoning_gym.factory")
    module.factory.DATASETS = {"leg_counting": None, "rubiks_cube": None}
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", module.factory)
    reasoning_gym._scorer.cache_clear()
    yield calls
    reasoning_gym._scorer.cache_clear()


def rewards_of(task):
    rewards = load_rewards([RewardConfig(function=name) for name in task.rewards])
    check_columns(rewards, task.train[0].columns)
    return rewards


def test_a_task_of_a_stand_in(created):
    task = load_task("reasoning_gym:leg_counting", {"size": 40, "held_out": 10, "max_legs": 3})
    assert created == [("leg_counting", {"seed": 0, "size": 50, "max_legs": 3})]
    assert task.name == "reasoning_gym:leg_counting" and len(task.evaluation) == 10
    prompts = [e.prompt for e in [*task.evaluation, *task.train]]
    assert prompts == [f"{i}?" for i in range(30)]  # each question once
    columns = {"entry": [task.train[0].columns["entry"]] * 3}
    completions = ["10", "I think <answer>11</answer> no, <answer> 10\n</answer>!", "it is 10"]
    scores = call_rewards(rewards_of(task), ["p"] * 3, completions, columns)
    assert scores[:, 0].tolist() == pytest.approx([1, 1, 0.01])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("leg_countin", {}, r"has no task 'leg_countin'; did you mean 'reasoning_gym:leg_counting'\?"),
        ("zzz", {}, r"has no task 'zzz'; there are leg_counting, rubiks_cube"),
        ("leg_counting", {"legs": 3}, r"data\.task_arguments: leg_counting: TypeError: unexpected .* 'legs'"),
        ("leg_counting", {"size": "many"}, r"data\.task_arguments: size: 'many'; it must be a whole number"),
        ("leg_counting", {"held_out": -1}, r"data\.task_arguments: held_out: -1; it must be a whole number"),
        ("leg_counting", {"held_out": 30}, r"only 30 different questions here; lower held_out 30"),
    ],
)
def test_mistakes_are_named(created, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task(f"reasoning_gym:{name}", arguments)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r'needs reasoning-gym: pip install "grpo-jax\[reasoning-gym\]"'):
        load_task("reasoning_gym:leg_counting")
    assert call_rewards(
        load_rewards([RewardConfig(function="reasoning_gym")]), [], [], {"entry": []}
    ).shape == (
        0,
        1,
    )


def test_tasks_of_the_real_library():
    pytest.importorskip("reasoning_gym")
    task = load_task("reasoning_gym:leg_counting", {"size": 30, "held_out": 5, "max_animals": 3})
    assert len(task.evaluation) == 5 and not {e.prompt for e in task.train} & {
        e.prompt for e in task.evaluation
    }
    assert load_task("reasoning_gym:leg_counting", {"size": 30, "held_out": 5, "max_animals": 3}) == task
    examples = task.train[:4]
    columns = {"entry": [e.columns["entry"] for e in examples]}
    answers = [e.columns["answer"] for e in examples]
    prompts = [e.prompt for e in examples]
    assert call_rewards(rewards_of(task), prompts, answers, columns)[:, 0].tolist() == [1] * 4
    assert call_rewards(rewards_of(task), prompts, ["-1"] * 4, columns)[:, 0].max() < 0.5
    with pytest.raises(ValueError, match=r"data\.task_arguments: leg_counting: TypeError: "):
        load_task("reasoning_gym:leg_counting", {"no_such": 1})
