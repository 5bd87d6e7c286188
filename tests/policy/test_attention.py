"""Attention: flash attention computes what ours does, and is refused where it cannot run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config.run import ModelConfig
from grpo_jax.models import decoder_families
from grpo_jax.models.loading import load_model
from grpo_jax.policy import attention
from grpo_jax.policy.attention import attend_flash
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.types import Rollout

FIXTURES = "tests/fixtures/models/"
N, G, S, T = 2, 3, 7, 5
B = N * G


def rollout() -> Rollout:
    rng = np.random.default_rng(0)
    return Rollout(
        prompt_tokens=jnp.asarray(np.repeat(rng.integers(0, 200, (N, S)), G, axis=0), jnp.int32),
        prompt_mask=jnp.asarray(np.repeat(np.arange(S) >= [[0], [3]], G, axis=0)),
        tokens=jnp.asarray(rng.integers(0, 200, (B, T)), jnp.int32),
        mask=jnp.asarray(np.arange(T) < rng.integers(1, T + 1, (B, 1))),
        log_probs=None,
        kept_mass=None,
        finished=None,
    )


@pytest.fixture
def calls(monkeypatch):
    """Makes `cudnn` run on a CPU, by the same function with XLA's implementation; notes its calls."""
    calls = []

    def on_cpu(query, *args, **kwargs):
        calls.append(query.shape)
        return attend_flash(query, *args, **kwargs, implementation="xla")

    monkeypatch.setitem(attention.ATTENTION, "cudnn", on_cpu)
    monkeypatch.setattr("grpo_jax.policy.decoder.check_attention", lambda *_: None)
    return calls


# One head per key and groups of them; windows; rows that share a prompt, and rows that do not.
@pytest.mark.parametrize("name", ["gpt2", "llama3", "mistral_window", "qwen3"])
@pytest.mark.parametrize("group_size", [1, G])
def test_flash_attention_computes_the_same(calls, name, group_size):
    model, sampled = load_model(FIXTURES + name), rollout()
    make = functools.partial(decoder_families.make_policy, model.config, dtype=jnp.float32)

    def gradient(policy):
        def total(params):
            scores = completion_log_probs(policy, params, sampled, group_size=group_size)
            return jnp.sum(scores[0] * jnp.linspace(-1, 1, B)[:, None]) + jnp.sum(scores[1]), scores

        return jax.jit(jax.grad(total, has_aux=True))(model.params)

    plain, flash = gradient(make()), gradient(make(attention="cudnn"))
    assert calls
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), flash[0], plain[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), flash[1], plain[1])


def test_flash_attention_keeps_no_scores(monkeypatch):
    """On a CPU XLA makes them; what matters is what we hand over: one row's keys, none of them repeated."""
    seen = {}

    def kernel(query, key, value, *, mask, scale, implementation):
        seen.update(query=query.shape, key=key.shape, mask=mask.shape, implementation=implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    query, own = jnp.ones((2, 1, 3, 4, 5, 8)), (jnp.ones((2, 1, 3, 5, 8)),) * 2
    prefix = (jnp.ones((2, 1, 7, 8)),) * 2
    visible = attention.Visible(
        prefix={None: jnp.ones((2, 1, 1, 1, 1, 7), bool)}, own={None: jnp.ones((2, 1, 3, 1, 5, 5), bool)}
    )
    mixed = attend_flash(query, own, prefix, visible, None, scale=1.0, cap=None)
    assert mixed.shape == query.shape
    assert seen == {
        "query": (6, 5, 4, 8),
        "key": (6, 12, 1, 8),
        "mask": (6, 1, 5, 12),
        "implementation": "cudnn",
    }
    seen.clear()
    attend_flash(query[..., :1, :], own, prefix, one_query(visible), None, scale=1.0, cap=None)
    attend_flash(query, own, prefix, visible, None, scale=1.0, cap=30.0)
    assert not seen  # decoding and soft-capped scores


def one_query(visible):
    return attention.Visible(prefix=visible.prefix, own={w: x[..., :1, :] for w, x in visible.own.items()})


def test_refusals():
    with pytest.raises(ValueError, match="attention 'flash': choose one of shared, cudnn"):
        load_model(FIXTURES + "gpt2", attention="flash")
    with pytest.raises(ValueError, match="attention 'cudnn' needs an NVIDIA GPU, and JAX runs on cpu"):
        load_model(FIXTURES + "gpt2", attention="cudnn", dtype="bfloat16")
    assert ModelConfig().attention == "shared"


def test_refusals_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="attention 'cudnn' computes in 16 bits: set model"):
        load_model(FIXTURES + "gpt2", attention="cudnn")
    with pytest.raises(ValueError, match="for models that our own decoder computes, and opt is not"):
        load_model(FIXTURES + "opt", attention="cudnn", dtype="bfloat16")
