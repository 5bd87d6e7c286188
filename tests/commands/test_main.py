"""The commands under one name: `grpo-jax` and `python -m grpo_jax`, and the report of `env`."""

import importlib
import json
import subprocess
import sys
import tomllib

import jax
import pytest
import small_run
import test_rooms

import grpo_jax
from grpo_jax import __main__, env
from grpo_jax.version import __version__


def test_alone_it_lists_the_commands(capsys):
    assert __main__.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: grpo-jax COMMAND")
    for name, text in __main__.COMMANDS.items():
        assert f"  {name:<8}  {text}\n" in err
    assert max(map(len, err.splitlines())) <= 100
    assert __main__.main(["--help"]) == 0
    assert capsys.readouterr().out == err


def test_the_list_is_that_of_the_rooms():
    assert set(__main__.COMMANDS) == set(test_rooms.COMMANDS)


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_help_says_what_the_list_says(name, capsys, monkeypatch):
    monkeypatch.setattr(grpo_jax, "generate", grpo_jax.generate)  # the command's module takes its place
    with pytest.raises(SystemExit, match=r"^0$"):
        importlib.import_module(f"grpo_jax.{name}").main(["--help"])
    assert __main__.COMMANDS[name] in " ".join(capsys.readouterr().out.split())


def test_version(capsys):
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"grpo-jax {__version__}\n"


@pytest.mark.parametrize(
    ("word", "advice"),
    [("trian", "did you mean `train`?"), ("zzz", "the commands are train, evaluate, generate, plan, score")],
)
def test_a_command_that_there_is_not(word, advice, capsys):
    assert __main__.main([word, "--help"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: there is no command `{word}`; {advice}")
    assert err.count("\n") == 1


def test_a_command_gets_its_arguments_and_gives_its_exit_code(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        __main__.main(["plan", "--run_dri=x"])
    assert capsys.readouterr().err == "error: unknown key 'run_dri'; did you mean 'run_dir'?\n"
    with pytest.raises(SystemExit, match=r"^0$"):
        __main__.main(["env", "--json"])
    assert json.loads(capsys.readouterr().out)["grpo_jax"]["version"] == __version__


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["plan"], ("packaged:arithmetic", "300 updates")),
        (["score", "--num_prompts=2", "--num_samples=2"], ("2 training prompts × 2 completions",)),
    ],
    ids=["plan", "score"],
)
def test_a_command_that_is_told_nothing_takes_the_main_job(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # no configs/ here
    with pytest.raises(SystemExit, match=r"^0$"):
        __main__.main(command)
    out, err = capsys.readouterr()
    assert all(word in out for word in words), out
    assert "packaged/default.yaml" in err
    assert list(tmp_path.iterdir()) == []


def test_as_a_user_types_it():
    done = subprocess.run(
        [sys.executable, "-m", "grpo_jax"], capture_output=True, text=True, env=small_run.environment()
    )
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == __main__.usage() + "\n"


def test_the_console_script_is_this_function():
    project = tomllib.loads((small_run.ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"grpo-jax": "grpo_jax.__main__:main"}


def test_env_names_what_a_bug_report_needs(capsys):
    assert env.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    sections = [line for line in lines if not line.startswith(" ")]
    assert sections == ["grpo_jax", "python", "machine", "jax", "distributions", "extras", "environment"]
    assert f"  {'jax':<20} {jax.__version__}" in lines
    assert f"  {'backend':<20} {jax.default_backend()}" in lines
    document = env.report()
    assert document["jax"]["compilation_cache"]["directory"] == jax.config.jax_compilation_cache_dir
    assert len(document["jax"]["devices"]) == jax.device_count()
    assert document["machine"]["cores"] >= 1


def test_env_shows_settings_and_no_secrets(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "JAX_COORDINATOR_ADDRESS", "JAX_SOME_TOKEN", "MY_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    shown = env.report()["environment"]
    assert shown["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert "secret" not in json.dumps(shown)


def test_env_reports_a_jax_that_does_not_work(monkeypatch):
    def broken():
        raise RuntimeError("no\n  device")

    monkeypatch.setattr(jax, "devices", broken)
    assert env.report()["jax"] == {"error": "RuntimeError: no device"}


def test_env_reads_what_the_package_declares(monkeypatch):
    declared = [
        "jax>=0.10",
        "PyYAML",
        "datasets>=2.14; extra == 'hub'",
        'math-verify[antlr4_13_2]>=0.8; extra == "math"',
        "grpo-jax[hub]; extra == 'test'",
        "tomli; python_version < '3.11'",
    ]
    monkeypatch.setattr(env.metadata, "requires", lambda name: declared)
    assert env.requirements() == {
        "": ["jax", "PyYAML", "tomli"],
        "hub": ["datasets"],
        "math": ["math-verify"],
    }

    def missing(name):
        raise env.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(env.metadata, "requires", missing)
    assert env.requirements() == {}
    assert env.report()["grpo_jax"]["installed"] is False
    assert env.version_of("no-such-distribution") is None
