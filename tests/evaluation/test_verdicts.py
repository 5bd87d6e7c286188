"""What counts as correct: which reward decides, the threshold, and what is said of a choice."""

import numpy as np
import pytest
import small_run

from grpo_jax.config.run import RewardConfig
from grpo_jax.evaluation.verdicts import Correct, choose_correct, note_on_choice
from grpo_jax.models.loading import load_model
from grpo_jax.rewards.loading import Reward, load_rewards
from grpo_jax.run.build import build


def of_answer(completions, answer, **columns):
    return [0.0] * len(completions)


def of_form(completions, **columns):
    return [0.0] * len(completions)


def own(name, function, **changes):
    return Reward(name=name, function=function, source="mine.py:1", **changes)


def built_in(*names):
    arguments = {
        "length_penalty": {"target": 5}, "regex_format": {"pattern": "x"}, "required_words": {"words": ["a"]},
        "answer_match": {"where": "text"},
    }  # fmt: skip
    return load_rewards([RewardConfig(function=name, arguments=arguments.get(name, {})) for name in names])


@pytest.mark.parametrize(
    ("rewards", "name"),
    [
        ([own("a", of_form)], "a"),
        ([own("a", of_answer), own("b", of_answer)], "a"),
        # A check of form or a penalty listed first does not decide.
        ([own("a", of_form), own("b", of_answer)], "b"),
        (built_in("length_penalty", "exact_match"), "exact_match"),
        (built_in("regex_format", "repetition_penalty", "answer_match"), "answer_match"),
        (built_in("think_format", "think_format", "numeric_answer"), "numeric_answer"),
        ([*built_in("required_words"), own("b", of_form)], "b"),
        ([own("a", of_answer, weight=-1.0), own("b", of_form)], "b"),
        # An argument that is given is not read from the data.
        ([own("a", of_answer, arguments={"answer": "x"}), own("b", of_answer)], "b"),
        ([own("a", of_form), own("b", of_form, one_of=("ground_truth",))], "b"),
        (built_in("regex_format", "length_penalty"), "regex_format"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_reward_that_decides(rewards, name):
    correct = choose_correct(rewards, columns=["answer", "level"])
    assert (correct.name, rewards[correct.index].name, correct.threshold) == (name, name, 1.0)


def test_rewards_of_evaluation_and_names_come_first():
    rewards, judges = built_in("length_penalty", "exact_match"), [own("a", of_form), own("b", of_answer)]
    chosen = choose_correct(rewards, judges, columns=["answer"])
    assert chosen == Correct(name="a", index=2)
    chosen = choose_correct(rewards, judges, columns=["answer"], name="length_penalty", threshold=-0.5)
    assert chosen == Correct(name="length_penalty", index=0, threshold=-0.5)
    with pytest.raises(ValueError) as caught:
        choose_correct(rewards, judges, name="exact_macth")
    assert str(caught.value) == (
        "evaluation.correct.reward: there is no reward 'exact_macth'; the rewards are length_penalty, "
        "exact_match, a, b"
    )


def test_the_threshold():
    scores = np.array([[0.9, 0.89], [np.nan, 1.0]], np.float32)
    assert Correct(name="a", threshold=0.9).judge(scores).tolist() == [[True, False], [False, True]]
    assert Correct(name="a").judge(scores).tolist() == [[False, False], [False, True]]
    # No value is no verdict, however low the threshold is.
    assert Correct(name="a", threshold=-5.0).judge(scores).tolist() == [[True, True], [False, True]]


def test_a_choice_between_several_is_said():
    one, two = built_in("exact_match"), built_in("length_penalty", "exact_match")
    assert note_on_choice(choose_correct(one, columns=["answer"]), one, ()) is None
    note = note_on_choice(choose_correct(two, columns=["answer"]), two, ())
    assert note == (
        "a completion is correct in evaluation where exact_match gives 1 or more; evaluation.correct, such "
        "as {reward: exact_match, threshold: 1}, decides otherwise"
    )
    assert note_on_choice(choose_correct(two, one, columns=["answer"]), two, one) is None


def test_the_config_decides_before_a_model_is_loaded(tmp_path):
    rewards = "[{function: length_penalty, arguments: {target: 3}}, {function: exact_match}]"
    model = load_model("packaged:arithmetic")
    run = build(small_run.config(tmp_path, rewards=rewards), model=model)
    assert run.correct == Correct(name="exact_match", index=1)
    assert sum("where exact_match gives 1 or more" in note for note in run.notes) == 1
    changes = {"evaluation__correct__reward": "length_penalty", "evaluation__correct__threshold": -0.5}
    run = build(small_run.config(tmp_path, rewards=rewards, **changes), model=model)
    assert run.correct == Correct(name="length_penalty", index=0, threshold=-0.5)
    assert not any("is correct in evaluation" in note for note in run.notes)
    config = small_run.config(
        tmp_path, evaluation__correct__reward="nothing", model__hf_model_name="/nowhere"
    )
    with pytest.raises(ValueError, match=r"evaluation.correct.reward: there is no reward 'nothing'"):
        build(config)
    with pytest.raises(ValueError, match=r"evaluation.correct.threshold: nan; it must be a finite number"):
        small_run.config(tmp_path, evaluation__correct__threshold=".nan")
