"""The command line as a user meets it: help, typos, one-line errors."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

import jax
import pytest
import small_run
import yaml
from safetensors.numpy import load_file, save_file

from grpo_jax import evaluate, plan, score, train
from grpo_jax.cli import enable_compilation_cache, run_command
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.models.directories import PACKAGED

COMMANDS = {"train": train.main, "evaluate": evaluate.main, "plan": plan.main, "score": score.main}


def fails(command, *argv, capsys) -> str:
    """Runs a command in this process; returns the one line on stderr of its failure."""
    with pytest.raises(SystemExit) as exited:
        run_command(lambda: COMMANDS[command]([str(arg) for arg in argv]))
    out, err = capsys.readouterr()
    assert exited.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_options_and_their_docs(command, capsys):
    with pytest.raises(SystemExit) as exited:
        COMMANDS[command](["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert exited.value.code == 0
    assert f"usage: python -m grpo_jax.{command}" in out
    shown = (
        "--training.batch_size",
        "B, the number of *completions* per optimizer step",
        "weight of the KL term",
        "--config",
    )
    for text in ("--model MODEL", "or a run directory") if command == "evaluate" else shown:
        assert text in out


def test_help_of_generate():
    done = small_run.command("generate", "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "--num_samples" in done.stdout and "0 decodes greedily" in " ".join(done.stdout.split())


TYPOS = [
    ({"algoritm": {"name": "grpo"}}, "algoritm.name", "algorithm.name"),
    ({"algorithm": {"kl_ceof": 0.1}}, "algorithm.kl_ceof", "algorithm.kl_coef"),
    ({"run_dri": "x"}, "run_dri", "run_dir"),
    ({"rewards": [{"function": "exact_match", "wieght": 2}]}, "rewards.wieght", "rewards.weight"),
    ({"training": {"learning_rat": 1}}, "training.learning_rat", "training.learning_rate"),
]


@pytest.mark.parametrize(("content", "key", "nearest"), TYPOS, ids=lambda v: str(v)[:30])
def test_unknown_key_in_a_file(content, key, nearest, tmp_path, capsys):
    path = small_run.write_yaml(tmp_path / "a.yaml", content)
    assert fails("plan", "--config", path, capsys=capsys) == (
        f"{path}, line {len(yaml.dump(content).splitlines())}: unknown key {key!r}; did you mean {nearest!r}?"
    )


@pytest.mark.parametrize(
    ("command", "option", "nearest"),
    [
        ("train", "--training.lerning_rate=1", "training.learning_rate"),
        ("train", "--trainin.seed=1", "training.seed"),
        ("plan", "--rundir=x", "run_dir"),
        ("evaluate", "--modle=x", "model"),
    ],
)
def test_unknown_key_on_the_command_line(command, option, nearest, capsys):
    key = option.removeprefix("--").split("=")[0]
    assert fails(command, option, capsys=capsys) == f"unknown key {key!r}; did you mean {nearest!r}?"


def test_unknown_key_that_resembles_nothing(capsys):
    assert fails("plan", "--zzz=1", capsys=capsys) == "unknown key 'zzz'; --help lists the keys"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1\n b", "--config: not YAML: while parsing a flow sequence, line 1"),
        ("just text", "--config: expected keys and values, got 'just text'"),
        ("", "--config: expected keys and values, got ''"),
    ],
)
def test_files_that_are_no_config(content, message, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(content)
    assert fails("plan", "--config", tmp_path / "a.yaml", capsys=capsys).startswith(message)


def test_missing_config_file(tmp_path, capsys):
    message = fails("plan", "--config", tmp_path / "no.yaml", capsys=capsys)
    assert message.startswith("--config: ") and "no.yaml" in message
    assert fails("plan", "stray", capsys=capsys) == "unrecognized arguments: stray"
    assert "expected one argument" in fails("plan", "--training.seed", capsys=capsys)
    assert fails("evaluate", capsys=capsys) == "the following arguments are required: model"


def test_section_left_empty(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("training:\n  # seed: 1\nrun_dir: x\n")
    path = tmp_path / "a.yaml"
    message = fails("plan", "--config", path, capsys=capsys)
    assert message.startswith(f"{path}, line 1: training: None is not a section")


@pytest.fixture
def broken(tmp_path):
    """What goes wrong: name -> (arguments, words of the message)."""
    jsonl = tmp_path / "prompts.jsonl"
    jsonl.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": \n')
    long = tmp_path / "long.jsonl"
    long.write_text(
        "".join(json.dumps({"prompt": p, "answer": "2"}) + "\n" for p in ("1+1=", "1+" * 14 + "1="))
    )
    model = tmp_path / "model"
    shutil.copytree(PACKAGED / "arithmetic", model)
    tensors = load_file(model / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "rewards.py").write_text("def good(completions):\n    return [1.0 for _ in completions]\n")
    match, drop = "--rewards=[{function: exact_match}]", "--data.over_length=drop"
    new = "--sampling.max_new_tokens=5"
    return {
        "line": ([f"--data.train_file={jsonl}", match], (f"{jsonl}, line 2: not valid JSON",)),
        "too long": (
            [f"--data.train_file={long}", match, new],
            ("1 of 2 training prompts have more than 27 tokens (the first ", "long.jsonl, line 2 with 30)"),
        ),
        "all too long": (
            [f"--data.train_file={long}", match, new, "--data.max_prompt_length=2", drop],
            ("all 2 training prompts have more than 2 tokens; nothing is left",),
        ),
        "positions": (
            ["--sampling.max_new_tokens=32"],
            ("sampling.max_new_tokens 32 exceed the 32 positions of packaged:arithmetic",),
        ),
        "no reward": ([f"--data.train_file={long}"], ("rewards: none are given", "exact_match")),
        "no file": ([f"--data.train_file={tmp_path}/no.jsonl", match], ("FileNotFoundError", "no.jsonl")),
        "no model": ([f"--model.hf_model_name={tmp_path}/gone"], ("FileNotFoundError", "/gone: no such")),
        "tensor": ([f"--model.hf_model_name={model}"], ("missing tensor transformer.h.1.mlp.c_fc.weight",)),
        "task": (["--data.task=arithmetics"], ("arithmetics", "arithmetic")),
        "reward": (["--rewards=[{function: exact_mach}]"], ("did you mean `exact_match`?",)),
        "reward file": (
            [f"--rewards=[{{function: '{tmp_path}/rewards.py:god'}}]"],
            ("rewards.py has no `god`; did you mean `good` (line 1)?",),
        ),
        "column": (
            [f"--data.train_file={long}", "--rewards=[{function: length_penalty}]", new],
            ("reward `length_penalty` (built in) needs the argument `target`",),
        ),
        "warmup": (
            ["--training.warmup_steps=9", "--training.lr_schedule=linear", "--training.num_steps=9", new],
            ("warmup_steps 9 must be below the 9 steps",),
        ),
        "columns": (
            [f"--data.train_file={long}", match, "--data.columns={prompt: question}"],
            ("long.jsonl, line 1: data.columns: there is no column `question`", "prompt, answer"),
        ),
        "template": (
            [f"--data.train_file={long}", match, "--data.prompt_template={{ promt }}"],
            ("long.jsonl, line 1: data.prompt_template: 'promt' is undefined", "prompt, answer"),
        ),
        "suffix": ([f"--data.train_file={tmp_path}/a.xlsx", match], ("a.xlsx: files of rows end in",)),
        "argument": (
            ["--data.task=addition", "--data.task_arguments={digit: 2}"],
            ("addition has no argument 'digit'; did you mean 'digits'?",),
        ),
        "over": (
            ["--data.max_prompt_length=30", new],
            ("data.max_prompt_length 30 + sampling.max_new_tokens 5 exceed the 32 positions",),
        ),
    }  # fmt: skip


NAMES = (
    "line", "too long", "all too long", "positions", "no reward", "no file", "no model", "tensor", "task",
    "reward", "reward file", "column", "warmup", "over", "columns", "template", "suffix", "argument",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_mistake_gives_one_line_before_anything_compiles(name, broken, tmp_path, capsys, monkeypatch):
    argv, words = broken[name]
    compiled = small_run.note_compilations(monkeypatch)
    message = fails("train", *argv, f"--run_dir={tmp_path}/run", capsys=capsys)
    for word in words:
        assert word in message
    assert not set(compiled) & set(small_run.PROGRAMS)
    assert not (tmp_path / "run").exists()  # and the same command works once the mistake is gone


def test_as_a_user_types_it(broken, tmp_path):
    # One of them in a process of its own: exit code, one line on stderr, nothing else but the first line.
    done = small_run.command("train", *broken["line"][0], f"--run_dir={tmp_path}/run")
    assert done.stdout == "grpo-jax train: loading\n" and "line 2: not valid JSON" in small_run.error_of(done)


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("GRPO_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown key"):
        run_command(lambda: plan.main(["--zzz=1"]))


def test_exit_codes(capsys):
    for code in (None, 0, 143):
        with pytest.raises(SystemExit) as exited:
            run_command(lambda code=code: code)
        assert exited.value.code == (code or 0)
    assert capsys.readouterr() == ("", "")

    def raises(error):
        def main():
            raise error

        return main

    for error, line in (
        (ValueError("two\n  lines"), "error: two lines\n"),
        (ValueError(), "error: ValueError\n"),
        (RuntimeError("step 3: no"), "error: RuntimeError: step 3: no\n"),
        (
            FileNotFoundError(2, "No such file", "x"),
            "error: FileNotFoundError: [Errno 2] No such file: 'x'\n",
        ),
        (ImportError("install it"), "error: install it\n"),
    ):
        with pytest.raises(SystemExit) as exited:
            run_command(raises(error))
        assert exited.value.code == 2 and capsys.readouterr().err == line
    with pytest.raises(KeyError):  # a bug of ours keeps its traceback
        run_command(raises(KeyError("bug")))


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner.

    Args:
        rate: a rate.
        names: some names.
    """

    rate: float = 1.0
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record.

    Args:
        inner: a section.
        flag: a switch.
        count: a number or nothing.
    """

    inner: Inner = Inner()
    flag: bool = False
    count: int | None = 3


def test_parse_record_coerces_by_type():
    def parse(*argv):
        return parse_record(Record, list(argv), command="c", description="d", config_option=False)

    assert parse() == Record()
    got = parse("--inner.rate", "1e-5", "--flag", "true", "--count", "null", "--inner.names", "[a, b]")
    assert got == Record(inner=Inner(rate=1e-5, names=["a", "b"]), flag=True, count=None)
    assert isinstance(parse("--inner.rate", "2").inner.rate, float)
    with pytest.raises(ValueError, match="unknown key 'config'"):
        parse("--config", "x.yaml")


def test_problems_of_a_config_have_a_line_each(capsys):
    with pytest.raises(SystemExit) as exited:
        run_command(lambda: plan.main(["--training.seed=-1", "--rundir=x"]))
    assert exited.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 problems with the config:",
        "  unknown key 'rundir'; did you mean 'run_dir'?",
        "  training.seed: -1; it must be in [0, 2**31)",
    ]


def test_help_names_the_switch_for_tracebacks(capsys):
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    assert "GRPO_JAX_TRACEBACK=1" in capsys.readouterr().out


def test_arguments_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--training.seed=4"])
    assert parse_record(Config, None, command="c", description="d").training.seed == 4


def test_compilation_cache_directory(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
        assert enable_compilation_cache() == tmp_path / "mine"
        assert (tmp_path / "mine").is_dir()
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert enable_compilation_cache() == tmp_path / "xdg" / "grpo_jax" / "xla"
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot be made: no error
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_reward_failure_in_the_middle_of_a_run(tmp_path):
    """Exit code 2 and one line; the rows stay; after fixing the file the same command goes on."""
    flag = tmp_path / "broken"
    flag.touch()
    (tmp_path / "mine.py").write_text(
        "import os\ncalls = []\n"
        "def mine(completions, answer):\n"
        "    calls.append(1)\n"
        f"    if len(calls) > 6 and os.path.exists({str(flag)!r}):\n"
        "        return [1 / 0 for _ in completions]\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]\n"
    )
    rewards = f"--rewards=[{{function: '{tmp_path}/mine.py:mine'}}]"
    argv = [*small_run.arguments(tmp_path / "run"), rewards]
    done = small_run.command("train", *argv)
    message = small_run.error_of(done)
    assert "reward `mine`" in message and "ZeroDivisionError('division by zero') at mine.py:6" in message
    assert [row["step"] for row in small_run.rows(tmp_path / "run")][-1] == 3
    flag.unlink()
    assert train.main(argv) == 0
    assert [row["step"] for row in small_run.rows(tmp_path / "run") if "loss" in row] == list(range(1, 8))


def test_import_of_the_package_needs_no_transformers():
    code = "import sys, grpo_jax; print([m for m in ('transformers', 'orbax') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=small_run.environment(), check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--tracking.tensorboard"], True),
        (["--tracking.tensorboard", "--training.seed", "3"], True),
        (["--tracking.tensorboard", "false"], False),
        (["--tracking.tensorboard=true"], True),
    ],
)
def test_a_switch_needs_no_value(argv, wanted):
    config = parse_record(Config, argv, command="x", description="x")
    assert config.tracking.tensorboard is wanted


def test_ctrl_c_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        run_command(interrupted)
    assert exit_.value.code == 130 and capsys.readouterr().err == "interrupted\n"
