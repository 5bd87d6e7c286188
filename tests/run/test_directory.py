"""The directory of a run: what two runs may differ in, its config, the model of a checkpoint."""

import shutil

import chex
import jax
import numpy as np
import pytest
import small_run
import yaml

from grpo_jax.models.loading import load_model
from grpo_jax.run.build import build
from grpo_jax.run.directory import (
    check_same_run,
    load_model_or_run,
    read_config,
    restore_checkpoint,
    write_config,
)
from grpo_jax.run.effective_config import effective_config
from grpo_jax.train import train


@pytest.fixture(scope="module")
def model():
    return load_model("packaged:arithmetic")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_run.share_compilations(monkeypatch)
        assert train(small_run.config(run_dir, training__num_steps=2, evaluation__num_prompts=0)) == 0
    return run_dir


def test_check_same_run(tmp_path):
    config = small_run.config(tmp_path)
    may = {
        "training__num_steps": 99, "training__num_epochs": 3, "evaluation__every": 1, "checkpoints__keep": 5,
        "tracking__tensorboard": True, "evaluation__num_prompts": 7,
    }  # fmt: skip
    check_same_run(small_run.config(tmp_path / "other", **may), config)
    changed = small_run.config(tmp_path, training__seed=1, data__over_length="drop")
    with pytest.raises(ValueError) as caught:
        check_same_run(changed, config)
    for text in ("data.over_length is 'error' there and 'drop' here", "training.seed is 0 there and 1 here"):
        assert text in str(caught.value)


def test_config_of_a_run(tmp_path):
    config = small_run.config(tmp_path / "deep" / "run")
    write_config(config)
    assert read_config(config.run_dir) == effective_config(config)
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config.yaml"):
        read_config(tmp_path)
    path = tmp_path / "deep" / "run" / "config.yaml"
    path.write_text(path.read_text() + "nonsense: 1\n")
    with pytest.raises(ValueError, match="unknown key 'nonsense'"):
        read_config(config.run_dir)


def test_model_of_a_run(run, model):
    loaded = load_model_or_run(str(run))
    exported = load_model(str(run / "hf"))
    assert loaded.source == str(run)
    same = jax.tree.map(
        lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), loaded.params, exported.params
    )
    assert all(jax.tree.leaves(same))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), loaded.params, model.params)
    assert all(jax.tree.leaves(moved))


def test_model_or_run_that_is_neither(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_model_or_run(str(tmp_path / "gone"))
    write_config(small_run.config(tmp_path))
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load_model_or_run(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no checkpoint in"):
        load_model_or_run(str(tmp_path))


def test_looking_at_a_run_leaves_it_alone(run):
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    template = jax.eval_shape(build(read_config(run)).init_state)
    restore_checkpoint(run / "checkpoints", template)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files


def test_a_run_opens_without_its_data_and_rewards(run, tmp_path):
    """Only the model and the optimizer's shapes are needed: a run outlives its prompt and reward files."""
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["data"]["train_file"] = str(tmp_path / "gone.jsonl")
    config["rewards"] = [{"function": f"{tmp_path}/gone.py:f", "weight": 1.0, "arguments": {}}]
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    opened, whole = load_model_or_run(str(moved)), load_model_or_run(str(run))
    chex.assert_trees_all_equal(opened.params, whole.params)
