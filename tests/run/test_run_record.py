"""run.json: versions, devices, command, times and the exit code of a run and of its earlier attempts."""

import json
import subprocess
import sys
from datetime import datetime

import jax
import pytest

from grpo_jax.run.run_record import recording
from grpo_jax.trackers.redaction import redact_command
from grpo_jax.version import __version__


def read(run_dir):
    return json.loads((run_dir / "run.json").read_text())


def test_a_run_that_ends(tmp_path, monkeypatch):
    argv = ["python", "-m", "grpo_jax.train", "--run_dir=x", "--tracking.api_key=hunter22"]
    monkeypatch.setattr(sys, "orig_argv", argv)
    with recording() as record:
        assert not list(tmp_path.iterdir())
        record.start(tmp_path)
        now = read(tmp_path)
        assert now["ended"] is now["exit_code"] is now["seconds"] is None
    found = read(tmp_path)
    assert found["command"] == "python -m grpo_jax.train --run_dir=x --tracking.api_key=[redacted]"
    assert found["versions"]["grpo_jax"] == __version__
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["python"] == sys.version.split()[0]
    assert {"flax", "transformers", "optax"} <= set(found["versions"])
    assert len(found["devices"]) == len(jax.devices()) and found["devices"][0].startswith(
        jax.default_backend()
    )
    assert datetime.fromisoformat(found["started"]) <= datetime.fromisoformat(found["ended"])
    assert (found["exit_code"], found["error"], found["earlier"]) == (0, None, [])
    assert 0 <= found["seconds"] < 60
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no\n such"), 2),
        (RuntimeError("step 3"), 2),
        (KeyError("bug"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
    ],
)
def test_a_run_that_fails_and_one_that_continues_it(error, code, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-value")
    with pytest.raises(type(error)), recording() as record:
        record.start(tmp_path)
        raise error
    failed = read(tmp_path)
    assert failed["exit_code"] == code and failed["error"].startswith(type(error).__name__)
    assert "\n" not in failed["error"] and failed["seconds"] is not None
    with pytest.raises(OSError), recording() as record:
        record.start(tmp_path)
        raise OSError("the server does not take s3cr3t-value")
    with recording() as record:
        record.start(tmp_path)
        record.exit_code = 143  # saved after SIGTERM
    last = read(tmp_path)
    assert (last["exit_code"], last["error"]) == (143, None)
    assert [attempt["exit_code"] for attempt in last["earlier"]] == [2, code]
    assert last["earlier"][0]["error"] == "OSError: the server does not take [redacted]"
    assert all("earlier" not in attempt for attempt in last["earlier"])


def test_a_file_that_cannot_be_read_is_replaced(tmp_path):
    (tmp_path / "run.json").write_text("{half")
    with recording() as record:
        record.start(tmp_path)
    assert read(tmp_path)["exit_code"] == 0


def test_nothing_is_written_without_a_start_or_a_directory(tmp_path):
    with recording() as record:
        record.start(None)
    with pytest.raises(ValueError), recording():
        raise ValueError("in the config")
    assert not list(tmp_path.iterdir())


def test_the_commit_of_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()

    def commit_now():
        with recording() as record:
            record.start(tmp_path / "run")
        return read(tmp_path / "run")["commits"]["directory"]

    def git(*arguments):
        name = ["-c", "user.name=n", "-c", "user.email=e@x"]
        subprocess.run(["git", *name, *arguments], check=True, capture_output=True)

    git("init")
    assert commit_now() is None  # nothing is committed
    (tmp_path / "a.txt").write_text("1")
    git("add", "a.txt")
    git("commit", "-m", "first")
    commit = commit_now()
    assert len(commit) == 40
    (tmp_path / "a.txt").write_text("2")
    assert commit_now() == f"{commit}+changes"


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["train", "--config", "my file.yaml"], "train --config 'my file.yaml'"),
        (["train", "--http_token", "abc", "--seed=1"], "train --http_token [redacted] --seed=1"),
        (["a", "--url=https://me:pw@host/x"], "a --url=https://[redacted]@host/x"),
        (["a", "--rewards", "[{function: f, arguments: {api_key: abc}}]"],
         """a --rewards '[{"function": "f", "arguments": {"api_key": "[redacted]"}}]'"""),
        (["a", "--data.columns={a: b}"], "a '--data.columns={a: b}'"),
        (["a", "--x=[half"], "a '--x=[half'"),
    ],
)  # fmt: skip
def test_secrets_of_a_command_line(argv, shown):
    assert redact_command(argv).replace("'", "") == shown.replace("'", "")
    assert "abc" not in redact_command(argv) and "pw@" not in redact_command(argv)
