"""Every kind of silent zero is named: the reward, the row, and what was compared."""

import json
import re

import numpy as np
import pytest
import small_run
from calm import CALM

from grpo_jax import score as command
from grpo_jax.config.run import RewardConfig
from grpo_jax.rewards.judging import judge
from grpo_jax.rewards.loading import Reward, RewardError, close_rewards, load_rewards
from grpo_jax.rewards.silences import find_silences, lost_rows
from grpo_jax.run.diagnostics import Notices
from grpo_jax.train import train
from grpo_jax.types import Example, Silence

MINE = """\
import os, sys, time

def right(prompts, completions, answer, **columns):
    return [float(text == a) for text, a in zip(completions, answer)]

def first_word(completions, answer):
    return [float(text.split()[:1] == [a]) for text, a in zip(completions, answer)]

def content(completions):
    return [float(len(c[0]["content"])) for c in completions]

def only_math(completions, task, **columns):
    return [1.0 if t == "math" else None for t in task]

def never(completions, **columns):
    return [None] * len(completions)

def slow(completions):
    if "sleep" in completions:
        time.sleep(1000)
    if "die" in completions:
        os._exit(1)
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    loaded = []

    def load(name, **settings):
        function = name if name in BUILT_IN else f"{tmp_path}/mine.py:{name}"
        loaded.extend(load_rewards([RewardConfig(function=function, **settings)]))
        return loaded[-1]

    yield load
    close_rewards(loaded)


BUILT_IN = ("exact_match", "answer_match", "numeric_answer", "length_penalty", "countdown")


def silences(reward, texts, prompt="p", **columns):
    """The silences of one reward; every column has one value for all rows, or a list of B."""
    rows = [
        {name: v[i] if isinstance(v, list) else v for name, v in columns.items()} for i in range(len(texts))
    ]
    examples = [Example(prompt, row, f"train.jsonl, line {3 + i}") for i, row in enumerate(rows)]
    scores = judge([reward], examples, texts)
    found = find_silences([reward], examples, texts, scores, lost_rows([reward]))
    assert all(
        silence.reward == reward.name and silence.first and "\n" not in silence.text for silence in found
    )
    return [(silence.kind, silence.text) for silence in found]


def test_the_line_shows_what_was_compared(load):
    assert silences(load("exact_match"), ["12+34=46", "46 "], answer=[["105", "0105"]] * 2, level=2) == [
        (
            "lowest",
            "the reward exact_match is 0 for every completion (2 of 2); first: train.jsonl, line 3: answer "
            "['105', '0105'], completion '12+34=46'",
        )
    ]
    ((_, text),) = silences(
        load("countdown"), ["1", "2"], numbers=[[3, 4], [5, 6]], target=7, other="x" * 500
    )
    assert text.endswith("line 3: numbers [3, 4], target 7, completion '1'")
    ((_, text),) = silences(load("right"), ["a" * 500, "b"], answer="c", level="x" * 500)
    assert text.endswith(f"answer 'c', completion '{'a' * 56}...") and "level" not in text


def test_no_line_where_nothing_is_wrong(load):
    assert silences(load("exact_match"), ["46", "1"], answer="46") == []
    assert silences(load("exact_match"), ["46", "46"], answer="46") == []  # all right
    assert silences(load("exact_match"), ["1"], answer="46") == []  # one completion says little
    assert silences(load("length_penalty", arguments={"target": 9}), ["a", "b"]) == []  # 0 is the best here
    ((kind, text),) = silences(load("length_penalty", arguments={"target": 1}), ["a" * 9] * 2)
    assert kind == "lowest" and "is -1 for every completion (2 of 2)" in text


def test_the_line_says_what_all_completions_lack(load):
    boxed = load("answer_match", arguments={"where": "boxed"})
    ((_, text),) = silences(boxed, ["46", "1"], answer="46")
    assert (
        r": none of them has an answer at `boxed` (\boxed{}); first: train.jsonl, line 3: answer '46'" in text
    )
    ((_, text),) = silences(boxed, [r"\boxed{45}", "1"], answer="46")
    assert "none of them" not in text
    ((_, text),) = silences(load("numeric_answer"), ["a", "b"], answer=46)
    assert "every completion (2 of 2): none of them has a number; first" in text


def test_text_compared_with_messages(load):
    # case data-13, the silent half: a list never equals a text
    chat = [{"role": "user", "content": "q"}]
    ((_, text),) = silences(load("right"), ["46", "1"], prompt=chat, answer="46")
    assert (
        'The prompts are messages, so a completion is a list of messages: its text is completion[0]["con'
        in text
    )
    ((_, text),) = silences(load("exact_match"), ["46", "1"], prompt=chat, answer="47")
    assert "messages" not in text  # a built-in reads both


def test_a_string_reward_on_chat_prompts(load):
    # case data-13
    examples = [Example([{"role": "user", "content": "q"}], {"answer": "46"})]
    match = r"'list' object has no attribute 'split'.*row 0 .*list of messages: its text is completion\[0\]"
    with pytest.raises(RewardError, match=match):
        judge([load("first_word")], examples, ["46"])
    with pytest.raises(RewardError, match=match):
        judge([load("first_word", timeout=60.0)], examples, ["46"])
    with pytest.raises(
        RewardError, match=r"string indices.*so a completion is a text, not a list of messages"
    ):
        judge([load("content")], [Example("q", {})], ["46"])


def test_missing_values(load):
    ((kind, text),) = silences(load("only_math"), ["a", "b", "c"], task=["math", "code", "code"], answer=1)
    assert kind == "some" and text == (
        "the reward only_math gives no value (None) for 2 of 3 completions; first: train.jsonl, line 4: "
        "task 'code', completion 'b'"
    )
    ((kind, text),) = silences(load("never"), ["a", "b"], answer=1, level=2)
    assert (
        kind == "none"
        and "(None) for any of 2 completions and takes no part; first: train.jsonl, line 3" in text
    )
    assert "answer 1, level 2, completion 'a'" in text


def test_rows_lost_to_a_timeout_or_a_dead_worker(load):
    reward = load("slow", timeout=1.0, rows_per_call=1)
    found = silences(reward, ["ab", "sleep", "abc", "die"])
    assert found == [
        (
            "lost",
            "the reward slow lost 2 of 4 completions, as the call ran over its timeout of 1 s; first: "
            "train.jsonl, line 4: completion 'sleep'",
        )
    ]
    ((_, text),) = silences(reward, ["ab", "c", "die"])
    assert (
        "lost 1 of 3 completions, as the worker process died in the call; first: train.jsonl, line 5" in text
    )
    assert silences(reward, ["ab", "c"]) == []


def test_a_task_without_places_shows_the_prompt():
    reward = Reward(name="f", function=lambda completions: [0] * len(completions))
    examples = [Example("12+34=", {"answer": 46})] * 2
    (silence,) = find_silences([reward], examples, ["1", "2"], np.zeros((2, 1)), [{}])
    assert (
        silence.text
        == "the reward f is 0 for every completion (2 of 2); first: prompt '12+34=': completion '1'"
    )


def test_when_a_run_reports_a_silence():
    every = [
        Silence("r", kind, f"has {kind}", f"row of {kind}") for kind in ("lowest", "some", "none", "lost")
    ]
    metrics = {**CALM, "rewards/r/missing": 1.0, "rewards/r/timeouts": 0.5}
    notices = Notices()
    none, lost, *others = notices.about(1, metrics, every)
    assert none.startswith("step 1: no value for any completion from the reward r, ")
    assert none.endswith(". First of r: row of none") and lost.endswith(". First of r: row of lost")
    assert others == [f"step 1: the reward r has {k}; first: row of {k}" for k in ("lowest", "some")]
    assert notices.about(2, metrics, every) == []
    assert notices.about(101, metrics, every) == [line.replace("step 1", "step 101") for line in (none, lost)]
    later = Notices()
    assert later.about(1, CALM) == []
    assert later.about(2, CALM, every[:1]) == []  # bad luck, not a silence


@pytest.mark.slow
def test_score_and_the_first_step_name_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_run.share_compilations(monkeypatch)
    rows = [{"prompt": f"{i}+{i}=", "answer": f"<{2 * i}>"} for i in range(12, 20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data__train_file": "train.jsonl", "rewards": '[{"function": "exact_match"}]'}
    line = r"the reward exact_match is 0 for every completion \((\d+) of \d+\); first: train.jsonl, line \d"
    config = small_run.config("run", training__num_steps=2, evaluation__num_prompts=0, **settings)
    assert train(config) == 0
    found = re.findall(line, " ".join(capsys.readouterr().out.split()))
    assert found == ["32"]
    argv = [
        *small_run.arguments("run", evaluation__num_prompts=0, **settings),
        "--num_prompts=4",
        "--num_samples=8",
    ]
    assert command.main([*argv, "--json"]) == 0
    (advice,) = [text for text in json.loads(capsys.readouterr().out)["advice"] if re.match(line, text)]
    assert "(32 of 32)" in advice
