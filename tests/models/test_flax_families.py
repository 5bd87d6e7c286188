"""Every model type, as each implementation computes it, against PyTorch's logits and against itself.

Padding, cache, fork, sampler and scorer, dtype; what the Flax classes would get wrong is refused.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import flax_families
from grpo_jax.models.hf_config import read_config
from grpo_jax.models.loading import load_model, pad_prompts
from grpo_jax.policy.decoding import generate
from grpo_jax.policy.log_probs import completion_log_probs

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
FLAX_ONLY = ["bloom", "gpt_neo", "gptj", "opt", "opt_post_norm", "xglm"]
BOTH = ["gemma", "gpt2", "gpt2_untied", "llama", "mistral"]
CASES = [(name, "decoder") for name in NAMES if name not in FLAX_ONLY]
CASES += [(name, "flax") for name in FLAX_ONLY + BOTH]
PADDED = 17  # the longest reference row has 12 tokens
STEPS = 4

each_case = pytest.mark.parametrize(("name", "implementation"), CASES)


@functools.cache
def family(name, implementation="flax"):
    """Returns a fixture, loaded once: model, jitted logits function, reference rows, their logits."""
    model = load_model(str(FIXTURES / name), implementation=implementation)

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


def left_padded(name, implementation):
    model, logits, rows, _ = family(name, implementation)
    prompts = pad_prompts(rows, PADDED)
    return np.asarray(logits(model.params, prompts.tokens, prompts.mask, positions_of(prompts.mask)))


@each_case
def test_agrees_with_torch_on_a_left_padded_batch(name, implementation):
    """The reference rows were run alone, without padding."""
    _, _, rows, expected = family(name, implementation)
    for row, actual, wanted in zip(rows, left_padded(name, implementation), expected, strict=True):
        np.testing.assert_allclose(actual[PADDED - len(row) :], wanted, atol=2e-5)


@pytest.mark.parametrize("name", BOTH)
def test_both_implementations_agree_on_the_same_parameters(name):
    ours, theirs = family(name, "decoder")[0], family(name, "flax")[0]
    assert (ours.implementation, theirs.implementation) == ("decoder", "flax")
    assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    mask = pad_prompts(family(name)[2], PADDED).mask[..., None]
    actual, expected = (left_padded(name, implementation) for implementation in ("decoder", "flax"))
    np.testing.assert_allclose(actual * mask, expected * mask, atol=1e-5)


@each_case
def test_amount_of_left_padding_is_inert(name, implementation):
    model, logits, rows, _ = family(name, implementation)
    tokens, mask = np.full((len(rows), PADDED), 7, np.int32), np.zeros((len(rows), PADDED), bool)
    for i, row in enumerate(rows):  # no padding on the left; right of the row is what causality hides
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    actual = np.asarray(logits(model.params, tokens, mask, positions_of(mask)))
    for i, row in enumerate(rows):
        padded = left_padded(name, implementation)[i, -len(row) :]
        np.testing.assert_allclose(padded, actual[i, : len(row)], atol=1e-5)


@pytest.mark.parametrize(("name", "implementation"), [case for case in CASES if case[0] != "bloom"])
def test_positions_are_used(name, implementation):
    """Negative control of the two tests above."""
    model, logits, rows, _ = family(name, implementation)
    prompts = pad_prompts(rows, PADDED)
    wrong = logits(model.params, prompts.tokens, prompts.mask, np.zeros_like(prompts.tokens))
    assert np.abs(np.asarray(wrong)[2, -1] - left_padded(name, implementation)[2, -1]).max() > 1e-3


@each_case
def test_cached_decoding_of_forked_prompts_equals_one_forward(name, implementation):
    """Prefills N, forks to 2N, shuffles the rows and decodes STEPS tokens in a scan.

    Slots not yet written are True in the mask.
    """
    model, logits, rows, _ = family(name, implementation)
    policy, width = model.policy, PADDED - STEPS
    prompts = pad_prompts(rows, width)
    tokens = np.repeat(prompts.tokens, 2, axis=0)
    completion = np.random.default_rng(0).integers(3, 288, (len(tokens), STEPS)).astype(np.int32)
    tokens = np.concatenate([tokens, completion], axis=1)
    mask = np.concatenate([np.repeat(prompts.mask, 2, axis=0), np.ones((len(tokens), STEPS), bool)], axis=1)
    positions, order = positions_of(mask), np.array([4, 0, 7, 2, 1, 6, 3, 5])

    @jax.jit
    def cached(params, tokens, mask, positions):
        prompt = tokens[::2, :width], mask[::2, :width], positions[::2, :width]
        hidden, cache = policy.forward(params, *prompt, policy.init_cache(len(rows), width))
        cache = policy.take_cache(policy.grow_cache(policy.fork_cache(cache, 2), PADDED), order)

        def step(cache, inputs):
            token, position = inputs
            out, cache = policy.forward(params, token[:, None], mask[order], position[:, None], cache)
            return cache, out[:, 0]

        _, steps = jax.lax.scan(step, cache, (tokens[order, width:].T, positions[order, width:].T))
        steps = steps.swapaxes(0, 1)[np.argsort(order)]
        return policy.unembed(params, jnp.concatenate([jnp.repeat(hidden, 2, axis=0), steps], axis=1))

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


@pytest.mark.parametrize("name", ["gpt2", "llama3", "mistral_window", "qwen3", "gemma2", "gemma3_text"])
def test_sampler_and_scorer_agree(name):
    model, _, rows, _ = family(name, "decoder")
    prompts = pad_prompts(rows, PADDED - STEPS)
    sampling = {"group_size": 3, "max_new_tokens": 2 * STEPS, "eos_ids": jnp.arange(0, 288, 9)}
    rollout = generate(model.policy, model.params, prompts, jax.random.key(0), **sampling)
    assert 0 < rollout.finished.sum() < rollout.finished.size
    scored, _ = completion_log_probs(model.policy, model.params, rollout)
    np.testing.assert_allclose(np.where(rollout.mask, scored, 0), rollout.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("gpt2", "flax"), ("gpt_neo", "flax"), ("bloom", "flax"), ("llama", "flax")]
    + [(name, "decoder") for name in ("gpt2_untied", "llama", "qwen2", "gemma3_text")],
)
def test_fully_masked_row_is_finite_with_gradients(name, implementation):
    model, _, rows, _ = family(name, implementation)
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
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("gpt2", "flax"), ("llama", "flax"), ("gpt2", "decoder"), ("llama3", "decoder"), ("gemma2", "decoder")],
)
def test_bfloat16_compute_keeps_float32_parameters_and_logits(name, implementation):
    model = load_model(str(FIXTURES / name), dtype="bfloat16", implementation=implementation)
    _, _, rows, _ = family(name, implementation)
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
    difference = np.abs(
        np.where(prompts.mask[..., None], logits - left_padded(name, implementation), 0)
    ).max()
    assert 1e-5 < difference < 0.1


def test_parameters_are_the_pytree_of_the_flax_class():
    from transformers import FlaxGPT2LMHeadModel

    model, _, _, _ = family("gpt2")
    wanted = FlaxGPT2LMHeadModel(model.config, _do_init=False).params_shape_tree
    assert jax.tree.structure(model.params) == jax.tree.structure(wanted)


@pytest.mark.parametrize("implementation", ["decoder", "flax"])
def test_lengths_over_the_models_positions_name_both_numbers(implementation):
    model, _, _, _ = family("gpt2", implementation)
    assert model.max_positions == 32
    ones = jax.ShapeDtypeStruct((1, 33), jnp.int32)
    with pytest.raises(ValueError, match=r"33 tokens .* 32 positions"):
        jax.eval_shape(model.policy.forward, model.params, ones, ones, ones, None)
    if implementation == "flax":  # which makes a module for the length
        with pytest.raises(ValueError, match=r"33 tokens .* 32 positions"):
            model.policy.init_cache(1, 33)
    assert family("bloom")[0].max_positions is None


@pytest.mark.parametrize("implementation", ["decoder", "flax"])
def test_mask_of_another_length_than_the_cache_is_refused(implementation):
    model, _, _, _ = family("gpt2", implementation)
    one, mask = np.ones((1, 1), np.int32), np.ones((1, 5), bool)
    with pytest.raises(ValueError, match="mask covers 5 tokens"):
        model.policy.forward(model.params, one, mask, one, model.policy.init_cache(1, 6))
    with pytest.raises(ValueError, match="mask covers 5 tokens"):
        model.policy.forward(model.params, one, mask, one, None)


def test_rotary_tables_of_flax_are_as_long_as_the_sequence_not_as_the_limit():
    """A 128k-position model would otherwise build a 128k x 128k mask in every layer."""
    raw = json.loads((FIXTURES / "llama" / "config.json").read_text()) | {"max_position_embeddings": 131072}
    policy = flax_families.make_policy(read_config(raw, "here"), dtype=jnp.float32)
    model, _, rows, expected = family("llama")
    prompts = pad_prompts(rows, PADDED)
    np.testing.assert_allclose(logits_of(policy, model.params, prompts)[2, -12:], expected[2], atol=2e-5)


def test_mistral_window_limits_the_length_of_flax_so_that_it_never_binds():
    raw = json.loads((FIXTURES / "mistral" / "config.json").read_text()) | {"sliding_window": 12}
    config = read_config(raw, "here")
    assert flax_families.max_positions(config) == 12
    policy = flax_families.make_policy(config, dtype=jnp.float32)
    model, _, rows, expected = family("mistral")
    np.testing.assert_allclose(
        logits_of(policy, model.params, pad_prompts([rows[2]], 12))[0], expected[2], atol=2e-5
    )


def config_of(name, **change):
    return read_config(json.loads((FIXTURES / name / "config.json").read_text()) | change, "here")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantized"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "encoder-decoder"),
        ("gpt2", {"activation_function": "mish"}, "'mish' does not exist in Flax"),
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
        ("llama", {"head_dim": 8}, "head_dim=8"),
        ("llama", {"tie_word_embeddings": True}, "random"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {}, "no Flax class for qwen2"),
    ],
)
def test_configurations_that_flax_gets_wrong_have_problems(name, change, reason):
    problems = list(flax_families.problems(config_of(name, **change)))
    assert any(reason in problem for problem in problems), problems
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize("name", FLAX_ONLY + BOTH)
def test_configurations_of_the_fixtures_have_no_problems(name):
    assert list(flax_families.problems(config_of(name))) == []
