"""config.json as an architecture: values, parameters, and every refusal. Logits are in test_flax_families."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax.models import decoder_families
from grpo_jax.models.decoder_layout import layout
from grpo_jax.models.hf_config import read_config
from grpo_jax.policy.rotary import LinearScaling, Llama3Scaling, Rotary

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
LINEAR, LLAMA3 = (
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)


def config_of(name, **change):
    raw = json.loads((FIXTURES / name / "config.json").read_text()) | change
    return read_config({k: v for k, v in raw.items() if v is not ...}, "here")


def architecture_of(name, **change):
    config = config_of(name, **change)
    assert list(decoder_families.problems(config)) == []
    return decoder_families.architecture_of(config)


def test_gpt2():
    a = architecture_of("gpt2")
    assert (a.vocab_size, a.max_positions, a.width, a.num_layers) == (288, 32, 16, 2)
    assert (a.num_heads, a.num_kv_heads, a.head_dim, a.attention_scale) == (2, 2, 8, 8**-0.5)
    assert (a.norm, a.norm_epsilon, a.norm_offset) == ("layer", 1e-5, 0.0)
    assert (a.activation, a.gated, a.rotary, a.windows) == ("gelu_tanh", False, (), (None, None))
    assert a.transposed_kernels
    assert architecture_of("gpt2", scale_attn_weights=False).attention_scale == 1.0


def test_llama():
    a = architecture_of("llama3")
    assert (a.vocab_size, a.max_positions, a.width, a.num_layers) == (288, 512, 16, 2)
    assert (a.num_heads, a.num_kv_heads, a.head_dim, a.attention_scale) == (4, 2, 12, 12**-0.5)
    assert (a.norm, a.norm_epsilon, a.norm_offset, a.embedding_scale) == ("rms", 1e-6, 0.0, 1.0)
    assert (a.activation, a.gated, a.windows, a.transposed_kernels) == ("silu", True, (None, None), False)
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
    assert a.rotary == (Rotary(theta=5e5, scaling=scaling),) * 2
    # Of the six frequencies one is kept, one blended, the rest divided.
    ratio = Rotary(theta=5e5).frequencies(12) / a.rotary[0].frequencies(12)
    assert ratio[0] == 1 and 1.01 < ratio[1] < 7.99
    np.testing.assert_allclose(ratio[2:], 8, rtol=1e-6)


def test_fields_that_config_json_leaves_out_have_the_values_of_the_class():
    a = architecture_of("llama", num_key_value_heads=..., rms_norm_eps=..., max_position_embeddings=...)
    assert (a.num_kv_heads, a.norm_epsilon, a.max_positions, a.head_dim) == (4, 1e-6, 2048, 4)
    assert architecture_of("qwen3", head_dim=...).head_dim == 128
    assert architecture_of("mistral_window", sliding_window=...).windows == (4096, 4096)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_scaling(key):
    rope = {key: "linear", "factor": 2}
    assert architecture_of("llama", rope_scaling=rope).rotary[1].scaling == LinearScaling(factor=2.0)
    assert architecture_of("llama", rope_scaling={key: "default"}).rotary[1].scaling is None


def test_windows():
    assert architecture_of("mistral").windows == (None, None)
    assert architecture_of("mistral_window").windows == (4, 4)
    assert architecture_of("qwen2").windows == (None, 4)
    assert architecture_of("qwen2", use_sliding_window=False, layer_types=...).windows == (None, None)
    assert architecture_of("qwen3").windows == (None, None)
    assert architecture_of("gemma2").windows == (4, None)
    assert architecture_of("gemma2", layer_types=..., num_hidden_layers=3).windows == (4, None, 4)
    assert architecture_of("gemma3_text", layer_types=..., num_hidden_layers=4).windows == (4, 4, None, 4)


def test_gemma():
    a = architecture_of("gemma")
    assert (a.norm_offset, a.embedding_scale, a.activation, a.head_dim) == (1.0, 4.0, "gelu_tanh", 8)
    assert (a.attention_scale, a.attention_softcap, a.logit_softcap) == (8**-0.5, None, None)
    a = architecture_of("gemma2")
    assert (a.attention_scale, a.attention_softcap, a.logit_softcap) == (6**-0.5, 2.0, 3.0)
    a = architecture_of("gemma3_text")
    near, far = Rotary(theta=1e4), Rotary(theta=1e6, scaling=LinearScaling(factor=8.0))
    assert a.rotary == (near, near, far)


def test_max_positions_are_not_the_window():
    assert decoder_families.max_positions(config_of("mistral_window")) == 32


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("opt", {}, "the decoder knows no opt; it knows gpt2, llama, mistral, qwen2, qwen3, gemma, gemma2,"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantized"),
        ("gpt2", {"add_cross_attention": True}, "encoder-decoder"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("gpt2", {"activation_function": "mish"}, "activation_function='mish' is unknown; there are gelu,"),
        ("gpt2", {"n_head": 3}, "width 16 does not divide into 3 heads"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("llama", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("gemma2", {"hidden_activation": None}, "hidden_activation=None"),
        ("gemma", {"hidden_act": "gelu"}, "set both to the one you mean"),
        ("llama", {"num_key_value_heads": 3}, "4 heads do not divide into 3 key-value heads"),
        ("llama", {"head_dim": 5}, "head_dim=5; rotary positions need an even one"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_scaling": LINEAR | {"rope_type": "yarn"}}, "rope_scaling of type 'yarn'; there are"),
        ("llama", {"rope_scaling": LINEAR | {"rope_type": "dynamic"}}, "rope_scaling of type 'dynamic'"),
        (
            "llama",
            {"rope_scaling": LINEAR | {"attention_factor": 2}},
            "has attention_factor, factor; it needs",
        ),
        ("llama", {"rope_scaling": LINEAR | {"rope_type": "default"}}, "it needs nothing else"),
        ("llama", {"rope_scaling": LINEAR | {"factor": 0}}, "factor=0; it must be a positive number"),
        ("llama", {"rope_scaling": LINEAR | {"factor": "2"}}, "factor='2'; it must be a positive number"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "is not below high_freq_factor"),
        ("mistral", {"attention_bias": True}, "attention_bias=True is ignored by PyTorch"),
        ("mistral", {"mlp_bias": True}, "mlp_bias=True is ignored by PyTorch"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types=['full_attention',"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias=True is ignored by PyTorch"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types has chunked_attention",
        ),
        ("qwen2", {"use_sliding_window": False}, "sliding_attention, but there is no sliding_window"),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping=50.0 is ignored by PyTorch",
        ),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("llama", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ],
)
def test_configurations_that_are_refused(name, change, reason):
    problems = list(decoder_families.problems(config_of(name, **change)))
    assert len(problems) == 1 and reason in problems[0], problems
    assert "\n" not in problems[0]


def test_every_reason_is_given():
    change = {"hidden_act": "mish", "head_dim": 5, "partial_rotary_factor": 0.5}
    assert len(list(decoder_families.problems(config_of("llama", **change)))) == 3


@pytest.mark.parametrize("name", ["gpt2", "gpt2_untied", "gemma", "llama", "mistral"])
def test_parameters_are_those_of_the_flax_class(name):
    from grpo_jax.models import flax_families  # the other tests need no Flax classes

    ours, theirs = (module.param_shapes(config_of(name)) for module in (decoder_families, flax_families))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), ours, theirs)


def test_biases_norms_and_head_follow_the_configuration():
    def names(name, **change):
        tree = decoder_families.param_shapes(config_of(name, **change))
        layer = tree["model"]["layers"]["0"]
        dense = {k: v for part in ("self_attn", "mlp") for k, v in layer[part].items() if "proj" in k}
        return {key for key, value in dense.items() if "bias" in value}, layer, "lm_head" in tree

    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert names("llama")[0] == attention
    assert names("llama", mlp_bias=True)[0] == attention | mlp
    assert names("qwen2")[0] == attention - {"o_proj"}
    assert names("qwen3")[0] == set()
    assert names("qwen3", attention_bias=True)[0] == attention
    assert (names("qwen3")[2], names("qwen3", tie_word_embeddings=False)[2]) == (False, True)
    assert names("qwen3")[1]["self_attn"]["k_norm"]["weight"].shape == (8,)
    assert {"pre_feedforward_layernorm", "post_feedforward_layernorm"} < set(names("gemma2")[1])


def test_gpt2_head_is_the_one_kernel_that_is_not_transposed():
    leaves = jax.tree.leaves(layout(config_of("gpt2_untied")))
    assert [leaf.path for leaf in leaves if leaf.transposed] == [("lm_head", "kernel")]
