"""Every command that READMEs, pages, docstrings and the headers of configs print runs as it is printed.

Training is made short by a few options. A model that is not shipped is a tiny one under the same name, or
the command ends with the error that says what is missing (tests have no network).
"""

import importlib
import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
import small_run

import grpo_jax
from grpo_jax import __main__
from grpo_jax.config.default import or_default
from grpo_jax.config.sampling import SamplingConfig

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "grpo_jax").rglob("*.py"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md", "benchmarks/README.md")),
    *sorted((ROOT / "grpo_jax").rglob("README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SOURCES = [*PAGES, *PACKAGE, *sorted((ROOT / "configs").glob("*.yaml"))]
NAMES = "|".join(__main__.COMMANDS)
COMMAND = rf"(?:python -m grpo_jax[. ]|grpo-jax )((?:{NAMES})(?:`|$|[ ]+#| (?:--\w|runs/|RUN ).*$))"
SHORT = ["--training.num_steps=1", "--training.warmup_steps=0", "--evaluation.num_prompts=4"]
# Without the extra `hub` the data set is not even asked for.
NO_GSM8K = "does not load" if importlib.util.find_spec("datasets") else "needs `datasets`: pip install"
NOT_THERE = {  # what a command ends with where the model or the data set is not here
    "configs/gpt2.yaml": r"gpt2: no such directory here, and the hub",
    "configs/qwen2.5_gsm8k.yaml": rf"openai/gsm8k.* {NO_GSM8K}",
    "configs/llama3.2_1b.yaml": rf"openai/gsm8k.* {NO_GSM8K}",
    "configs/smollm2_addition.yaml": r"models/smollm2: no such directory here",
    "configs/smollm2_lora.yaml": r"models/smollm2: no such directory here",
    "configs/smollm2_larger.yaml": r"models/smollm2: no such directory here",
}


def printed(pattern: str, sources) -> list[str]:
    """Returns what stands behind a pattern up to the end of the command, each once, in order."""
    found = {}
    for path in sources:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(pattern, text, re.MULTILINE):
            command = re.split(r"`|  +#|  +\(|  +\w| {2,}$|\)$", line)[0].strip()
            found.setdefault(command, None)
    return list(found)


COMMANDS = [
    command
    for command in printed(COMMAND, SOURCES)
    if not re.search(r"mine\b|\{", command)  # test_newcomer's, and the model card's
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of what a clone has, and the short run of the main job, under its name."""
    place = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", place / "configs")
    shutil.copytree(ROOT / "tests/fixtures/models/llama3", place / "path/to/gpt2")
    with pytest.MonkeyPatch.context() as patch:
        small_run.share_compilations(patch)
        patch.chdir(place)
        patch.setattr(grpo_jax, "generate", grpo_jax.generate)  # the command's module takes its place
        assert run("train --config configs/grpo_config.yaml", *SHORT) == 0
        yield place


def run(command: str, *more: str) -> int:
    """Runs a printed command of the package in this process."""
    name, *arguments = shlex.split(re.sub(r"\bRUN\b", "runs/arithmetic", command))
    return importlib.import_module(f"grpo_jax.{name}").main([*arguments, *more])


def test_they_are_found():
    assert {command.split()[0] for command in COMMANDS} == {
        "train", "plan", "score", "evaluate", "generate", "export", "env",
    }  # fmt: skip
    assert 'generate --model runs/arithmetic --prompt "12+34=" --num_samples 4' in COMMANDS
    assert "score --config configs/grpo_config.yaml" in COMMANDS
    assert "export RUN --to DIR --dtype bfloat16" in COMMANDS and "train" in COMMANDS
    assert set(NOT_THERE) < {command.split()[-1] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_as_printed(command, place, capsys, monkeypatch):
    if command == "train":  # as it is started then, and made short
        command = shlex.join(["train", *or_default([])])
    config = next((word for word in shlex.split(command) if word.startswith("configs/")), "")
    more = []
    if command.startswith("train"):
        more = [*SHORT, f"--run_dir=runs/{len(command)}-{Path(config).stem}"]
    if config in NOT_THERE and "path/to/gpt2" not in command:
        with pytest.raises((OSError, ValueError, ImportError), match=NOT_THERE[config]):
            run(command, *more)
        return
    if "--push_to_hub" in command:  # nothing is published by a test
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(ValueError, match=r"push_to_hub: there is no token of the Hugging Face hub"):
            run(command, *more)
        return
    if "--help" in command:
        with pytest.raises(SystemExit, match=r"^0$"):
            run(command)
    else:
        assert run(command, *more) == 0
    assert capsys.readouterr().out


def test_commands_of_the_model_card_run_as_printed(place, capsys):
    commands = printed(COMMAND, [place / "runs/arithmetic/hf/README.md"])
    assert [command.split()[0] for command in commands] == ["evaluate", "generate", "train"]
    for command in commands:
        assert run(command.replace('"..."', '"12+34="')) == 0
        assert capsys.readouterr().out


def test_a_run_directory_stands_for_its_config(place, capsys):
    for command in ("plan --config runs/arithmetic", "score --config=runs/arithmetic --num_prompts=2"):
        assert run(command) == 0
    assert run("evaluate --model runs/arithmetic/hf --num_prompts 2") == 0
    assert "on 2 held-out prompts" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"Path is not a file: .*runs"):
        run("plan --config runs")


def test_generate_draws_as_the_run_did(place, capsys):
    from grpo_jax.generate import GenerateArguments, with_defaults  # the package has a function of that name

    theirs = SamplingConfig(max_new_tokens=7, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1)
    mine = GenerateArguments(model="m", prompt="1", top_k=0, temperature=0.0)
    assert with_defaults(mine, theirs) == {
        "max_new_tokens": 7, "temperature": 0.0, "top_k": 0, "top_p": 0.9, "min_p": 0.1,
    }  # fmt: skip
    assert run("generate --model runs/arithmetic/hf --prompt 12+34= --max_new_tokens 1 --temperature 0") == 0
    assert len(capsys.readouterr().out.strip()) == 1
    long = "1+1=" * 7  # 28 tokens of 32 positions leave room for 4 of the run's 5
    assert run(f"generate --model runs/arithmetic --prompt {long} --temperature 0") == 0
    with pytest.raises(
        ValueError, match="28 tokens of the prompt \\+ max_new_tokens 5 exceed the 32 positions"
    ):
        run(f"generate --model runs/arithmetic --prompt {long} --max_new_tokens 5")
    with pytest.raises(
        ValueError, match="prompt has 32 tokens: the 32 positions of runs/arithmetic leave none"
    ):
        run(f"generate --model runs/arithmetic --prompt {'1+1=' * 8}")
