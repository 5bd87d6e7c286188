"""What a user sees of a command in a terminal of 60 and of 100 columns, and in a log."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time

import pytest
import small_run

from grpo_jax import __main__

# Says when JAX is imported, and waits there if it is told to.
DRIVER = """\
import os, runpy, signal, sys, time
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

class Hook:
    told = False

    def find_spec(self, name, path, target=None):
        if name == "jax" and not Hook.told:
            Hook.told = True
            os.write(1, b"\\n<<jax>>\\n")
            while "STAY" in os.environ:
                time.sleep(0.01)

sys.meta_path.insert(0, Hook())
command, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(f"grpo_jax.{command}", run_name="__main__", alter_sys=True)
"""
# Waits in the rollout of step 2 until the test lets it go on.
REWARD = """\
import pathlib, time
here = pathlib.Path(__file__).parent

def gate(prompts, completions, answer, trainer_state):
    if trainer_state.global_step == 1:
        (here / "waits").touch()
        while not (here / "go").exists():
            time.sleep(0.01)
    return [float(c == a) for c, a in zip(completions, answer)]
"""
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Recorded:
    """A command in a terminal of some width, or with a pipe if the width is 0, and what it wrote so far."""

    def __init__(self, *argv, width, **environment):
        self.text = ""
        self._reader, writer = pty.openpty() if width else os.pipe()
        if width:
            termios.tcsetwinsize(writer, (24, width))
        env = small_run.environment() | {"TERM": "xterm", "PYTHONUNBUFFERED": "1"} | environment
        for name in ("COLUMNS", "LINES", "FORCE_COLOR"):
            env.pop(name, None)
        command = [sys.executable, "-c", DRIVER, *map(str, argv)]
        self.process = subprocess.Popen(command, stdin=writer, stdout=writer, stderr=writer, env=env)
        os.close(writer)
        os.set_blocking(self._reader, False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self._reader)

    def _read(self) -> bool:
        """Reads what is there, and says whether more may come."""
        try:
            part = os.read(self._reader, 65536)
        except BlockingIOError:
            return True
        except OSError:  # a terminal that nobody writes to
            return False
        self.text += part.decode()
        return bool(part)

    def wait(self, happened, seconds=120):
        """Reads until something has happened."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.text
            if not self._read():
                assert happened(), self.text
                return
            time.sleep(0.01)

    def finish(self) -> int:
        """Reads to the end and returns the exit code."""
        deadline = time.monotonic() + 120
        while self._read():
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)
        return self.process.wait(timeout=30)

    @property
    def lines(self) -> list[str]:
        """All lines that were on the screen, also those that others have replaced."""
        return [line.rstrip() for line in re.split(r"[\r\n]+", _ESCAPE.sub("", self.text))]


def interrupted_run(tmp_path, width):
    """Trains, sends Ctrl-C in the rollout of step 2, and returns what was recorded."""
    (tmp_path / "gate.py").write_text(REWARD)
    rewards = f"--rewards=[{{function: '{tmp_path}/gate.py:gate'}}]"
    argv = small_run.arguments(tmp_path / "run", tracking__completions_every=1)
    with Recorded("train", *argv, rewards, width=width) as recorded:
        recorded.wait((tmp_path / "waits").exists)
        if width:  # the bar moves four times in a second
            recorded.wait(lambda: "step 1/7  rewarding" in recorded.text)
        recorded.process.send_signal(signal.SIGINT)
        recorded.wait(lambda: "stops at" in recorded.text)
        # Said while the step goes on.
        assert small_run.rows(tmp_path / "run")[-1]["step"] == 1
        (tmp_path / "go").touch()
        assert recorded.finish() == 130, recorded.text
    assert small_run.rows(tmp_path / "run")[-1]["step"] == 2
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    return recorded


def first(lines, words):
    """Returns the index of the first line with the words."""
    found = [index for index, line in enumerate(lines) if words in line]
    assert found, (words, lines)
    return found[0]


@pytest.mark.parametrize("width", [60, 100])
def test_in_a_terminal(width, tmp_path):
    lines = interrupted_run(tmp_path, width).lines
    order = ["loading", "<<jax>>", "grpo on packaged:arithmetic", "step 0/7  evaluating", "step 1/7"]
    order += ["interrupted: finishing the rollout of step 2", "interrupted after step 2"]
    places = [first(lines, words) for words in order]
    assert places == sorted(places), lines
    # A path is never broken; everything else fits.
    assert all(len(line) <= width for line in lines if str(tmp_path) not in line), lines
    words = " ".join(" ".join(lines).split())
    assert "interrupted: finishing the rollout of step 2, then saving; Ctrl-C again stops at once" in words
    assert "interrupted after step 2, saved; the same command continues it" in words
    bar = next(line for line in reversed(lines) if "step 1/7" in line and " left" in line)
    assert re.search(r"step 1/7  rewarding +0:\d\d:\d\d  \S+ left", bar), bar
    figures = next(line for line in reversed(lines) if line.startswith("reward "))
    assert re.match(r"reward \S+  held-out \S+  kl \S+", figures), figures
    assert ("no signal" in figures) == (width == 100)
    assert ("┃ advantage ┃" in words) == (width == 100)  # of the table of completions


def test_in_a_log(tmp_path):
    recorded = interrupted_run(tmp_path, 0)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", recorded.text), recorded.text
    order = ["grpo-jax train: loading", "<<jax>>", "grpo on packaged", "evaluating 4 held-out prompts"]
    order += ["step 0/7  evaluation", "sampling 32 completions", "rewarding", "updating", "step 1/7  reward"]
    order += ["interrupted: finishing the rollout of step 2, then saving; Ctrl-C again stops at once"]
    order += ["step 2/7  reward", "interrupted after step 2, saved; the same command continues it"]
    places = [first(recorded.lines, words) for words in order]
    assert places == sorted(places), recorded.lines
    # Phases are lines at the start alone.
    assert recorded.text.count("sampling") == recorded.text.count("updating") == 1


@pytest.mark.parametrize("width", [60, 0])
def test_ctrl_c_while_it_loads(width, tmp_path):
    with Recorded("train", *small_run.arguments(tmp_path / "run"), width=width, STAY="1") as recorded:
        recorded.wait(lambda: "<<jax>>" in recorded.text)
        recorded.process.send_signal(signal.SIGINT)
        assert recorded.finish() == 130
    said = [line for line in recorded.lines if line][-1]
    assert said == "interrupted while loading", recorded.text
    assert "Traceback" not in recorded.text and not (tmp_path / "run").exists()
    if width:  # the cursor is back
        assert recorded.text.rindex("\x1b[?25h") > recorded.text.rindex("\x1b[?25l")


def test_results_are_alone_on_standard_output(tmp_path):
    argv = ["--model=packaged:arithmetic", "--prompt=12+34=", "--temperature=0", "--max_new_tokens=5"]
    with Recorded("generate", *argv, width=60) as recorded:
        assert recorded.finish() == 0
    lines = recorded.lines
    assert first(lines, "loading") < first(lines, "<<jax>>") < first(lines, "46")
    assert [line for line in lines if line][-1] == "46"


def run(capfd, *argv) -> tuple[str, str]:
    """Runs a command in this process, as the console script does, and returns what it printed."""
    capfd.readouterr()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match=r"^0$"):
        __main__.main([str(word) for word in argv])
    assert signal.getsignal(signal.SIGINT) is handler
    return capfd.readouterr()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


def test_train_prints_its_rows_as_json_lines(trained, capfd):
    out, err = run(capfd, "train", *small_run.arguments(trained), "--json")
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    assert out.splitlines() == lines and len(lines) > 7
    assert "grpo on packaged:arithmetic" in err and "saved" in err


def test_quiet_says_the_result_alone(trained, tmp_path, capfd):
    out, err = run(capfd, "train", *small_run.arguments(tmp_path / "run"), "--quiet")
    assert out == f"saved {tmp_path}/run/hf, a directory that transformers opens\n" and err == ""
    out, err = run(capfd, "plan", "--quiet")
    assert out.startswith("grpo on packaged:arithmetic") and err == ""


def test_verbose_says_phases_programs_and_files(tmp_path, capfd):
    changes = {"training__num_steps": 3, "checkpoints__every": 1, "sampling__max_new_tokens": 4}
    out, _ = run(capfd, "train", *small_run.arguments(tmp_path, **changes), "--verbose")
    assert re.search(r"compilation cache: /", out)
    for step in (1, 2, 3):
        assert f"saving step {step} in {tmp_path}/checkpoints" in out
    assert re.search(r"compiled \S*train_step\S* in \d+\.\d s", out), out
    _, err = run(capfd, "generate", "--model=packaged:arithmetic", "--prompt=1+1=", "--verbose")
    assert "sampling 1 completions" in err


def test_json_of_the_other_commands(trained, tmp_path, capfd):
    out, _ = run(capfd, "plan", "--json", *small_run.arguments(tmp_path, training__num_steps=3))
    assert json.loads(out)["num_steps"] == 3 and out.count("\n") == 1
    out, _ = run(
        capfd, "generate", "--model=packaged:arithmetic", "--prompt=12+34=", "--json", "--temperature=0"
    )
    assert json.loads(out) == {"prompt": "12+34=", "completion": "46"}
    if not trained.exists():  # this test runs alone
        run(capfd, "train", *small_run.arguments(trained))
    out, _ = run(capfd, "export", trained, "--to", tmp_path / "model", "--json")
    wanted = {"run": str(trained), "step": 7, "to": f"{tmp_path}/model", "opens": "transformers"}
    assert json.loads(out) == wanted


def test_quiet_and_verbose_contradict_each_other(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        __main__.main(["plan", "--quiet", "--verbose"])
    assert "quiet, verbose: give one of them, not both" in capsys.readouterr().err
