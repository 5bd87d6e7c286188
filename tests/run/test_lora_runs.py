"""Runs that train adapters: what is kept, what is exported, resuming bit for bit, and learning."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run
from safetensors.numpy import load_file

import grpo_jax.train as train_module
from grpo_jax import export
from grpo_jax.checkpoints.manager import Checkpoints
from grpo_jax.models.loading import load_model, save_model
from grpo_jax.run.build import build
from grpo_jax.run.directory import load_model_or_run
from grpo_jax.run.loop import dropout_key
from grpo_jax.run.planning import make_plan
from grpo_jax.train import train

LORA = {"lora__rank": 3, "lora__dropout": 0.1, "training__learning_rate": 3e-3}
KERNELS = 2 * 12 * 128**2  # of the packaged model: V=17, D=128, 2 layers
ADAPTERS = 2 * 3 * (4 * 128 + 2 * 128 + 5 * 128 + 5 * 128)


pytestmark = pytest.mark.usefixtures("shared_compilations")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody cut; two updates per rollout, so that checkpoint 3 lies inside one."""
    run_dir = tmp_path_factory.mktemp("lora")
    assert train_module.main(argv(run_dir)) == 0
    return run_dir


def argv(run_dir, **changes):
    return small_run.arguments(run_dir, **{"algorithm__num_iterations": 2, **LORA, **changes})


def state_leaves(run_dir):
    """Returns every array of the newest checkpoint's train state, by its path, and the JSON beside it."""
    config = small_run.config("unused", **LORA)
    checkpoints = Checkpoints(Path(run_dir) / "checkpoints", read_only=True)
    try:
        _, state, extra, _ = checkpoints.restore_latest(jax.eval_shape(build(config).init_state))
    finally:
        checkpoints.close()
    named = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}, extra


def test_checkpoints_hold_the_adapters_alone(whole):
    leaves, extra = state_leaves(whole)
    trained = [leaf for path, leaf in leaves.items() if path.startswith(".params")]
    assert sum(leaf.size for leaf in trained) == ADAPTERS and len(trained) == 2 * 8
    assert sum(leaf.size for leaf in leaves.values()) < 3 * ADAPTERS + 20
    assert all((leaf != 0).any() for leaf in trained) and len(extra["base"]) == 8
    assert not (whole / "checkpoints" / "reference").exists()  # the base is it
    files = (path for path in (whole / "checkpoints" / "7").rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) < 2 * 4 * 3 * ADAPTERS  # metadata included


def test_kl_is_to_the_base(whole):
    kls = [row["kl"] for row in small_run.rows(whole) if "kl" in row]
    assert len(kls) == 7 and kls[0] < 1e-8 and kls[-1] > 1e-5


def test_exports_agree(whole):
    """hf/ has the adapters merged, adapter/ has them alone, and the run itself loads as the former."""
    base, merged = load_model("packaged:arithmetic"), load_model(str(whole / "hf"))
    run = load_model_or_run(str(whole))
    jax.tree.map(np.testing.assert_array_equal, run.params, merged.params)
    tensors = load_file(whole / "adapter" / "adapter_model.safetensors")
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.1)  # twice the rank
    assert len(tensors) == 2 * 8
    for layer in ("0", "1"):
        for part, name in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            prefix = f"base_model.model.transformer.h.{layer}.{part}.{name}.lora_"
            delta = 2 * tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]  # [out,in], as GPT-2 here
            before, after = (m.params["transformer"]["h"][layer][part][name] for m in (base, merged))
            np.testing.assert_allclose(after["kernel"] - before["kernel"], delta, atol=1e-6)
            np.testing.assert_array_equal(after["bias"], before["bias"])
            assert np.abs(delta).max() > 1e-4


def test_adapters_of_a_checkpoint_alone(whole, tmp_path, capsys):
    """Those of the last one are the files that the run left; those of an earlier one are not."""
    assert export.main([str(whole), f"--to={tmp_path / 'last'}", "--adapter"]) == 0
    assert (
        capsys.readouterr().out
        == f"saved step 7 of {whole} in {tmp_path / 'last'}, a directory that peft opens\n"
    )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "last" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert export.main([str(whole), f"--to={tmp_path / 'earlier'}", "--adapter", "--step=6"]) == 0
    names = ("earlier", "last")
    earlier, last = (load_file(tmp_path / name / "adapter_model.safetensors") for name in names)
    assert earlier.keys() == last.keys() and all((earlier[name] != last[name]).any() for name in last)


@pytest.mark.parametrize(
    ("place", "call"), [("evaluated", 1), ("rollout", 3), ("updated", 4), ("save", 3), ("export", 1)]
)
def test_cut_anywhere(place, call, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        small_run.crash_at(context, place, call)
        with pytest.raises(small_run.Crash):
            train_module.main(argv(tmp_path))
    assert train_module.main(argv(tmp_path)) == 0
    for name in ("metrics", "completions"):
        assert small_run.rows(tmp_path, name) == small_run.rows(whole, name)
    (mine, extra), (theirs, other_extra) = state_leaves(tmp_path), state_leaves(whole)
    assert extra["base"] == other_extra["base"] and mine.keys() == theirs.keys()
    for name, leaf in mine.items():
        assert leaf.tobytes() == theirs[name].tobytes(), name
    for file in ("hf/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


def test_dropout_differs_from_step_to_step(tmp_path):
    run = build(small_run.config(tmp_path, **LORA))
    keys = [jax.random.key_data(dropout_key(run, step)).tolist() for step in (0, 1, 1)]
    assert keys[0] != keys[1] == keys[2]
    assert dropout_key(build(small_run.config(tmp_path)), 0) is None


def test_another_base_is_refused(tmp_path):
    """The same name, other weights: one number of one matrix."""
    model = load_model("packaged:arithmetic")
    save_model(model, model.params, tmp_path / "base")
    settings = {**LORA, "model__hf_model_name": tmp_path / "base", "evaluation__num_prompts": 0}
    assert train(small_run.config(tmp_path / "run", **settings, training__num_steps=1)) == 0
    assert load_model_or_run(str(tmp_path / "run")).source == str(tmp_path / "run")
    params = jax.tree.map(np.array, model.params)
    params["transformer"]["ln_f"]["bias"][3] += 1e-6
    save_model(model, params, tmp_path / "base")
    with pytest.MonkeyPatch.context() as monkeypatch:  # not the model in memory
        monkeypatch.setattr("grpo_jax.run.trained_model.load_model", load_model)
        with pytest.raises(ValueError, match=r"run/checkpoints belong to another base model \(fingerprint "):
            train(small_run.config(tmp_path / "run", **settings, training__num_steps=2))
        with pytest.raises(ValueError, match="belong to another base model"):
            load_model_or_run(str(tmp_path / "run"))


def test_runs_of_the_other_kind_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match=r"lora\.rank is 3 there and 0 here"):
        train(small_run.config(whole, algorithm__num_iterations=2, training__learning_rate=3e-3))
    changes = {"algorithm__num_iterations": 2, "checkpoints__resume": whole}
    with pytest.raises(ValueError, match="written by another configuration"):
        train(small_run.config(tmp_path, **changes))


def test_an_unknown_target_is_one_line(tmp_path):
    done = small_run.command("train", *argv(tmp_path, lora__targets="[q_proj]"))
    assert small_run.error_of(done).startswith("lora.targets: 'q_proj' matches no dense layer; there are ")
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("microbatches", [1, 4])
def test_plan(microbatches, tmp_path):
    changes = {"training__num_microbatches": microbatches}
    plan = make_plan(build(small_run.config(tmp_path, **LORA, **changes)))
    whole = make_plan(build(small_run.config(tmp_path, **changes)))
    memory = plan.memory
    assert memory["adapters"] == 4 * ADAPTERS and memory["merged kernels"] == 4 * KERNELS
    assert memory["optimizer"] == 2 * 4 * ADAPTERS + 2 * 4
    assert memory["gradients"] == 4 * ADAPTERS * (1 if microbatches == 1 else 2)
    assert memory["reference"] == 0 and whole.memory["reference"] == memory["parameters"]
    assert plan.checkpoint_size == memory["adapters"] + memory["optimizer"]
    assert plan.total_memory < whole.total_memory
    assert "0.4 M parameters, LoRA of rank 3 on 8 kernels, float32" in plan.text().split("\n")[0]
    assert "LoRA" not in whole.text()


def test_it_learns(tmp_path):
    """The packaged model starts at 0.46; 15 updates of 64 completions."""
    changes = {"training__batch_size": 64, "training__num_steps": 15, "evaluation__num_prompts": 0}
    assert train(small_run.config(tmp_path, **{**LORA, "lora__rank": 8}, **changes)) == 0
    rewards = [row["reward"] for row in small_run.rows(tmp_path) if "reward" in row]
    assert len(rewards) == 15
    assert np.mean(rewards[-4:]) > np.mean(rewards[:2]) + 0.1
