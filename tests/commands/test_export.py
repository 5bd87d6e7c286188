"""The export command: parameters of a checkpoint, shards, the card, errors."""

import json

import jax
import numpy as np
import pytest
import small_run
import yaml

from grpo_jax import export
from grpo_jax.cli import run_command
from grpo_jax.models.loading import load_model, save_model
from grpo_jax.run.directory import load_run
from grpo_jax.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of steps 6 and 7."""
    run_dir = tmp_path_factory.mktemp("export") / "adder"
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_run.share_compilations(monkeypatch)
        assert train(small_run.config(run_dir)) == 0
    return run_dir


def assert_is_step(directory, run, step):
    """Asserts that a directory holds the parameters of a checkpoint, bit for bit."""
    saved = small_run.leaves(run, step)
    for path, leaf in jax.tree_util.tree_leaves_with_path(load_model(str(directory)).params):
        assert saved[f".params{jax.tree_util.keystr(path)}"].tobytes() == np.asarray(leaf).tobytes()


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_newest_checkpoint(run, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert export.main([str(run), "--to", str(tmp_path / "adder")]) == 0
    assert capsys.readouterr().out.startswith(f"saved step 7 of {run} in {tmp_path}/adder")
    assert_is_step(tmp_path / "adder", run, 7)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    # The same files as at the end of training; the card names the directory it lies in.
    mine, theirs = contents(tmp_path / "adder"), contents(run / "hf")
    card = theirs.pop("README.md").decode().replace(str(run / "hf"), str(tmp_path / "adder"))
    assert mine.pop("README.md").decode() == card
    assert mine == theirs


def test_an_earlier_checkpoint_in_shards(run, tmp_path):
    argv = [f"--to={tmp_path}", "--step=6", "--max_shard_size=500KB", str(run)]
    assert export.main(argv) == 0
    assert_is_step(tmp_path, run, 6)
    assert not (tmp_path / "model.safetensors").exists()
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 510_000 for file in files)
    card = (tmp_path / "README.md").read_text()
    assert "trained for 6 updates" in card and "| step 0 | step 6 |" in card
    assert load_run(run, step=6)[1] == 6


def test_the_card_is_about_this_run(run):
    card = (run / "hf" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "arithmetic" and front["library_name"] == "transformers"
    evaluated = [row for row in small_run.rows(run) if "eval/greedy_accuracy" in row]
    first, last = (evaluated[i]["eval/greedy_accuracy"] for i in (0, -1))
    assert "| held-out prompts | step 0 | step 7 |" in card
    assert f"| greedy_accuracy | {first:.4f} | {last:.4f} |" in card
    assert f"python -m grpo_jax.train --config {run}/config.yaml\n" in card


def failure(argv, capsys) -> str:
    with pytest.raises(SystemExit) as exited:
        run_command(lambda: export.main([str(arg) for arg in argv]))
    out, err = capsys.readouterr()
    assert exited.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def test_errors(run, tmp_path, capsys):
    to = f"--to={tmp_path / 'out'}"
    assert "no checkpoint of step 5 in" in failure([run, to, "--step=5"], capsys)
    assert "is not a run directory: it has no config.yaml" in failure([tmp_path, to], capsys)
    assert "max_shard_size: '5 apples'" in failure([run, to, "--max_shard_size=5 apples"], capsys)
    assert "max_shard_size: '0GB'" in failure([run, to, "--max_shard_size=0GB"], capsys)
    assert "did you mean 'max_shard_size'?" in failure([run, to, "--shard_size=1"], capsys)
    assert "trained the whole model (lora.rank is 0)" in failure([run, to, "--adapter"], capsys)
    assert "run" in failure([to], capsys) and "to" in failure([run], capsys)
    assert not (tmp_path / "out").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as exited:
        export.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert exited.value.code == 0
    assert "python -m grpo_jax.export" in out and "a run directory" in out and "--max_shard_size" in out


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KB", 1500), ("7", 7), ("2B", 2)]
)
def test_sizes(text, size):
    assert export.parse_size(text) == size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(run, tmp_path, dtype):
    assert export.main([str(run), "--to", str(tmp_path), "--dtype", dtype]) == 0
    half, whole = (load_model(str(path)) for path in (tmp_path, run / "hf"))
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path, run / "hf")]
    assert 0.5 <= sizes[0] / sizes[1] < 0.51
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    for mine, theirs in zip(jax.tree.leaves(half.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(mine, theirs.astype(dtype).astype("float32"))


def test_half_precision_in_shards(run, tmp_path):
    argv = [str(run), f"--to={tmp_path}", "--dtype=bfloat16", "--max_shard_size=250KB"]
    assert export.main(argv) == 0
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 255_000 for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    count = sum(leaf.size for leaf in jax.tree.leaves(load_model(str(tmp_path)).params))
    assert index["metadata"]["total_size"] == 2 * count


def test_what_float16_cannot_hold_is_refused(tmp_path):
    model = load_model("packaged:arithmetic")
    params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(1e5), model.params)
    with pytest.raises(ValueError, match=r"values up to 1e\+05, and float16 ends at 65504; save as bfloat16"):
        save_model(model, params, tmp_path, dtype="float16")
    save_model(model, params, tmp_path, dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype=bf16"], "dtype: 'bf16'; choose one of float32, bfloat16, float16"),
        (["--dtype=bfloat16", "--adapter"], "dtype: bfloat16 is for whole models; adapters are small"),
    ],
)
def test_dtypes_that_mean_nothing(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export.main([str(run), f"--to={tmp_path}", *options])
