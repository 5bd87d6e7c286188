"""A toy policy: one attention layer, learned positions, a key-value cache; small enough to read at once."""

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.objective.losses import loss_weights
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.types import Experience, Policy

VOCAB, WIDTH, POSITIONS = 13, 16, 32


def make_toy_policy(*, vocab: int = VOCAB, width: int = WIDTH, seed: int = 0, scale: float = 1.0):
    """Returns (Policy, params) of a random model whose distributions are far from uniform."""
    names = {
        "embed": (vocab, width),
        "position": (POSITIONS, width),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 2 * width),
        "down": (2 * width, width),
        "head": (width, vocab),
    }
    keys = jax.random.split(jax.random.key(seed), len(names))
    params = {
        name: scale * jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, names.items(), strict=True)
    }
    params["embed"] = params["embed"] * 3

    def norm(x):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def forward(params, tokens, mask, positions, cache=None, *, num_tokens=None):
        del num_tokens
        size = tokens.shape[1]
        x = params["embed"][tokens] + params["position"][positions]
        query, key, value = jnp.split(norm(x) @ params["qkv"], 3, axis=-1)
        start = 0 if cache is None else cache["index"]
        if cache is not None:
            key = jax.lax.dynamic_update_slice(cache["key"], key, (0, start, 0))
            value = jax.lax.dynamic_update_slice(cache["value"], value, (0, start, 0))
            cache = {"key": key, "value": value, "index": start + size}
        slots = jnp.arange(key.shape[1])
        visible = mask[:, None, :] & (slots <= start + jnp.arange(size)[:, None])
        scores = jnp.einsum("bqd,bkd->bqk", query, key) / width**0.5
        attention = jax.nn.softmax(jnp.where(visible, scores, -1e9), axis=-1)
        x = x + jnp.einsum("bqk,bkd->bqd", attention, value) @ params["out"]
        x = x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]
        return norm(x), cache

    def init_cache(batch, max_length):
        zeros = jnp.zeros((batch, max_length, width))
        return {"key": zeros, "value": zeros, "index": jnp.int32(0)}

    def unembed(params, hidden):
        return (hidden @ params["head"]).astype(jnp.float32)

    return Policy(forward=forward, unembed=unembed, init_cache=init_cache), params


def off_policy_experience(policy, params, mask, rng, *, prompt_length: int) -> Experience:
    """Returns random rows whose old and reference log-probs lie around the policy's own."""
    batch, length = mask.shape
    experience = Experience(
        prompt_tokens=jnp.asarray(rng.integers(0, VOCAB, (batch, prompt_length)), jnp.int32),
        prompt_mask=jnp.asarray(
            np.arange(prompt_length) >= prompt_length - rng.integers(1, prompt_length + 1, (batch, 1))
        ),
        tokens=jnp.asarray(rng.integers(0, VOCAB, mask.shape), jnp.int32),
        mask=jnp.asarray(mask),
        advantages=jnp.asarray(rng.normal(size=batch), jnp.float32),
        weights=loss_weights(jnp.asarray(mask)),
        old_log_probs=jnp.zeros((batch, length)),
    )
    log_probs, _ = completion_log_probs(policy, params, experience, temperature=1.0)
    noise = 0.3 * rng.normal(size=(2, batch, length)).astype(np.float32)
    return experience.replace(old_log_probs=log_probs + noise[0], ref_log_probs=log_probs + noise[1])
