"""Reward functions in worker processes: the same rewards, time limits, and no process left behind."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import grpo_jax
from grpo_jax.config.run import RewardConfig
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import RewardError, close_rewards, load_rewards

FILE = """\
import asyncio, os, signal, subprocess, sys, time

def length(completions):
    return [float(len(c)) for c in completions]

def rows(completions):
    return [float(len(completions))] * len(completions)

def pid(completions):
    return [float(os.getpid() % 2**20)] * len(completions)

def half(completions, answer=None, **columns):
    return [None if c == "none" else 0.5 for c in completions]

def command(completions, pids=None):
    for c in completions:
        if c == "sleep":
            child = subprocess.Popen(["sleep", "1000"])
            with open(pids[0], "w") as file:
                file.write(f"{os.getpid()} {child.pid}")
            time.sleep(1000)
        elif c == "exit":
            os._exit(3)
        elif c == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif c == "sys.exit":
            sys.exit()
        elif c == "interrupt":
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(1000)
    return [1.0] * len(completions)

def forks(completions):
    if completions[0] == "fork":
        os.fork()
    return [float(len(c)) for c in completions]

async def later(completions):
    await asyncio.sleep(1000 if completions[0] == "sleep" else 0)
    return [float(len(c)) for c in completions]

def jax(completions):
    from grpo_jax.rewards.answers.extraction import last_boxed
    from grpo_jax.rewards.answers import extraction
    assert extraction.last_boxed is last_boxed
    assert sys.stdin.read() == ""
    return [float(any(name in sys.modules for name in ("jax", "jaxlib", "flax", "transformers")))]

def jax_if_asked_for(completions):
    assert "jax" not in sys.modules
    from grpo_jax import kl_k1
    import jax
    return [float(kl_k1.__name__ == "kl_k1" and {d.platform for d in jax.devices()} == {"cpu"})]

def ratio(completions, answer):
    return [len(c) / a for c, a in zip(completions, answer)]

def text(completions):
    return ["1" if c == "bad" else 1.0 for c in completions]

def short(completions):
    return [1.0]

def odd(completions):
    return (lambda: 1)
"""


@pytest.fixture
def load(tmp_path):
    """Loads functions of FILE into pools, and closes them."""
    (tmp_path / "mine.py").write_text(FILE)
    loaded = []

    def load(name, source=None, **settings):
        if source is not None:
            (tmp_path / "mine.py").write_text(source)
        settings = {"timeout": 60.0, **settings}
        loaded.extend(load_rewards([RewardConfig(function=f"{tmp_path}/mine.py:{name}", **settings)]))
        return loaded[-1]

    yield load
    close_rewards(loaded)


def scored(reward, completions, **columns):
    return call_rewards([reward], ["p"] * len(completions), completions, columns)[:, 0].tolist()


def alive(pid: int) -> bool:
    """Says whether a process runs; one that nobody has waited for is dead all the same."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return not Path("/proc").is_dir()


def gone(pids: list[int], seconds=10.0) -> bool:
    """Waits until none of the processes runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.02)
    return False


def pids_of(reward) -> list[int]:
    return [worker.process.pid for worker in reward.pool._workers]


# The values that come back


@pytest.mark.parametrize("settings", [{}, {"workers": 3}, {"workers": 2, "rows_per_call": 1}], ids=str)
def test_the_rows_come_back_in_order(load, settings):
    reward = load("length", **settings)
    texts = ["x" * (7 * i % 11) for i in range(10)]
    for _ in range(2):
        assert scored(reward, texts) == [len(text) for text in texts]


@pytest.mark.parametrize(
    "settings, sizes",
    [
        ({}, [5] * 5),
        ({"workers": 2}, [3, 3, 3, 2, 2]),
        ({"workers": 8}, [1] * 5),
        ({"workers": 2, "rows_per_call": 2}, [2, 2, 2, 2, 1]),
        ({"rows_per_call": 9}, [5] * 5),
    ],
    ids=str,
)
def test_rows_of_a_call(load, settings, sizes):
    assert scored(load("rows", **settings), ["x"] * 5) == sizes


def test_none_stays_none_and_messages_stay_messages(load):
    assert np.isnan(scored(load("half"), ["none", "a"], answer=[1, 2])).tolist() == [True, False]
    reward = load("length")
    chat = [[{"role": "user", "content": "q"}]] * 2
    assert call_rewards([reward], chat, ["abc", "d"], {})[:, 0].tolist() == [1, 1]  # lists of one message


def test_a_built_in_and_arguments():
    (reward,) = load_rewards(
        [RewardConfig(function="length_penalty", arguments={"target": 2}, timeout=60.0, weight=0.5)]
    )
    assert (reward.name, reward.weight) == ("length_penalty", 0.5)
    assert scored(reward, ["abc", "a"]) == [-0.5, 0]
    close_rewards([reward])


def test_workers_start_once_and_only_when_needed(load):
    reward = load("pid", workers=2)
    assert pids_of(reward) == []
    first = scored(reward, ["a"] * 4)
    assert len(set(first)) == 2 and scored(reward, ["a"] * 4) == first
    assert scored(reward, ["a"]) == first[:1]


def test_a_verl_function(tmp_path):
    source = (
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': float(solution_str == ground_truth)}\n"
    )
    (tmp_path / "judge.py").write_text(source)
    (reward,) = load_rewards([RewardConfig(function=f"verl:{tmp_path}/judge.py:compute_score", timeout=60.0)])
    assert scored(reward, ["7", "8"], answer=["7", "7"]) == [1, 0]
    close_rewards([reward])


# The modules and devices of a worker


def test_a_worker_has_no_jax(load):
    assert scored(load("jax"), ["a"]) == [0]


def test_a_worker_that_asks_for_jax_gets_the_cpu(load):
    assert scored(load("jax_if_asked_for"), ["a"]) == [1]


# Timeouts and workers that die


def test_a_call_over_its_time_costs_its_rows(load, tmp_path):
    reward = load("command", timeout=1.0, workers=2, rows_per_call=1)
    pids = [str(tmp_path / "pids")] * 4
    values = scored(reward, ["a", "sleep", "b", "c"], pids=pids)
    assert np.isnan(values).tolist() == [False, True, False, False]
    assert gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])  # and the command that it ran
    assert len(pids_of(reward)) == 2
    assert list(reward.pool.last_lost) == [1]
    assert scored(reward, ["a"] * 4, pids=pids) == [1] * 4
    assert not reward.pool.last_lost  # counted once


@pytest.mark.parametrize("how", ["exit", "die"])
def test_a_worker_that_dies_costs_its_rows(load, how):
    reward = load("command", rows_per_call=2)
    values = scored(reward, ["a", how, "b", "c"])
    assert np.isnan(values).tolist() == [True, True, False, False]
    assert len(reward.pool.last_lost) == 2


def test_a_worker_killed_between_batches_costs_one_call(load):
    reward = load("length", rows_per_call=1)
    assert scored(reward, ["a", "b"]) == [1, 1]
    os.kill(pids_of(reward)[0], signal.SIGKILL)
    time.sleep(0.1)
    assert np.isnan(scored(reward, ["a", "b"])).tolist() == [True, False]
    assert scored(reward, ["a", "b"]) == [1, 1]


def test_a_function_that_forks(load):
    # case trust-13: the answer of the child must not be taken for that to the next batch
    reward = load("forks")
    assert [scored(reward, texts) for texts in (["a"], ["fork"], ["abc"], ["ab"])] == [[1], [4], [3], [2]]


def test_an_async_function(load):
    reward = load("later", timeout=1.0, rows_per_call=1)
    values = scored(reward, ["ab", "sleep", "abc"])
    assert values[::2] == [2, 3] and np.isnan(values[1]) and len(reward.pool.last_lost) == 1


# Functions with mistakes


@pytest.mark.parametrize(
    "name, texts, match",
    [
        (
            "ratio",
            ["a", "b", "c"],
            r"`ratio` .*ZeroDivisionError.* at mine.py:\d+ .*row 0.*row 0 is row 2 of",
        ),
        (
            "text",
            ["a", "b", "bad"],
            "`text` .*returned '1' of type str for row 0.*row 0 is row 2 of the batch",
        ),
        ("text", ["bad", "b"], "'1' of type str for row 0.*'bad'\\)$"),
        ("short", ["a", "b"], "`short` .*returned 1 values for 2 completions"),
        ("command", ["a", "sys.exit"], r"`command` .*raised SystemExit\(\) at mine.py:\d+ .*'sys.exit'\)$"),
        ("odd", ["a"], "returned function, not a list"),
    ],
)
def test_an_error_names_function_row_and_place(load, name, texts, match):
    reward = load(name, rows_per_call=2)
    with pytest.raises(RewardError, match=match) as caught:
        scored(reward, texts, answer=[1, 1, 0][: len(texts)])
    assert "\n" not in str(caught.value)
    assert pids_of(reward) == []


def test_a_function_that_only_a_worker_cannot_load(load):
    source = "import sys\nif 'rewards/worker' in sys.argv[0]:\n    raise OSError('no disk')\n"
    reward = load("f", source + "def f(completions):\n    return []\n")
    with pytest.raises(
        RewardError, match=r"mine.py:3: importing it raised OSError\('no disk'\) \(in a worker"
    ):
        scored(reward, ["a"])


def test_a_worker_that_cannot_start(load):
    source = "import os, sys\nif 'rewards/worker' in sys.argv[0]:\n    os._exit(1)\n"
    reward = load("f", source + "def f(completions):\n    return []\n")
    with pytest.raises(RewardError, match=r"reward `f` .*a worker process ended, or did not start in time"):
        scored(reward, ["a"])


def test_a_column_that_cannot_be_pickled(load):
    with pytest.raises(RewardError, match=r"reward `half` .*a column cannot go to a worker process"):
        scored(load("half"), ["a"], answer=[lambda: 1])


def test_arguments_that_cannot_be_handed_over():
    with pytest.raises(ValueError, match=r"`required_words` .*its arguments cannot go to a worker process"):
        load_rewards([RewardConfig(function="required_words", arguments={"words": {"a"}}, timeout=1.0)])


# No process outlives the run


def test_closing_ends_the_workers(load):
    reward = load("pid", workers=2)
    scored(reward, ["a", "b"])
    pids = pids_of(reward)
    assert all(map(alive, pids)) and len(pids) == 2
    close_rewards([reward])
    assert not any(map(alive, pids))
    assert scored(reward, ["a"])[0] not in {pid % 2**20 for pid in pids}  # it may be used again


def test_forgetting_a_reward_ends_its_workers(load, tmp_path):
    (reward,) = load_rewards([RewardConfig(function=f"{tmp_path}/mine.py:length", timeout=60.0)])
    scored(reward, ["a"])
    (pid,) = pids_of(reward)
    del reward
    gc.collect()
    with pytest.raises(ProcessLookupError):  # at once, and waited for
        os.kill(pid, 0)


def test_ctrl_c_during_a_call(load):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    reward = load("command")
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        scored(reward, ["interrupt"])
    signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - started < 30 and pids_of(reward) == []


RUN = """\
import importlib.util, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
spec = importlib.util.spec_from_file_location("stand_in", sys.argv[1] + "/rewards/worker.py")
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
from pathlib import Path
worker._stand_in_for_package(Path(sys.argv[1]))  # a start without JAX

from types import SimpleNamespace
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import load_rewards
settings = dict(weight=1.0, arguments={}, timeout=500.0, workers=1, rows_per_call=None)
(reward,) = load_rewards([SimpleNamespace(function=sys.argv[2] + ":command", **settings)])
how, pids = sys.argv[3:]
if how in ("exit", "exception"):
    call_rewards([reward], ["p"], ["a"], {"pids": [pids]})
    print(reward.pool._workers[0].process.pid, flush=True)
    if how == "exception":
        raise RuntimeError("no")
else:
    call_rewards([reward], ["p"], ["sleep"], {"pids": [pids]})
"""


@pytest.mark.parametrize("how", ["exit", "exception", "SIGINT", "SIGTERM", "SIGKILL"])
def test_no_worker_outlives_the_run(load, tmp_path, how):
    load("length")
    (tmp_path / "run.py").write_text(RUN)
    pids = tmp_path / "pids"
    arguments = [grpo_jax.__path__[0], tmp_path / "mine.py", how, pids]
    run = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if how.startswith("SIG"):
        end = time.monotonic() + 30
        while not (pids.exists() and len(pids.read_text().split()) == 2) and time.monotonic() < end:
            time.sleep(0.02)
        run.send_signal(getattr(signal, how))
    output, _ = run.communicate(timeout=30)
    workers = [int(pid) for pid in (pids.read_text() if pids.exists() else output).split()]
    assert workers and (run.returncode == 0) == (how == "exit")
    assert gone(workers)
