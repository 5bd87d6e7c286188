"""Every family against PyTorch's logits, and against itself: padding, cache, fork, dtype, refusals."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import families
from grpo_jax.models import load_model, pad_prompts

FIXTURES = Path(__file__).parent / "fixtures" / "models"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
PADDED = 17  # the longest reference row has 12 tokens
STEPS = 4


@functools.cache
def family(name):
    """Returns a fixture, loaded once: model, jitted logits function, reference rows, their logits."""
    model = load_model(str(FIXTURES / name))

    @jax.jit
    def logits(params, tokens, mask, positions):
        hidden, cache = model.policy.forward(params, tokens, mask, positions, None)
        assert cache is None
        return model.policy.unembed(params, hidden)

    reference = np.load(FIXTURES / name / "reference.npz")
    ends = np.cumsum(reference["lengths"])[:-1]
    rows = [row.tolist() for row in np.split(reference["tokens"], ends)]
    return model, logits, rows, np.split(reference["logits"], ends)


def logits_of(policy, params, prompts):
    """Compiles, as eager is slower for one call: hundreds of little programs."""

    @jax.jit
    def run(params, tokens, mask, positions):
        return policy.unembed(params, policy.forward(params, tokens, mask, positions, None)[0])

    return np.asarray(run(params, prompts.tokens, prompts.mask, positions_of(prompts.mask)))


def positions_of(mask):
    return np.cumsum(mask, axis=1) - 1


def left_padded(name):
    model, logits, rows, _ = family(name)
    prompts = pad_prompts(rows, PADDED)
    return np.asarray(logits(model.params, prompts.tokens, prompts.mask, positions_of(prompts.mask)))


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_torch_on_a_left_padded_batch(name):
    """The reference rows were run alone, without padding."""
    _, _, rows, expected = family(name)
    for row, actual, wanted in zip(rows, left_padded(name), expected, strict=True):
        np.testing.assert_allclose(actual[PADDED - len(row) :], wanted, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_amount_of_left_padding_is_inert(name):
    model, logits, rows, _ = family(name)
    tokens, mask = np.full((len(rows), PADDED), 7, np.int32), np.zeros((len(rows), PADDED), bool)
    for i, row in enumerate(rows):  # no padding on the left; right of the row is what causality hides
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    actual = np.asarray(logits(model.params, tokens, mask, positions_of(mask)))
    for i, row in enumerate(rows):
        np.testing.assert_allclose(left_padded(name)[i, -len(row) :], actual[i, : len(row)], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bloom"])
def test_positions_are_used(name):
    """Negative control of the two tests above."""
    model, logits, rows, _ = family(name)
    prompts = pad_prompts(rows, PADDED)
    wrong = logits(model.params, prompts.tokens, prompts.mask, np.zeros_like(prompts.tokens))
    assert np.abs(np.asarray(wrong)[2, -1] - left_padded(name)[2, -1]).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_of_forked_prompts_equals_one_forward(name):
    """Prefill N, fork to 2N, decode STEPS tokens in a scan; slots not yet written are True in the mask."""
    model, logits, rows, _ = family(name)
    policy, width = model.policy, PADDED - STEPS
    prompts = pad_prompts(rows, width)
    tokens = np.repeat(prompts.tokens, 2, axis=0)
    completion = np.random.default_rng(0).integers(3, 288, (len(tokens), STEPS)).astype(np.int32)
    tokens = np.concatenate([tokens, completion], axis=1)
    mask = np.concatenate([np.repeat(prompts.mask, 2, axis=0), np.ones((len(tokens), STEPS), bool)], axis=1)
    positions = positions_of(mask)

    @jax.jit
    def cached(params, tokens, mask, positions):
        prompt = tokens[::2, :width], mask[::2], positions[::2, :width]
        hidden, cache = policy.forward(params, *prompt, policy.init_cache(len(rows), PADDED))
        assert all(leaf.shape[0] == len(rows) for leaf in jax.tree.leaves(cache) if leaf.ndim)
        cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0) if leaf.ndim else leaf, cache)

        def step(cache, inputs):
            token, position = inputs
            out, cache = policy.forward(params, token[:, None], mask, position[:, None], cache)
            return cache, out[:, 0]

        _, steps = jax.lax.scan(step, cache, (tokens[:, width:].T, positions[:, width:].T))
        hidden = jnp.concatenate([jnp.repeat(hidden, 2, axis=0), steps.swapaxes(0, 1)], axis=1)
        return policy.unembed(params, hidden)

    actual = cached(model.params, tokens, mask, positions)
    expected = np.concatenate(  # in halves: the shape that is compiled already
        [
            logits(model.params, tokens[half], mask[half], positions[half])
            for half in (slice(0, 4), slice(4, 8))
        ]
    )
    np.testing.assert_allclose(
        np.where(mask[..., None], actual, 0), np.where(mask[..., None], expected, 0), atol=1e-5
    )


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "bloom", "llama"])
def test_fully_masked_row_is_finite_with_gradients(name):
    model, _, rows, _ = family(name)
    prompts = pad_prompts([rows[0], []], 4)

    @jax.jit
    def loss(params):
        hidden, _ = model.policy.forward(
            params, prompts.tokens, prompts.mask, positions_of(prompts.mask), None
        )
        return jnp.square(model.policy.unembed(params, hidden)).mean()

    value, gradients = jax.value_and_grad(loss)(model.params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert all(
        np.abs(leaf).max() > 0
        for leaf in jax.tree.leaves(gradients["lm_head" if name == "llama" else "transformer"])
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_compute_keeps_float32_parameters_and_logits(name):
    model = load_model(str(FIXTURES / name), dtype="bfloat16")
    _, _, rows, _ = family(name)
    prompts = pad_prompts(rows, PADDED)
    hidden, _ = model.policy.forward(
        model.params, prompts.tokens, prompts.mask, positions_of(prompts.mask), None
    )
    logits = model.policy.unembed(model.params, hidden)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.policy.init_cache(1, 4)) if leaf.ndim} == {
        "bfloat16"
    }
    assert logits.dtype == jnp.float32
    difference = np.abs(np.where(prompts.mask[..., None], logits - left_padded(name), 0)).max()
    assert 1e-5 < difference < 0.1


def test_parameters_are_the_pytree_of_the_flax_class():
    from transformers import FlaxGPT2LMHeadModel

    model, _, _, _ = family("gpt2")
    wanted = FlaxGPT2LMHeadModel(model.config, _do_init=False).params_shape_tree
    assert jax.tree.structure(model.params) == jax.tree.structure(wanted)


def test_lengths_over_the_models_positions_name_both_numbers():
    model, _, _, _ = family("gpt2")
    assert model.max_positions == 32
    ones = jax.ShapeDtypeStruct((1, 33), jnp.int32)
    with pytest.raises(ValueError, match=r"33 tokens .* 32 positions"):
        jax.eval_shape(model.policy.forward, model.params, ones, ones, ones, None)
    with pytest.raises(ValueError, match=r"33 tokens .* 32 positions"):
        model.policy.init_cache(1, 33)
    assert family("bloom")[0].max_positions is None


def test_mask_of_another_length_than_the_cache_is_refused():
    model, _, _, _ = family("gpt2")
    one, mask = np.ones((1, 1), np.int32), np.ones((1, 5), bool)
    with pytest.raises(ValueError, match="mask covers 5 tokens"):
        model.policy.forward(model.params, one, mask, one, model.policy.init_cache(1, 6))
    with pytest.raises(ValueError, match="mask covers 5 tokens"):
        model.policy.forward(model.params, one, mask, one, None)


def test_rotary_tables_are_as_long_as_the_sequence_not_as_the_limit():
    """A 128k-position model would otherwise build a 128k x 128k mask in every layer."""
    raw = json.loads((FIXTURES / "llama" / "config.json").read_text()) | {"max_position_embeddings": 131072}
    config = families.check_config(raw, "here")
    policy = families.make_policy(config, families.param_shapes(config), dtype=jnp.float32)
    model, _, rows, expected = family("llama")
    prompts = pad_prompts(rows, PADDED)
    np.testing.assert_allclose(logits_of(policy, model.params, prompts)[2, -12:], expected[2], atol=2e-5)


def test_mistral_window_limits_the_length_so_that_it_never_binds():
    raw = json.loads((FIXTURES / "mistral" / "config.json").read_text()) | {"sliding_window": 12}
    config = families.check_config(raw, "here")
    assert families.max_positions(config) == 12
    policy = families.make_policy(config, families.param_shapes(config), dtype=jnp.float32)
    model, _, rows, expected = family("mistral")
    np.testing.assert_allclose(
        logits_of(policy, model.params, pad_prompts([rows[2]], 12))[0], expected[2], atol=2e-5
    )


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (
            "gpt2",
            {"model_type": "gpt_neox"},
            "model type 'gpt_neox' is not supported; supported: gpt2, gpt_neo",
        ),
        ("gpt2", {"model_type": None}, "model type None"),
        ("gpt2", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map.*never run"),
        ("gpt2", {"_attn_implementation": "kernels-community/x"}, "_attn_implementation"),
        ("gpt2", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantized"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "encoder-decoder"),
        ("gpt2", {"activation_function": "mish"}, "mish.* does not exist in Flax"),
        ("gpt2", {"n_head": 3}, "width 16 does not divide into 3 heads"),
        ("gptj", {"rotary_dim": None}, "rotary_dim=None"),
        ("gptj", {"rotary_dim": 64}, "at most the head width 8"),
        ("gptj", {"tie_word_embeddings": True}, "drops the head's bias"),
        ("opt", {"enable_bias": False}, "enable_bias"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("bloom", {"n_head": 12, "hidden_size": 24}, "power of two"),
        ("xglm", {"pad_token_id": 5}, "position 3"),
        ("gemma", {"hidden_act": "gelu"}, "set both"),
        ("gemma", {"rope_theta": 1e6}, "rope_theta=1000000"),
        ("llama", {"rope_theta": 500000.0}, "rope_theta=500000"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
        ("llama", {"head_dim": 8}, "head_dim=8"),
        ("llama", {"tie_word_embeddings": True}, "random"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_configurations_that_flax_gets_wrong_are_refused_with_the_reason(name, change, reason):
    raw = json.loads((FIXTURES / name / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=reason) as error:
        families.check_config(raw, "here")
    assert str(error.value).startswith("here: ")
    assert "\n" not in str(error.value)


def test_harmless_private_keys_are_accepted():
    raw = json.loads((FIXTURES / "gpt2" / "config.json").read_text())
    families.check_config(raw | {"_name_or_path": "x", "_num_labels": 1}, "here")
    raw = json.loads((FIXTURES / "opt" / "config.json").read_text())
    families.check_config(raw | {"_remove_final_layer_norm": False}, "here")


def test_transformers_without_flax_is_one_clear_line(tmp_path):
    (tmp_path / "transformers.py").write_text(
        "__version__ = '5.0.0'\nAutoTokenizer = PreTrainedTokenizerFast = None\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import grpo_jax.models"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: transformers 5.0.0 has no Flax models: pip install 'transformers>=4.57,<5'"
    assert done.stderr.count("Traceback") == 1
