"""A run that was cut anywhere and started again is the run that was not: same rows, same bits."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import small_run
from safetensors.numpy import load_file, save_file

import grpo_jax.train as train_module
from grpo_jax.models.directories import PACKAGED
from grpo_jax.models.loading import load_model
from grpo_jax.run import loop as run_loop
from grpo_jax.train import train

SLOW = """
import os, time

def slow_match(completions, answer):
    time.sleep(float(os.environ.get("SECONDS_PER_REWARD", 0)))
    return [float(c == a) for c, a in zip(completions, answer)]
"""


pytestmark = pytest.mark.usefixtures("shared_compilations")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A YAML file that adds a reward, which sleeps on demand, to the small run."""
    directory = tmp_path_factory.mktemp("resume")
    (directory / "slow.py").write_text(SLOW)
    content = {"rewards": [{"function": f"{directory}/slow.py:slow_match"}]}
    return Path(small_run.write_yaml(directory / "base.yaml", content))


@pytest.fixture(scope="module")
def argv(base):
    def make(run_dir, **changes):
        return [f"--config={base}", *small_run.arguments(run_dir, **changes)]

    return make


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """The run that nobody cut, by number of iterations."""

    @functools.cache
    def get(num_iterations):
        run_dir = tmp_path_factory.mktemp(f"whole{num_iterations}")
        assert train_module.main(argv(run_dir, algorithm__num_iterations=num_iterations)) == 0
        return run_dir

    return get


@pytest.mark.parametrize(
    ("num_iterations", "place", "call"),
    [
        (1, "evaluated", 1),  # of step 0: nothing is saved yet but the reference
        (1, "updated", 2),  # before the first checkpoint
        (1, "logged", 6),  # the row of a step whose checkpoint is missing
        (1, "saved", 2),  # the reference is the first save
        (1, "rewarded", 5),
        (1, "export", 1),  # after the last checkpoint
        (2, "rollout", 3),  # checkpoint 3 lies inside a rollout
        (2, "updated", 4),
        (2, "evaluation", 3),
        (2, "save", 3),
        (2, "saved", 4),  # the last step, inside a rollout
    ],
)
def test_cut_anywhere(num_iterations, place, call, argv, whole, tmp_path, monkeypatch):
    command = argv(tmp_path, algorithm__num_iterations=num_iterations)
    with monkeypatch.context() as context:
        small_run.crash_at(context, place, call)
        with pytest.raises(small_run.Crash):
            train_module.main(command)
    assert train_module.main(command) == 0
    small_run.assert_same_run(tmp_path, whole(num_iterations))


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_cut_again_and_again(num_iterations, argv, whole, tmp_path, monkeypatch):
    # No progress is lost with a checkpoint at every step, wherever the passes over a rollout are.
    command = argv(tmp_path, algorithm__num_iterations=num_iterations, checkpoints__every=1)
    for calls in (2, 3, 4):  # one, two, three steps of progress
        with monkeypatch.context() as context:
            small_run.crash_at(context, "updated", calls)
            with pytest.raises(small_run.Crash):
                train_module.main(command)
    assert small_run.rows(tmp_path)[-1]["step"] == 6
    assert train_module.main(command) == 0
    small_run.assert_same_run(tmp_path, whole(num_iterations))


@pytest.mark.parametrize(
    ("num_iterations", "signum", "at_step"),
    [(1, signal.SIGKILL, 4), (2, signal.SIGKILL, 4), (2, signal.SIGTERM, 5)],
)
def test_signals(num_iterations, signum, at_step, argv, whole, tmp_path):
    """As a user meets it: the command as a process, killed or interrupted, then the same command."""
    command = argv(tmp_path, algorithm__num_iterations=num_iterations)
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_jax.train", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=small_run.environment() | {"SECONDS_PER_REWARD": "0.2"},
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() or last_step(tmp_path) < at_step:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    cut = last_step(tmp_path)
    assert at_step <= cut < 7
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:
        assert process.returncode == 128 + signum and err == ""
        assert out.splitlines()[-1] == f"interrupted after step {cut}, saved; the same command continues it"
    if num_iterations == 2 and signum == signal.SIGKILL:
        assert small_run.command("train", *command).returncode == 0
    else:  # the same, a few seconds sooner
        assert train_module.main(command) == 0
    small_run.assert_same_run(tmp_path, whole(num_iterations))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("num_iterations", "during"), [(1, 2), (2, 2)])
def test_interrupt_saves_at_the_next_step(signum, num_iterations, during, argv, whole, tmp_path, monkeypatch):
    command = argv(tmp_path, algorithm__num_iterations=num_iterations)
    collect, calls = run_loop.collect, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == during:
            os.kill(os.getpid(), signum)
        return collect(*args)

    before = signal.getsignal(signum)
    with monkeypatch.context() as context:
        context.setattr(run_loop, "collect", interrupted)
        assert train_module.main(command) == 128 + signum
    step = 1 + num_iterations * (during - 1)
    assert last_step(tmp_path) == step and (tmp_path / "checkpoints" / str(step)).is_dir()
    assert not (tmp_path / "hf").exists() and signal.getsignal(signum) is before
    assert train_module.main(command) == 0
    small_run.assert_same_run(tmp_path, whole(num_iterations))


def test_interrupt_before_the_first_step(argv, whole, tmp_path, monkeypatch):
    command, evaluate = argv(tmp_path), run_loop.evaluate_run

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(run_loop, "evaluate_run", interrupted)
        assert train_module.main(command) == 128 + signal.SIGTERM
    assert train_module.main(command) == 0
    small_run.assert_same_run(tmp_path, whole(1))


def last_step(run_dir) -> int:
    steps = [-1]
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        if line.endswith("}"):  # the last one may be half written
            steps.append(json.loads(line)["step"])
    return max(steps)


def test_second_interrupt_ends_at_once(argv, tmp_path, monkeypatch):
    def interrupt_twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run_loop, "collect", interrupt_twice)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_module.main(argv(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before


def test_finished_run_started_again_changes_nothing(argv, whole, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(whole(2), run_dir)
    before = {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "completions.jsonl")}
    command = argv(run_dir, algorithm__num_iterations=2)
    assert train_module.main([*command, f"--run_dir={run_dir}"]) == 0
    assert "continuing after step 7 of 7" in capsys.readouterr().out
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    small_run.assert_same_run(run_dir, whole(2))


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_longer_run_continues_a_shorter_one(num_iterations, argv, whole, tmp_path):
    changes = {"algorithm__num_iterations": num_iterations, "tracking__completions_every": 1}
    short = {**changes, "training__num_steps": 3, "evaluation__every": 1}
    assert train_module.main(argv(tmp_path, **short)) == 0
    assert train_module.main(argv(tmp_path, **changes)) == 0  # evaluated every 3 again
    mine = small_run.leaves(tmp_path)
    for name, leaf in small_run.leaves(whole(num_iterations)).items():
        assert leaf.tobytes() == mine[name].tobytes(), name
    assert [row for row in small_run.rows(tmp_path) if row["step"] > 3] == [
        row for row in small_run.rows(whole(num_iterations)) if row["step"] > 3
    ]


def test_never_refuses_a_used_directory(argv, whole):
    with pytest.raises(ValueError, match=r"holds a run already and checkpoints.resume is never"):
        train_module.main(argv(whole(1), checkpoints__resume="never"))


def test_never_starts_in_a_new_directory(argv, tmp_path):
    assert train_module.main(argv(tmp_path, checkpoints__resume="never", training__num_steps=1)) == 0


def test_resume_from_another_run(argv, whole, tmp_path):
    source, before = tmp_path / "source", tmp_path / "one"
    assert train_module.main(argv(source, training__num_steps=3)) == 0
    files = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    command = argv(before, checkpoints__resume=source)
    assert train_module.main(command) == 0
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == files
    mine = small_run.leaves(before)
    for name, leaf in small_run.leaves(whole(1)).items():
        assert leaf.tobytes() == mine[name].tobytes(), name
    assert small_run.rows(before) == [row for row in small_run.rows(whole(1)) if row["step"] > 3]


def test_run_continued_from_another_can_be_cut_too(argv, whole, tmp_path, monkeypatch):
    source, run_dir = tmp_path / "source", tmp_path / "run"
    assert train_module.main(argv(source, training__num_steps=3)) == 0
    command = argv(run_dir, checkpoints__resume=source)
    for place, call in (("updated", 2), ("saved", 2)):
        with monkeypatch.context() as context:
            small_run.crash_at(context, place, call)
            with pytest.raises(small_run.Crash):
                train_module.main(command)
    assert train_module.main(command) == 0
    assert small_run.rows(run_dir) == [row for row in small_run.rows(whole(1)) if row["step"] > 3]


def test_another_learning_rate_from_another_run(argv, tmp_path):
    # What the run after a breakdown does: same state, another optimizer setting, new directory.
    source, run_dir = tmp_path / "source", tmp_path / "run"
    assert train_module.main(argv(source, training__num_steps=2)) == 0
    command = argv(run_dir, checkpoints__resume=source, training__learning_rate=5e-5, training__num_steps=3)
    assert train_module.main(command) == 0
    assert [row["learning_rate"] for row in small_run.rows(run_dir) if "loss" in row] == [
        pytest.approx(5e-5, rel=1e-6)
    ]


def test_refuses_what_is_no_run_to_resume(argv, whole, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoints.resume: .*nowhere.* is not auto, never or"):
        train_module.main(argv(tmp_path / "a", checkpoints__resume=tmp_path / "nowhere"))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"empty.* has no checkpoint"):
        train_module.main(argv(tmp_path / "a", checkpoints__resume=tmp_path / "empty"))
    (tmp_path / "b").mkdir()
    shutil.copy(whole(2) / "config.yaml", tmp_path / "b")
    with pytest.raises(ValueError, match="holds a run already"):
        train_module.main(argv(tmp_path / "b", checkpoints__resume=whole(1)))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__learning_rate": 2e-4}, "training.learning_rate is 0.0001 there and 0.0002 here"),
        ({"algorithm__kl_coef": 0.5}, "algorithm.kl_coef is 0.04 there and 0.5 here"),
        ({"training__seed": 3}, "training.seed is 0 there and 3 here"),
        ({"sampling__temperature": 0.9}, "sampling.temperature is 1.0 there and 0.9 here"),
        ({"model__dtype": "bfloat16"}, "model.dtype is 'float32' there and 'bfloat16' here"),
        ({"rewards": '[{"function": "exact_match"}]'}, "rewards is .* there and .*exact_match.* here"),
    ],
)
def test_refuses_changed_settings(changes, message, argv, whole):
    before = (whole(1) / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=message):
        train_module.main(argv(whole(1), **changes))
    assert (whole(1) / "config.yaml").read_bytes() == before


def test_changed_number_of_iterations_inside_a_rollout(argv, tmp_path):
    # One pass per rollout leaves no rollout in the checkpoint; step 3 of two passes would need it.
    source = tmp_path / "source"
    assert train_module.main(argv(source, training__num_steps=3)) == 0
    command = argv(tmp_path / "run", checkpoints__resume=source, algorithm__num_iterations=2)
    with pytest.raises(ValueError, match=r"algorithm.num_iterations"):
        train_module.main(command)


def shift_weights(directory) -> None:
    path = Path(directory) / "model.safetensors"
    tensors = load_file(path)
    save_file({name: value + 0.01 for name, value in tensors.items()}, path, metadata={"format": "pt"})


def test_reference_comes_from_the_checkpoint(argv, whole, tmp_path, monkeypatch):
    """Changing the model's files between two attempts changes nothing: neither state nor reference."""
    shutil.copytree(PACKAGED / "arithmetic", tmp_path / "model")
    command = argv(tmp_path / "run", model__hf_model_name=tmp_path / "model")
    monkeypatch.setattr("grpo_jax.run.trained_model.load_model", load_model)  # not the shared one
    with monkeypatch.context() as context:
        small_run.crash_at(context, "updated", 5)
        with pytest.raises(small_run.Crash):
            train_module.main(command)
    shift_weights(tmp_path / "model")
    assert train_module.main(command) == 0
    assert small_run.rows(tmp_path / "run") == small_run.rows(whole(1))


def test_fresh_start_has_a_fresh_reference(argv, tmp_path, monkeypatch):
    """A run cut before its first checkpoint starts anew: its reference is the model it starts from."""
    shutil.copytree(PACKAGED / "arithmetic", tmp_path / "model")
    changes = {"model__hf_model_name": tmp_path / "model", "evaluation__num_prompts": 0}
    changes |= {"training__num_steps": 5}
    command = argv(tmp_path / "run", **changes)
    monkeypatch.setattr("grpo_jax.run.trained_model.load_model", load_model)
    for place, call in (("updated", 2), ("updated", 5)):
        with monkeypatch.context() as context:
            small_run.crash_at(context, place, call)
            with pytest.raises(small_run.Crash):
                train_module.main(command)
        if call == 2:
            shift_weights(tmp_path / "model")
    assert train_module.main(command) == 0
    assert train_module.main(argv(tmp_path / "whole", **changes)) == 0
    assert small_run.rows(tmp_path / "run") == small_run.rows(tmp_path / "whole")


def test_half_written_config_is_no_obstacle(argv, tmp_path, monkeypatch):
    # The config is replaced in one move: a kill while it is written leaves no run behind.
    command = argv(tmp_path, training__num_steps=1)

    def crash(*_):
        raise small_run.Crash

    with monkeypatch.context() as context:
        context.setattr(os, "replace", crash)
        with pytest.raises(small_run.Crash):
            train_module.main(command)
    assert not (tmp_path / "config.yaml").exists()
    assert train_module.main(command) == 0


def test_without_kl_there_is_no_reference(argv, tmp_path):
    config = small_run.config(tmp_path, algorithm__kl_coef=0, training__num_steps=2)
    assert train(config) == 0
    assert not (tmp_path / "checkpoints" / "reference").exists()
    assert train(replace(config, training=replace(config.training, num_steps=3))) == 0
    assert [row["kl"] for row in small_run.rows(tmp_path) if "kl" in row] == [0.0] * 3
