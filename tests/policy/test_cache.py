"""The decoder's cache, forked to groups and cut to rows, against whole sequences without any."""

import jax.numpy as jnp
import numpy as np

from grpo_jax.models.loading import load_model, pad_prompts
from grpo_jax.policy.cache import fork_cache, grow_cache, take_cache
from grpo_jax.policy.decoding import positions_from_mask, prefill

FIXTURES = "tests/fixtures/models/"


def test_a_forked_and_cut_cache_goes_on_where_the_prompt_ended():
    model = load_model(FIXTURES + "llama3")
    prompts = pad_prompts([[5, 6, 7], [9, 8, 7, 6, 5]], 6)
    last, cache = prefill(model.policy, model.params, prompts)
    rows = jnp.array([3, 0])
    cut = take_cache(grow_cache(fork_cache(cache, 2), 8), rows)
    tokens = jnp.array([[11, 12], [13, 14]])
    mask = jnp.concatenate([prompts.mask[rows // 2], jnp.ones((2, 2), bool)], axis=1)
    positions = positions_from_mask(mask)
    hidden, _ = model.policy.forward(model.params, tokens, mask, positions[:, 6:], cut)
    whole = jnp.concatenate([prompts.tokens[rows // 2], tokens], axis=1)
    expected, _ = model.policy.forward(model.params, whole, mask, positions, None)
    np.testing.assert_allclose(hidden, expected[:, 6:], atol=1e-5)
    np.testing.assert_allclose(last[rows // 2], expected[:, 5], atol=1e-5)
    # The prompt's keys are there once for all of its rows.
    assert fork_cache(cache, 100).prefix[0][0].shape[0] == 2
