"""Writes the runs under tests/fixtures/old_runs, which tests/run/test_old_runs.py continues.

Each archive NAME.tar.gz holds two run directories of a tiny model, as an older version of this package left
them. NAME broke off after its checkpoint. NAME_whole is the same run when nothing broke it off, of which the
arrays of the checkpoints are left out. So the archives are made with a working tree of that version, here of
commit add4bed, the last before the package got rooms:

    git worktree add --detach /tmp/old add4bed
    export PYTHONPATH=/tmp/old:/tmp/old/tests:$PWD/tests
    (cd tests/fixtures/old_runs && python ../../../scripts/make_run_fixtures.py)

The paths in the stored configs are relative to tests/fixtures/old_runs, so a copy of it works anywhere.
"""

import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run  # of the older version
import yaml
from old_runs import platform, state_of
from safetensors.numpy import save_file

import grpo_jax.train as train

BROKEN_AFTER = 5  # the step whose update is the last
SETTINGS = {
    "model": {"hf_model_name": "model"},
    "data": {"task": "arithmetic"},
    "rewards": [{"function": "rewards.py:even_ending"}, {"function": "distinct_words", "weight": 0.5}],
    "sampling": {"max_new_tokens": 4},
    "training": {"batch_size": 16, "num_steps": 8, "learning_rate": 3e-3, "lr_schedule": "linear"},
    "evaluation": {"every": 2, "num_prompts": 4, "num_samples": 2, "batch_size": 8},
    "checkpoints": {"every": 3},
    "tracking": {"completions_every": 2, "num_completions": 2},
}
RUNS = {
    # One update per rollout, against a frozen reference.
    "plain": {"algorithm": {"name": "grpo", "group_size": 4}},
    # The checkpoint lies inside a rollout; informative groups wait for the next; the reference has moved.
    "dapo": {
        "algorithm": {
            "name": "dapo",
            "group_size": 4,
            "num_iterations": 2,
            "kl_coef": 0.05,
            "ref_sync_every": 2,
        },
    },
    # Adapters with dropout. The checkpoint lies inside a rollout.
    "lora": {
        "algorithm": {"name": "grpo", "group_size": 4, "num_iterations": 2},
        "lora": {"rank": 2, "dropout": 0.1},
    },
}


def write_model(directory: Path) -> None:
    """Writes a random Llama of 17 tokens, with the tokenizer of the packaged model."""
    packaged = Path(train.__file__).parent / "packaged" / "arithmetic"
    directory.mkdir(exist_ok=True)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        shutil.copy(packaged / name, directory / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 17,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 32,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 16,
        "eos_token_id": 16,
        "dtype": "float32",
        "transformers_version": "4.57.6",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shapes = {
        "embed_tokens": (17, 8),
        "layers.0.input_layernorm": (8,),
        "layers.0.post_attention_layernorm": (8,),
        "layers.0.self_attn.q_proj": (8, 8),
        "layers.0.self_attn.k_proj": (4, 8),
        "layers.0.self_attn.v_proj": (4, 8),
        "layers.0.self_attn.o_proj": (8, 8),
        "layers.0.mlp.gate_proj": (12, 8),
        "layers.0.mlp.up_proj": (12, 8),
        "layers.0.mlp.down_proj": (8, 12),
        "norm": (8,),
    }
    rng = np.random.default_rng(0)
    tensors = {
        f"model.{name}.weight": (0.4 * rng.normal(size=shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def make(name: str, settings: dict) -> None:
    """Writes one archive, in the working directory."""
    config = SETTINGS | settings | {"run_dir": name}
    directory, whole, start = Path(name), Path(f"{name}_whole"), Path(f"{name}.yaml")
    start.write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_run.crash_at(monkeypatch, "updated", BROKEN_AFTER)
        with pytest.raises(small_run.Crash):
            train.main([f"--config={start}"])
    assert train.main([f"--config={start}", f"--run_dir={whole}"]) == 0
    print(name, state_of(name)["step"], sorted(state_of(name)["items"]))
    with tarfile.open(f"{name}.tar.gz", "w:gz") as archive:
        archive.add(directory)
        for file in ("config.yaml", "metrics.jsonl", "completions.jsonl", "hf/model.safetensors"):
            archive.add(whole / file)
        for file in whole.glob("checkpoints/*/extra/metadata"):
            archive.add(file)
    for path in (directory, whole):
        shutil.rmtree(path)
    start.unlink()


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    write_model(Path("model"))
    Path("platform.json").write_text(json.dumps(platform(), indent=2) + "\n")
    for run, choices in RUNS.items():
        make(run, choices)
