"""What an evaluation cannot tell: lines on figures that are the same for every completion."""

import re

import numpy as np
import pytest

from grpo_jax.evaluation.outcomes import Outcome
from grpo_jax.evaluation.standstill import remarks
from grpo_jax.evaluation.verdicts import Correct
from grpo_jax.rewards.loading import Reward

REWARDS = [Reward(name=name, function=len) for name in ("a", "b")]
NAN = float("nan")


def outcome(a, b=(0.0, 0.0, 1.0, 1.0), threshold=1.0, greedy=False):
    """Two prompts, two samples each."""
    scores = np.stack([a, b], axis=1).astype(np.float32)
    correct = Correct(name="a", threshold=threshold)
    totals = np.nan_to_num(scores).sum(axis=1).reshape(2, 2)
    verdicts = correct.judge(scores[:, 0]).reshape(2, 2)
    return correct, Outcome(
        greedy=np.full(2, greedy) | verdicts.all(),
        correct=verdicts,
        scores=scores,
        totals=totals,
        valid=np.ones((2, 2), bool),
        lengths=np.array([1, 2, 3, 3]),
        finished=np.ones(4, bool),
    )


@pytest.mark.parametrize(
    ("a", "changes", "words"),
    [
        ((0.0, 1.0, 0.0, 0.0), {}, None),
        ((0.0, 0.9, 0.0, 0.0), {"greedy": True}, None),
        ((0.0, 0.9, NAN, 0.0), {}, "largest value of a is 0.9 and correct means 1 or more, so eval/gr"),
        # The threshold that is proposed is one that the value reaches.
        ((0.0, 0.123456789, 0.0, 0.0), {}, "set evaluation.correct: {reward: a, threshold: 0.12345679}"),
        ((-3.0, -1.0, -2.0, -2.0), {}, "a gives at most -1.0 and correct means 1 or more, .*like a penalty"),
        ((-3.0, 0.0, -2.0, -2.0), {}, "a gives at most 0.0 and .*like a penalty"),
        ((NAN, NAN, NAN, NAN), {}, "a, which decides what is correct, gives no value for any held-out"),
        ((0.0, 0.0, 0.0, 0.0), {}, "^a is 0 for every held-out completion, although other rewards differ,"),
        ((0.0, 0.0, 0.0, 0.0), {"b": (0, 0, 0, 0)}, "^a is 0 for every held-out completion, so eval/greedy"),
        ((1.0, 2.0, 1.5, 1.0), {}, r"every held-out completion is correct \(a gives 1 or more\) although"),
        ((1.0, 1.0, 1.0, 1.0), {"b": (0, 0, 0, 0)}, None),
    ],
)  # fmt: skip
def test_what_is_said_of_correct(a, changes, words):
    correct, observed = outcome(a, **changes)
    lines = remarks(observed, REWARDS, correct)
    assert len(lines) == (words is not None)
    if words is not None:
        assert re.search(words, lines[0]) and "\n" not in lines[0], lines[0]


def test_a_proposed_threshold_is_reached():
    value = 0.123456789
    _, observed = outcome((0.0, value, 0.0, 0.0), threshold=float("0.12345679"))
    assert observed.correct.sum() == 1


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("eval/mean@2", "0"),
        ("eval/pass@2", "0"),
        ("eval/greedy_accuracy", "0"),
        ("eval/left/mean@2", "0"),
        ("eval/rewards/a/missing", "0"),
        ("eval/clipped_ratio", "0"),
        ("eval/right/greedy_accuracy", "0"),
        ("eval/reward", None),
        ("eval/rewards/a/mean", None),
        ("eval/rewards/b/mean", None),
        ("eval/mean_length", None),
    ],
)
def test_the_best_metric_that_is_the_same_everywhere(metric, value):
    correct, observed = outcome((0.0, 0.9, 0.0, 0.0))
    lines = remarks(observed, REWARDS, correct, categories={"left": [0], "right": [1]}, best_metric=metric)[
        1:
    ]
    if value is None:
        assert lines == []
    else:
        assert lines[0].startswith(
            f"checkpoints.best_metric {metric} is {value} for every held-out completion"
        )
