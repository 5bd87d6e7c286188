"""lora.start_from: training goes on from an adapter that PEFT or a run has saved."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run
from safetensors.numpy import load_file, save_file

from grpo_jax import evaluate, export, plan, score
from grpo_jax.config.run import LoraConfig
from grpo_jax.models.loading import load_model, pad_prompts
from grpo_jax.models.start_adapters import base_note, read_adapters, settings_of_adapter
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.run import build as run_build
from grpo_jax.run import trained_model
from grpo_jax.run.directory import load_run, read_config
from grpo_jax.train import train
from grpo_jax.types import Rollout

TENSORS = "adapter_model.safetensors"
ADAPTERS = Path(__file__).parents[1] / "fixtures" / "adapters"
CHANGES = {"training__num_steps": 2, "evaluation__every": 2, "checkpoints__every": 2}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of LoRA on some of the layers, with another alpha than the default."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    with pytest.MonkeyPatch.context() as patch:
        small_run.share_compilations(patch)
        changes = {"lora__rank": 3, "lora__alpha": 4.5, "lora__targets": "['c_attn']"}
        assert train(small_run.config(run_dir, training__learning_rate=1e-2, **changes, **CHANGES)) == 0
        yield run_dir


def log_probs(model, params):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16, (4, 5)).astype(np.int32)
    prompts, mask = pad_prompts([[1, 2, 3]] * 4, 3), np.ones((4, 5), bool)
    zeros = np.zeros((4, 5), np.float32)
    rollout = Rollout(
        prompt_tokens=prompts.tokens, prompt_mask=prompts.mask, tokens=tokens, mask=mask,
        log_probs=zeros, kept_mass=zeros, finished=np.ones(4, bool),
    )  # fmt: skip
    return np.asarray(completion_log_probs(model.policy, params, rollout)[0])


def test_the_policy_starts_as_the_one_that_was_exported(first, tmp_path):
    config = small_run.config(tmp_path, lora__start_from=first / "adapter", **CHANGES)
    built = run_build.build(config)
    assert (built.lora.rank, built.lora.alpha) == (3, 4.5)
    assert {target.module.rpartition(".")[2] for target in built.lora.targets} == {"c_attn"}
    exported = load_model(str(first / "hf"))
    expected = log_probs(exported, exported.params)
    np.testing.assert_array_equal(log_probs(built.model, built.start_params()), expected)
    # The base is the reference, and it is another policy.
    assert np.max(np.abs(log_probs(built.model, built.model.params) - expected)) > 1e-2


def test_a_run_goes_on_from_it_and_needs_it_no_more(first, tmp_path, capsys):
    shutil.copytree(first / "adapter", tmp_path / "adapter")
    config = small_run.config(tmp_path / "run", lora__start_from=tmp_path / "adapter", **CHANGES)
    assert train(config) == 0
    written = read_config(tmp_path / "run").lora
    assert (written.rank, written.alpha, len(written.targets)) == (3, 4.5, 2)
    assert next(row["kl"] for row in small_run.rows(tmp_path / "run") if "kl" in row) > 0  # to the base
    evaluated, theirs = (
        next(row for row in small_run.rows(run_dir) if row["step"] == step and "eval/reward" in row)
        for run_dir, step in ((tmp_path / "run", 0), (first, 2))
    )
    for name in ("eval/greedy_accuracy", "eval/mean@2", "eval/mean_length"):
        assert evaluated[name] == theirs[name]
    # The same command continues the run; what reads a run needs the adapter no more.
    capsys.readouterr()
    assert train(config) == 0
    assert "continuing after step 2 of 2" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "adapter")
    np.testing.assert_array_equal(
        jax.tree.leaves(load_run(tmp_path / "run")[0].params)[0],
        jax.tree.leaves(load_model(str(tmp_path / "run" / "hf")).params)[0],
    )
    assert export.main([str(tmp_path / "run"), f"--to={tmp_path}/again", "--adapter"]) == 0
    assert evaluate.main([f"--model={tmp_path}/run", "--num_prompts=2"]) == 0


def test_plan_and_score_start_there_too(first, tmp_path, capsys):
    more = ["--num_prompts=4", "--num_samples=2", "--json"]
    argv = small_run.arguments(tmp_path, lora__start_from=first / "adapter")
    assert plan.main(argv) == 0
    assert "LoRA of rank 3 on 2 kernels" in capsys.readouterr().out
    assert score.main([*argv, *more]) == 0
    mine = json.loads(capsys.readouterr().out)
    exported = small_run.arguments(tmp_path, model__hf_model_name=first / "hf")
    assert score.main([*exported, *more]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == mine["samples"]


def test_what_peft_wrote_is_read(first):
    for name in ("gpt2", "llama"):
        settings = settings_of_adapter(LoraConfig(start_from=str(ADAPTERS / name)))
        content = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
        assert (settings.rank, settings.alpha) == (content["r"], content["lora_alpha"])
        base = load_model(str(ADAPTERS.parent / "models" / name))
        lora = trained_model._make_lora(replace(small_run.config("unused"), lora=settings), base)
        adapters = read_adapters(lora, str(ADAPTERS / name))
        assert len(jax.tree.leaves(adapters)) == 2 * len(settings.targets)


def test_settings_that_agree_may_be_given(first):
    given = LoraConfig(start_from=str(first / "adapter"), rank=3, alpha=4.5, targets=["c_attn"], dropout=0.1)
    assert settings_of_adapter(given) == given
    assert settings_of_adapter(LoraConfig(rank=8)) == LoraConfig(rank=8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 8}, r"lora\.rank: 8, but the adapter in .* has 3"),
        ({"alpha": 6.0}, r"lora\.alpha: 6\.0, but the adapter in .* has 4\.5"),
        (
            {"targets": ["c_proj"]},
            r"lora\.targets: the adapter in .* adapts .*c_attn, which lora\.targets do",
        ),
        ({"targets": ["c_*"]}, r"lora\.targets: the adapter in .* has no .*; leave lora\.targets out"),
    ],
)
def test_settings_that_contradict_it(first, tmp_path, given, message):
    config = small_run.config(tmp_path)
    with pytest.raises(ValueError, match=message):
        run_build.build(replace(config, lora=LoraConfig(start_from=str(first / "adapter"), **given)))


def edit_config(**changes):
    def edit(directory):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change):
    def edit(directory):
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, sorted(tensors)[0])
        save_file(tensors, path)

    return edit


def wider(tensors, name):
    tensors[name] = np.pad(tensors[name], ((0, 0), (0, 1)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (shutil.rmtree, r"no adapter_config\.json in .*; give a directory that PEFT has saved"),
        (lambda d: (d / TENSORS).rename(d / "adapter_model.bin"), "a pickle, which is never"),
        (lambda d: (d / TENSORS).write_bytes(b"?"), "not a safetensors file"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "not a JSON object"),
        (edit_config(peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
        (edit_config(use_rslora=True), "use_rslora is True, which is not supported; merge that adapter"),
        (edit_config(use_dora=True), "use_dora is True"),
        (edit_config(bias="all"), "bias is 'all'"),
        (edit_config(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
        (edit_config(rank_pattern={"c_attn": 2}), "rank_pattern is"),
        (edit_config(alpha_pattern={"c_attn": 2}), "alpha_pattern is"),
        (edit_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (edit_config(r=0), "r is 0; a rank is a whole number"),
        (edit_config(lora_alpha=None), "lora_alpha is None"),
        (edit_config(r=2), r"has shape \(3, 128\); the rank is 2"),
        (edit_tensors(lambda t, name: t.pop(name)), "has lora_B of .*, and no lora_A"),
        (edit_tensors(lambda t, name: t.update(wte=t[name])), "has wte, which is no lora_A"),
        (edit_tensors(lambda t, name: t[name].fill(np.nan)), r"lora_A of .* is not finite"),
        (edit_tensors(wider), r"has shape \(3, 129\), and \(3, 128\) on this base"),
        (edit_tensors(lambda t, name: [t.pop(n) for n in list(t)]), "has no tensors"),
    ],
)  # fmt: skip
def test_adapters_that_are_refused(first, tmp_path, edit, message):
    shutil.copytree(first / "adapter", tmp_path / "adapter")
    edit(tmp_path / "adapter")
    with pytest.raises((ValueError, OSError), match=message) as error:
        run_build.build(small_run.config(tmp_path / "run", lora__start_from=tmp_path / "adapter"))
    assert "\n" not in str(error.value)


def test_another_base_is_said(first):
    directory = str(first / "adapter")
    assert base_note(directory, "packaged:arithmetic") is None
    assert "it was trained on packaged:arithmetic, and model.hf_model_name is models/x" in base_note(
        directory, "models/x"
    )
