"""The decoder's own promises. tests/models/test_flax_families.py holds it against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.loading import load_model, pad_prompts
from grpo_jax.policy.decoding import generate
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.policy.rotary import LinearScaling, Llama3Scaling, Rotary
from grpo_jax.types import Rollout

FIXTURES = "tests/fixtures/models/"
N, G, S, T = 2, 3, 7, 5
B = N * G


def rollout(seed=0) -> Rollout:
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(1, T + 1, (B, 1))
    return Rollout(
        prompt_tokens=jnp.asarray(np.repeat(rng.integers(0, 200, (N, S)), G, axis=0), jnp.int32),
        prompt_mask=jnp.asarray(np.repeat(np.arange(S) >= [[0], [3]], G, axis=0)),
        tokens=jnp.asarray(rng.integers(0, 200, (B, T)), jnp.int32),
        mask=jnp.asarray(mask),
        log_probs=None,
        kept_mass=None,
        finished=None,
    )


# Grouped-query attention, windows shorter than the sequence, softcaps, query norms; all with a shared prompt.
@pytest.mark.parametrize("name", ["llama3", "mistral_window", "gemma2", "gemma3_text", "qwen3", "gpt2"])
@pytest.mark.parametrize("num_tokens", [None, "exact"])
def test_a_shared_prompt_is_a_prompt_of_each_rows_own(name, num_tokens):
    """Values and gradients; the whole sequences go without any cache."""
    model, sampled = load_model(FIXTURES + name), rollout()
    num_tokens = num_tokens and int(sampled.mask.sum())

    def total(params, **settings):
        scores = completion_log_probs(model.policy, params, sampled, **settings)
        return jnp.sum(scores[0] * jnp.linspace(-1, 1, B)[:, None]) + jnp.sum(scores[1]), scores

    grad = jax.jit(jax.grad(total, has_aux=True), static_argnames=("group_size", "num_tokens"))
    whole, shared = grad(model.params), grad(model.params, group_size=G, num_tokens=num_tokens)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), shared[0], whole[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), shared[1], whole[1])


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_keeps_less_and_changes_nothing(remat):
    sampled = rollout()

    def gradient(remat):
        model = load_model(FIXTURES + "llama3", remat=remat)

        def total(params):
            return jnp.sum(completion_log_probs(model.policy, params, sampled, group_size=G)[0])

        kept = jax.eval_shape(lambda params: jax.vjp(total, params)[1], model.params)
        return jax.grad(total)(model.params), sum(x.size for x in jax.tree.leaves(kept))

    (plain, all_kept), (again, less_kept) = gradient("none"), gradient(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), again, plain)
    assert less_kept < 0.8 * all_kept


def test_rematerialisation_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="remat 'some': choose one of none, dots, full"):
        load_model(FIXTURES + "gpt2", remat="some")
    with pytest.raises(
        ValueError, match="remat 'full' is for models that our own decoder computes, and opt is not:"
    ):
        load_model(FIXTURES + "opt", remat="full")


def test_rotary_frequencies():
    np.testing.assert_allclose(Rotary(theta=100.0).frequencies(4), [1.0, 0.1], rtol=1e-6)
    linear = Rotary(theta=100.0, scaling=LinearScaling(factor=4.0))
    np.testing.assert_allclose(linear.frequencies(4), [0.25, 0.025], rtol=1e-6)
    # Wavelengths 2 pi / f; kept below 8192 / 4 positions, divided above 8192 / 1, blended between.
    llama3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    wavelengths = np.array([6.0, 2000.0, 4096.0, 9000.0, 1e6])
    blend = (8192 / 4096 - 1) / (4 - 1)
    expected = 2 * np.pi / wavelengths * np.array([1, 1, (1 - blend) / 8 + blend, 1 / 8, 1 / 8])
    np.testing.assert_allclose(llama3.scale(jnp.asarray(2 * np.pi / wavelengths)), expected, rtol=1e-5)


@pytest.mark.parametrize("group_size", [2, 64])
def test_a_policy_with_another_function_decodes_by_it(group_size):
    """Few rows and many: laying parameters out for decoding must not bring the old function back."""
    model = load_model(FIXTURES + "gpt2")

    def unembed(params, hidden):
        return model.policy.unembed(params, hidden).at[..., 3].add(1e6)

    rollout = generate(
        model.policy.replace(unembed=unembed),
        model.params,
        pad_prompts([[5, 6, 7]], 3),
        jax.random.key(0),
        group_size=group_size,
        max_new_tokens=2,
        eos_ids=jnp.array([1]),
    )
    assert (rollout.tokens == 3).all()


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_both_layouts_of_decoding_compute_the_same(name, vendor, monkeypatch):
    """Tied heads; GPT-2's kernels are stored [out, in]."""
    monkeypatch.setattr("grpo_jax.policy.decoder.cpu_vendor", lambda: vendor)
    model = load_model(FIXTURES + name)
    laid_out = model.policy.for_decoding(model.params, 8)
    assert (laid_out is model.params) == (vendor == "GenuineIntel")
    assert model.policy.for_decoding(model.params, 64) is model.params
    tokens = jnp.arange(2 * S).reshape(2, S)
    mask, positions = jnp.ones((2, S), bool), jnp.broadcast_to(jnp.arange(S), (2, S))

    def logits(params):
        hidden, _ = model.policy.forward(params, tokens, mask, positions, None)
        return model.policy.unembed(params, hidden)

    np.testing.assert_allclose(logits(laid_out), logits(model.params), atol=1e-5)
