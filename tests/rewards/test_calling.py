"""Reward functions get copies of their own, whatever they do with them, and cannot end a run by an exit."""

import copy
import json
import os
import signal
import threading

import numpy as np
import pytest
import small_run

from grpo_jax.config.run import RewardConfig
from grpo_jax.rewards.calling import call_rewards, own_copy
from grpo_jax.rewards.judging import judge
from grpo_jax.rewards.loading import Reward, RewardError, close_rewards, load_rewards
from grpo_jax.train import train
from grpo_jax.types import Example

# Rewards as people write them: they change what they are handed, and still count right on their own copies.
VANDALS = '''\
def uses_up(completions, allowed, **columns):
    """1 if the completion is allowed; each allowed answer is ticked off, as countdown rewards do."""
    values = []
    for text, left in zip(completions, allowed):
        values.append(float(text in left))
        if text in left:
            left.remove(text)
    return values

def copies(completions, allowed, **columns):
    return uses_up(completions, [list(left) for left in allowed])

def judge(prompts, completions, answer):
    """Builds the conversation that a judge would read, in place."""
    values = []
    for conversation, completion, gold in zip(prompts, completions, answer):
        conversation += completion
        values.append(float(len(conversation) == 2 and conversation[-1]["content"] == gold))
    return values

def shout(completions):
    for completion in completions:
        completion[0]["content"] = completion[0]["content"].upper()
    return [0.0] * len(completions)

def right(completions, answer):
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]

def nested(completions, info):
    values = [float(len(entry["numbers"]["left"])) for entry in info]
    for entry in info:
        entry["numbers"]["left"].clear()
        entry["seen"] = True
    return values

def arguments(completions, words):
    return [float(len(words) and words.pop() is not None) for _ in completions[:1]] * len(completions)

def fails_late(completions, allowed):
    for left in allowed:
        left.pop()
    return [1.0 / (len(c) - 3) for c in completions]
'''


@pytest.fixture
def load(tmp_path):
    (tmp_path / "vandals.py").write_text(VANDALS)
    loaded = []

    def load(name, **settings):
        function = f"{settings.pop('kind', '')}{tmp_path}/vandals.py:{name}"
        loaded.extend(load_rewards([RewardConfig(function=function, **settings)]))
        return loaded[-1]

    yield load
    close_rewards(loaded)


def chat(text):
    return [{"role": "user", "content": text}]


def repeated(example, count=4):
    """One example for a group of siblings, as the actor has it."""
    return [example] * count


@pytest.mark.parametrize("settings", [{}, {"timeout": 60.0}], ids=["here", "worker"])
def test_a_reward_cannot_change_a_column_nor_a_siblings_row(load, settings):
    # case data-04
    example = Example("34+71=", {"allowed": ["105", "95"]})
    before, reward = copy.deepcopy(example), load("uses_up", **settings)
    for _ in range(2):  # the second epoch
        assert judge([reward], repeated(example), ["105", "105", "95", "9"])[:, 0].tolist() == [1, 1, 1, 0]
    assert example == before


def test_a_reward_that_extends_the_prompt(load):
    # case data-33
    example = Example(chat("34+71"), {"answer": "105"})
    before = copy.deepcopy(example)
    for _ in range(2):
        assert judge([load("judge")], repeated(example), ["105", "1", "105", "2"])[:, 0].tolist() == [
            1,
            0,
            1,
            0,
        ]
    assert example == before


def test_a_reward_that_edits_completions_hurts_no_other(load):
    example = Example(chat("q"), {"answer": "yes"})
    for order in (("shout", "right"), ("right", "shout")):
        scores = judge([load(name) for name in order], repeated(example, 2), ["yes", "no"])
        assert scores[:, order.index("right")].tolist() == [1, 0]


@pytest.mark.parametrize("settings", [{}, {"timeout": 60.0}], ids=["here", "worker"])
def test_nested_values_and_arguments_are_copied(load, settings):
    example = Example("p", {"info": {"numbers": {"left": [1, 2]}}})
    assert judge([load("nested", **settings)], repeated(example, 2), ["a", "b"])[:, 0].tolist() == [2, 2]
    assert example.columns == {"info": {"numbers": {"left": [1, 2]}}}
    reward = load("arguments", arguments={"words": ["once"]}, **settings)
    assert [call_rewards([reward], ["p"], ["a"], {})[0, 0] for _ in range(2)] == [1, 1]


def test_the_search_for_a_row_that_fails_changes_nothing(load):
    example = Example("p", {"allowed": ["a"]})
    with pytest.raises(RewardError, match=r"ZeroDivisionError.*row 2 \(completion 'abc'\)"):
        judge([load("fails_late")], repeated(example), ["a", "b", "abc", "d"])
    assert example.columns == {"allowed": ["a"]}


def test_a_verl_function_gets_copies_too(tmp_path):
    (tmp_path / "score.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, extra=None):\n"
        "    return float(ground_truth.pop() + extra_info['left'].pop() + extra.pop())\n"
    )
    function = f"verl:{tmp_path}/score.py:compute_score"
    (reward,) = load_rewards([RewardConfig(function=function, arguments={"extra": [100]})])
    example = Example("p", {"ground_truth": [1], "extra_info": {"left": [10]}})
    for _ in range(2):
        assert judge([reward], repeated(example, 2), ["a", "b"])[:, 0].tolist() == [111, 111]


def test_copies_have_nothing_in_common():
    message = {"role": "user", "content": "q", "parts": [[1], [2]]}
    value = [message, message, {"at": np.arange(3)}, (1, [2])]
    copied = own_copy(value)
    assert copied[:2] == [message, message] and copied[0] is not copied[1] and copied[3] == (1, [2])
    assert copied[3][1] is not value[3][1] and not np.shares_memory(copied[2]["at"], value[2]["at"])
    lock = threading.Lock()  # refuses to be copied
    assert own_copy([lock])[0] is lock


@pytest.mark.slow
def test_training_rows_are_the_same_in_every_epoch(tmp_path, monkeypatch):
    # case data-04: rewards, samples and held-out figures, of a whole run and of one in two parts
    monkeypatch.chdir(tmp_path)
    small_run.share_compilations(monkeypatch)
    (tmp_path / "vandals.py").write_text(VANDALS)
    sums = [(12, 34), (50, 17), (8, 9), (33, 44), (71, 5), (60, 21), (14, 15), (9, 80)]
    lines = [{"prompt": f"{a}+{b}=", "allowed": [str(a + b), str(a + b - 10)]} for a, b in sums]
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "data__train_file": "train.jsonl",
        "data__eval_file": "held_out.jsonl",
        "tracking__completions_every": 1,
        "evaluation__every": 1,
        "training__learning_rate": 1e-4,
    }

    def run(directory, function, num_steps):
        rewards = f'[{{"function": "vandals.py:{function}"}}]'
        settings["training__num_steps"] = num_steps
        assert train(small_run.config(directory, rewards=rewards, **settings)) == 0
        named = [small_run.rows(directory, name) for name in ("metrics", "completions")]
        return json.loads(
            json.dumps(named).replace(f"rewards/{function}/", "rewards/it/").replace(function, "it")
        )

    honest = run("honest", "copies", 3)
    run("vandal", "uses_up", 1)
    assert run("vandal", "uses_up", 3) == honest
    assert honest[0][-1]["eval/rewards/it/mean"] > 0


# What ends the process must not end a run as if it had succeeded (case trust-14).


@pytest.mark.parametrize(
    "line",
    ["sys.exit(0)", "sys.exit('no')", "exit()", "raise KeyboardInterrupt", "raise SystemExit", "raise Panic"],
)
def test_a_reward_that_exits_is_named(tmp_path, line):
    (tmp_path / "exits.py").write_text(
        "import sys\nclass Panic(BaseException): ...\ndef f(completions, answer):\n"
        f"    if 'bad' in completions:\n        {line}\n    return [0.0] * len(completions)\n"
    )
    (reward,) = load_rewards([RewardConfig(function=f"{tmp_path}/exits.py:f")])
    match = r"`f` \(.*exits.py:3\) raised .* at exits.py:5 on a batch of 3 rows; row 1 \(completion 'bad'\)"
    with pytest.raises(RewardError, match=match):
        call_rewards([reward], ["p"] * 3, ["a", "bad", "b"], {"answer": [1] * 3})


def test_an_exit_after_some_batches_ends_a_run_with_an_error(tmp_path):
    (tmp_path / "exits.py").write_text(
        "import sys\ncalls = []\ndef exits(completions, answer):\n    calls.append(1)\n"
        "    if len(calls) == 2:\n        sys.exit(0)\n    return [0.0] * len(completions)\n"
    )
    (reward,) = load_rewards([RewardConfig(function=f"{tmp_path}/exits.py:exits")])
    example = Example("p", {"answer": 1})
    judge([reward], [example], ["a"])
    with pytest.raises(
        RewardError, match=r"SystemExit\(0\) at exits.py:6 on .*; no single row does so alone"
    ):
        judge([reward], [example], ["a"])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_inside_a_reward_goes_through(signum):
    def interrupt(*_):
        raise KeyboardInterrupt

    def f(completions):
        os.kill(os.getpid(), signum)
        for _ in range(10_000_000):  # until it arrives
            pass
        return [0.0]

    handler = signal.signal(signum, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            call_rewards([Reward(name="f", function=f)], ["p"], ["a"], {})
        assert signal.getsignal(signum) is interrupt
    finally:
        signal.signal(signum, handler)


def test_a_handler_that_a_reward_sets_stays(monkeypatch):
    handler = signal.getsignal(signal.SIGINT)

    def own(*_): ...

    def f(completions):
        signal.signal(signal.SIGINT, own)
        return [0.0]

    try:
        call_rewards([Reward(name="f", function=f)], ["p"], ["a"], {})
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_keyboard_interrupt_of_a_reward_in_another_thread():
    def f(completions):
        raise KeyboardInterrupt

    def call():
        with pytest.raises(RewardError, match="KeyboardInterrupt"):
            call_rewards([Reward(name="f", function=f)], ["p"], ["a"], {})
        done.append(True)

    done = []
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert done


def test_a_fork_does_not_come_back_twice(tmp_path):
    notes = tmp_path / "notes"

    def f(completions):
        os.fork()
        return [0.0]

    call_rewards([Reward(name="f", function=f)], ["p"], ["a"], {})
    with notes.open("a") as file:  # the child would write as well
        file.write(f"{os.getpid()}\n")
    os.wait()
    assert notes.read_text() == f"{os.getpid()}\n"


def test_an_exit_at_the_import_of_a_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "exits_at_import.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"exits_at_import.py:2: importing it raised SystemExit\(0\)"):
        load_rewards([RewardConfig(function="exits_at_import:f")])


def test_the_old_name_of_call_rewards_still_works():
    from grpo_jax import rewards

    assert rewards.score is call_rewards
