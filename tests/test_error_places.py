"""The line that an error names is one that the user can edit."""

import sys
import sysconfig
from pathlib import Path

import pytest

from grpo_jax.config.run import RewardConfig
from grpo_jax.error_places import user_frame
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import RewardError, load_rewards

INSTALLED = Path(sysconfig.get_path("purelib")) / "some_library" / "exit_hooks.py"


def installed(source, name, file=INSTALLED):
    """A function of a library: its frames name a file among the installed packages."""
    namespace = {"sys_exit": sys.exit}
    exec(compile(source, str(file), "exec"), namespace)
    return namespace[name]


@pytest.fixture
def hooked_exit(monkeypatch):
    """sys.exit as Weights & Biases leaves it: a Python function that calls the real one."""
    monkeypatch.setattr(sys, "exit", installed("def leave(code=0):\n    sys_exit(code)\n", "leave"))


def test_an_exit_through_a_hook_is_in_the_reward(tmp_path, hooked_exit):
    (tmp_path / "exits.py").write_text("import sys\ndef f(completions):\n    sys.exit(0)\n")
    (reward,) = load_rewards([RewardConfig(function=f"{tmp_path}/exits.py:f")])
    with pytest.raises(RewardError, match=r"raised SystemExit\(0\) at exits.py:3 on a batch of 1 rows"):
        call_rewards([reward], ["p"], ["a"], {})


@pytest.mark.parametrize("spec", ["exits_when_imported:f", "{tmp_path}/exits_when_imported.py:f"])
def test_an_exit_through_a_hook_at_an_import(tmp_path, monkeypatch, hooked_exit, spec):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "exits_when_imported.py").write_text("import sys\n\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"exits_when_imported.py:3: importing it raised SystemExit\(0\)"):
        load_rewards([RewardConfig(function=spec.format(tmp_path=tmp_path))])


def caught(function, *arguments):
    try:
        function(*arguments)
    except BaseException as error:
        return error
    raise AssertionError("it raised nothing")


def test_an_error_in_a_library_is_at_the_line_that_called_it():
    def reward():
        return installed("def parse(text):\n    return int(text)\n", "parse")("x")

    frame = user_frame(caught(reward))
    assert (frame.filename, frame.line) == (
        __file__,
        'return installed("def parse(text):\\n    return int(text)\\n", "parse")("x")',
    )
    assert user_frame(caught(sys.modules["json"].loads, "{")).filename == __file__


def test_an_installed_module_counts_if_it_is_the_one_in_question():
    fails = installed("def fails():\n    1 / 0\n", "fails")
    assert user_frame(caught(fails)).filename == __file__
    assert user_frame(caught(fails), str(INSTALLED)).filename == str(INSTALLED)


def test_without_a_frame_of_the_user_the_innermost_counts():
    error = caught(installed("def fails():\n    1 / 0\n", "fails"))
    error.__traceback__ = error.__traceback__.tb_next  # as if a library had called it
    assert user_frame(error).filename == str(INSTALLED)
    assert user_frame(ValueError("never raised")) is None
