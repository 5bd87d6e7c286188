"""Adapters of real models: which dense layers there are, and that PEFT computes what we do with our files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from grpo_jax.models.loading import load_model, pad_prompts
from grpo_jax.models.peft import dense_layers, make_lora, save_adapters
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.policy.lora import init_adapters, merge_adapters
from grpo_jax.types import Rollout

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.name for path in (FIXTURES / "models").iterdir())
WITH_PEFT = sorted(path.name for path in (FIXTURES / "adapters").iterdir())
LAYERS_PER_BLOCK = {"gpt2": 4, "bloom": 4, "gpt_neo": 6, "gptj": 6, "opt": 6, "xglm": 6}  # others: 7


@functools.cache
def model_of(name, implementation="auto"):
    return load_model(str(FIXTURES / "models" / name), implementation=implementation)


def read_adapters(name):
    """Returns (lora, adapters, contents of adapter_config.json) of a committed fixture."""
    directory = FIXTURES / "adapters" / name
    content = json.loads((directory / "adapter_config.json").read_text())
    model, tensors = model_of(name), load_file(directory / "adapter_model.safetensors")
    lora = make_lora(
        model, rank=content["r"], alpha=content["lora_alpha"], targets=tuple(content["target_modules"])
    )
    flat = {}
    for target in lora.targets:
        for factor in "ab":
            tensor = tensors.pop(f"base_model.model.{target.module}.lora_{factor.upper()}.weight")
            flat[(*target.path, factor)] = jnp.asarray(tensor.T)
    assert not tensors
    return lora, unflatten_dict(flat), content


def test_there_is_a_fixture_of_each_kind():
    assert WITH_PEFT == ["gpt2", "llama"]


@pytest.mark.parametrize("name", NAMES)
def test_dense_layers_of_every_family(name):
    model = model_of(name)
    layers, flat = dense_layers(model), flatten_dict(model.params)
    for target in layers:
        kernel = flat[target.path]
        assert sorted(kernel.shape) == sorted((target.inputs, target.outputs))
        bias = flat.get((*target.path[:-1], "bias"))
        assert bias is None or bias.shape == (target.outputs,)
    assert any(t.inputs != t.outputs for t in layers)  # else the above says nothing
    default = make_lora(model, rank=2, alpha=2.0).targets
    blocks = {next(part for part in t.path if part.isdecimal()) for t in default}
    kind = model.config.model_type
    assert blocks and len(default) == LAYERS_PER_BLOCK.get(kind, 7) * len(blocks)


def test_the_head_is_a_choice():
    for name, width in (("gpt2_untied", 8), ("llama", 16)):
        chosen = make_lora(model_of(name), rank=2, alpha=2.0, targets=("lm_head",)).targets
        assert [(t.module, t.inputs, t.outputs, t.output_first) for t in chosen] == [
            ("lm_head", width, 288, False)
        ]


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"^lora.targets: 'q_proj' matches no dense layer; there are "
                       r"transformer.h.\*.attn.c_attn, transformer.h.\*.attn.c_proj, "):  # fmt: skip
        make_lora(model_of("gpt2"), rank=2, alpha=2.0, targets=("q_proj",))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("gpt2", "decoder"), ("gpt2", "flax"), ("gpt_neo", "flax"), ("llama", "decoder"), ("llama", "flax")],
)
def test_fresh_adapters_leave_every_bit_of_the_log_probs(name, implementation):
    model = model_of(name, implementation)
    lora = make_lora(model, rank=2, alpha=4.0)
    rng = np.random.default_rng(0)
    rollout = Rollout(
        prompt_tokens=jnp.asarray(rng.integers(1, 288, (2, 3)), jnp.int32),
        prompt_mask=jnp.ones((2, 3), bool),
        tokens=jnp.asarray(rng.integers(1, 288, (2, 5)), jnp.int32),
        mask=jnp.ones((2, 5), bool),
        log_probs=None,
        kept_mass=None,
        finished=None,
    )
    plain = completion_log_probs(model.policy, model.params, rollout)
    merged = merge_adapters(lora, model.params, init_adapters(lora, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, completion_log_probs(model.policy, merged, rollout), plain)


@pytest.mark.parametrize("name", WITH_PEFT)
def test_peft_computes_the_same_logits(name):
    """peft_logits.npz is what PEFT made of the committed directory: scripts/make_adapter_fixtures.py."""
    model, (lora, adapters, _) = model_of(name), read_adapters(name)
    reference = np.load(FIXTURES / "models" / name / "reference.npz")
    rows = np.split(reference["tokens"], np.cumsum(reference["lengths"])[:-1])
    prompts = pad_prompts([row.tolist() for row in rows], 12)

    @jax.jit
    def logits_of(params):
        positions = np.maximum(np.cumsum(prompts.mask, axis=1) - 1, 0)
        hidden, _ = model.policy.forward(params, prompts.tokens, prompts.mask, positions, None)
        return model.policy.unembed(params, hidden)

    actual = np.asarray(logits_of(merge_adapters(lora, model.params, adapters)))[prompts.mask]
    expected = np.load(FIXTURES / "adapters" / name / "peft_logits.npz")["logits"]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.abs(np.asarray(logits_of(model.params))[prompts.mask] - expected).max() > 0.1


@pytest.mark.parametrize("name", WITH_PEFT)
def test_files_are_those_that_peft_read(name, tmp_path):
    lora, adapters, content = read_adapters(name)
    save_adapters(model_of(name), lora, adapters, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    ours, theirs = (
        load_file(directory / "adapter_model.safetensors")
        for directory in (tmp_path / "adapter", FIXTURES / "adapters" / name)
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[key])
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written.pop("base_model_name_or_path") == str(FIXTURES / "models" / name)
    assert content.pop("base_model_name_or_path") == f"tests/fixtures/models/{name}"
    assert written == content and content["fan_in_fan_out"] == (name == "gpt2")


def test_names_are_short_only_where_that_is_unambiguous(tmp_path):
    model = model_of("gpt2")  # c_proj is in the attention and in the MLP

    def target_modules(*targets):
        lora = make_lora(model, rank=1, alpha=1.0, targets=targets)
        save_adapters(model, lora, init_adapters(lora, jax.random.key(0)), tmp_path)
        return json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert target_modules("c_attn", "c_proj") == ["c_attn", "c_proj"]
    assert target_modules("attn.c_proj") == [f"transformer.h.{i}.attn.c_proj" for i in range(2)]
