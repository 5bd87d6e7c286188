"""The examples of docs/python.md run as they are printed."""

import re
from pathlib import Path

import pytest
import small_run

from grpo_jax import train

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_calls_run(empty, capsys):
    names = {}
    for block in blocks("python")[:2]:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert capsys.readouterr().out.splitlines()[-1].startswith("finished 3 0.")
    last = names["again"].history[-1]
    assert last["rewards/exact_match/mean"] == last["rewards/right/mean"]
    assert list(empty.iterdir()) == []


def test_the_config_with_parts_of_ones_own_runs(empty, capsys):
    Path("my_parts.py").write_text(blocks("python")[2])
    Path("mine.yaml").write_text(blocks("yaml")[0])
    small = ["--training.num_steps=1", "--training.batch_size=16", "--sampling.max_new_tokens=5"]
    assert train.main(["--config", "mine.yaml", *small, "--evaluation.num_samples=2", "--run_dir=run"]) == 0
    assert "step 1 has " in capsys.readouterr().out
    assert "rewards/right/mean" in small_run.rows("run")[1]


def test_the_page_names_every_argument():
    import inspect

    from grpo_jax.run import run

    for name in inspect.signature(run).parameters:
        assert f"`{name}`" in PAGE, name
