"""The README's section for a model, data and a reward of one's own, as printed, to an exported model."""

import csv
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import small_run

from grpo_jax import export, score, train
from grpo_jax.models.loading import load_model

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README[README.index("## Bring your own") : README.index("## Import it")]
# What a test can wait for, beside the file.
SMALL = ["--training.num_steps=2", "--training.batch_size=16", "--sampling.max_new_tokens=4"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty directory with the README's two files, a model and a table of questions."""
    for language in ("python", "yaml"):
        ((name, text),) = re.findall(rf"```{language}\n# (\S+)\n(.*?)```", SECTION, re.DOTALL)
        (tmp_path / name).write_text(text)
    replace(tmp_path / "mine.yaml", '"packaged:arithmetic"', "models/mine")
    shutil.copytree("tests/fixtures/models/llama3", tmp_path / "models" / "mine")
    with open(tmp_path / "mine.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer"])
        rows.writerows([f"What is {a} plus 1?", a + 1] for a in range(40))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_a_table_to_an_exported_model(place, capsys):
    assert score.main(["--config", "mine.yaml", "--num_prompts=2", "--num_samples=4", *SMALL]) == 0
    assert "groups without a signal" in capsys.readouterr().out
    assert train.main(["--config", "mine.yaml", *SMALL]) == 0
    assert [row["step"] for row in small_run.rows("runs/mine") if "reward" in row] == [1, 2]
    assert load_model("runs/mine/best").source == load_model("runs/mine/hf").source.replace("hf", "best")
    assert export.main(["runs/mine", "--to", "models/better"]) == 0
    assert load_model("models/better").config.model_type == "llama"


def test_the_whole_section_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (make_table,) = re.findall(r"^python3 -c .*$", SECTION, re.MULTILINE)
    subprocess.run(["bash", "-c", make_table], check=True, timeout=60)
    assert "\n12+34,46\n" in Path("mine.csv").read_text()
    for language in ("python", "yaml"):
        ((name, text),) = re.findall(rf"```{language}\n# (\S+)\n(.*?)```", SECTION, re.DOTALL)
        Path(name).write_text(text)
    commands = re.findall(r"^\.venv/bin/grpo-jax (\w+) ([^#\n]*)", SECTION, re.MULTILINE)
    assert [name for name, _ in commands] == ["plan", "score", "train", "evaluate", "generate", "export"]
    shorter = {"score": ["--num_prompts=2", *SMALL], "train": SMALL, "evaluate": ["--num_prompts=8"]}
    for name, arguments in commands:
        more = shorter.get(name, [])
        assert importlib.import_module(f"grpo_jax.{name}").main([*shlex.split(arguments), *more]) == 0
        assert capsys.readouterr().out
    assert {path.name for path in Path("runs/mine").iterdir()} >= {"hf", "best", "config.yaml"}
    assert load_model("models/better").source == "models/better"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda: Path("mine.csv").unlink(), r"mine\.csv: there is no such file"),
        (
            lambda: replace("mine.csv", "question,", "text,"),
            r"'question' is undefined; the columns are: text",
        ),
        (
            lambda: replace("mine.csv", ",answer", ",solution"),
            r"needs `answer`, which is neither a column",
        ),
        (
            lambda: replace("mine.yaml", "train_file: mine.csv", "task: adition"),
            "did you mean 'addition'",
        ),
        (
            lambda: replace("mine.yaml", "batch_size: 64", "batch_size: many"),
            r"training\.batch_size: expected",
        ),
        (
            lambda: replace("mine.yaml", "eval_fraction", "eval_fracton"),
            r"did you mean 'data\.eval_fraction'",
        ),
        (lambda: replace("mine.yaml", "}}=", "}="), r"data\.prompt_template, line 1: unexpected"),
        (
            lambda: replace("my_reward.py", "columns):", "columns)"),
            r"my_reward\.py:1: SyntaxError: expected ':'",
        ),
        (
            lambda: replace("mine.yaml", ":right", ":rigth"),
            r"has no `rigth`; did you mean `right` \(line 1\)",
        ),
        (lambda: shutil.rmtree("models/mine"), r"models/mine: no such directory here"),
        (
            lambda: replace("models/mine/config.json", '"llama"', '"mamba"'),
            "'mamba' is not supported; supported: ",
        ),
        (
            lambda: replace("mine.yaml", "run_dir", "data.system_prompt: Add.\nrun_dir"),
            "has no chat template: give",
        ),
        (
            lambda: replace("mine.yaml", "eval_fraction", "max_prompt_length: 3, eval_fraction"),
            "set data.over_length",
        ),
        (
            lambda: replace("mine.yaml", 'function: "my_reward.py:right"', SERVER),
            r"http://127\.0\.0\.1:9/score cannot be reached",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_wrong_turn_is_one_line(break_it, message, place):
    break_it()
    with pytest.raises((ValueError, OSError), match=message) as error:
        train.main(["--config", "mine.yaml", *SMALL])
    assert "\n" not in str(error.value)
    assert not (place / "runs").exists()


SERVER = "function: http_score, arguments: {url: http://127.0.0.1:9/score}"


def replace(path: str | Path, old: str, new: str) -> None:
    """Replaces a text of a file, which has to be there."""
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))
