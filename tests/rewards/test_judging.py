"""Judging keeps the order of rows, messages and missing values, and a verdict also reports silences."""

from types import SimpleNamespace

import numpy as np

from grpo_jax.rewards.judging import judge, reach_verdict
from grpo_jax.rewards.loading import Reward
from grpo_jax.types import Example

EXAMPLES = [
    Example("12+34=", {"answer": "46", "tag": "a"}),
    Example("7+8=", {"answer": "15", "tag": "b"}),
    Example("50+5=", {"answer": "55", "tag": "c"}),
]


def test_judge_gives_columns_in_the_order_of_the_rows():
    seen = {}

    def f(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return list(range(len(completions)))

    examples = [e for e in EXAMPLES[:2] for _ in range(2)]
    scores = judge((Reward(name="f", function=f, weight=2.0),), examples, list("wxyz"))
    assert seen == {
        "prompts": ["12+34=", "12+34=", "7+8=", "7+8="],
        "completions": ["w", "x", "y", "z"],
        "answer": ["46", "46", "15", "15"],
        "tag": ["a", "a", "b", "b"],
    }
    np.testing.assert_array_equal(scores, [[0], [1], [2], [3]])


def test_judge_hands_messages_to_conversations():
    messages = [{"role": "user", "content": "hi"}]
    seen = []

    def f(completions):
        seen.extend(completions)
        return [1.0, 1.0]

    judge((Reward(name="f", function=f),), [Example(messages, {}), Example("hi", {})], ["a", "b"])
    assert seen == [[{"role": "assistant", "content": "a"}], "b"]


def test_judge_of_missing_rewards():
    def some(completions):
        return [None, 1.0, None]

    def none(completions):
        return [None, None, 0.5]

    rewards = (Reward(name="some", function=some), Reward(name="none", function=none, weight=4.0))
    scores = judge(rewards, EXAMPLES, ["x"] * 3)
    np.testing.assert_array_equal(np.isnan(scores), [[True, True], [False, True], [True, False]])


def test_a_verdict_names_silences_and_counts_what_was_lost():
    pool = SimpleNamespace(judge=lambda *_: [0.0, np.nan, 1.0], last_lost={1: "it ran over 1.0 s"})
    rewards = (
        Reward(name="slow", function=len, pool=pool),
        Reward(name="never", function=lambda completions: [None] * len(completions)),
    )
    verdict = reach_verdict(rewards, EXAMPLES, ["x"] * 3)
    np.testing.assert_array_equal(verdict.scores, [[0, np.nan], [np.nan, np.nan], [1, np.nan]])
    assert verdict.num_lost == {"slow": 1}
    assert [(s.reward, s.kind) for s in verdict.silences] == [("slow", "lost"), ("never", "none")]
