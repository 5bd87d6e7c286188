"""A function without a cache as a policy, against the same weights in a policy that has one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import VOCAB, make_toy_policy, off_policy_experience

from grpo_jax import (
    completion_log_probs,
    generate,
    init_train_state,
    make_recipe,
    pad_prompts,
    policy_from_apply,
    train_step,
)

N, G, S = 3, 4, 6
CACHED, PARAMS = make_toy_policy()
PROMPTS = pad_prompts([[5, 6, 7], [8], [2, 3, 4, 5, 6, 7]], S)
KEY = jax.random.key(3)


def bare(params, tokens, mask, positions):
    return CACHED.unembed(params, CACHED.forward(params, tokens, mask, positions)[0])


BARE = policy_from_apply(bare)


def blind(params, tokens, *_):
    """Knows the tokens alone, and attends to all earlier ones."""
    counted = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return bare(params, tokens, jnp.ones(tokens.shape, bool), counted)


def infinite(params, tokens, mask, positions):
    """Gives a query without any key NaN, as a softmax over -inf alone does."""
    keys = jnp.tril(mask[:, None, :] & jnp.ones((tokens.shape[1],) * 2, bool))
    attention = jax.nn.softmax(jnp.where(keys, 0.0, -jnp.inf), axis=-1)
    return bare(params, tokens, mask, positions) + 0 * jnp.sum(attention, axis=-1, keepdims=True)


ROWS = np.random.default_rng(0)
MASK = np.arange(7) < ROWS.integers(1, 8, (N * G, 1))
EXPERIENCE = off_policy_experience(CACHED, PARAMS, MASK, ROWS, prompt_length=S)
SHARED = EXPERIENCE.replace(
    prompt_tokens=jnp.repeat(EXPERIENCE.prompt_tokens[::G], G, axis=0),
    prompt_mask=jnp.repeat(EXPERIENCE.prompt_mask[::G], G, axis=0),
)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_samples_what_the_cached_policy_samples(temperature):
    # 40 tokens run through every stage of decoding, so the cache is forked, grown and cut to fewer rows.
    settings = {"group_size": G, "max_new_tokens": 40, "eos_ids": 1, "temperature": temperature}
    ours = generate(BARE, PARAMS, PROMPTS, KEY, **settings)
    theirs = generate(CACHED, PARAMS, PROMPTS, KEY, **settings)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.mask, theirs.mask)
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"group_size": G}, {"group_size": G, "num_tokens": int(MASK.sum())}]
)
def test_it_scores_as_the_cached_policy(settings):
    expected = completion_log_probs(CACHED, PARAMS, SHARED, temperature=0.7)
    found = completion_log_probs(BARE, PARAMS, SHARED, temperature=0.7, chunk_size=5, **settings)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("name", ["grpo", "exact"])
def test_one_update_is_that_of_the_cached_policy(name):
    recipe = make_recipe("grpo", kl_coef=0.1)
    settings = {"group_size": G, "num_microbatches": 3}
    experience = SHARED
    if name == "exact":
        recipe = make_recipe("grpo", kl_coef=0.1, kl_estimator="exact")
        settings["ref_params"] = make_toy_policy(seed=1)[1]
        experience = SHARED.replace(ref_log_probs=None)
    states = [init_train_state(policy, PARAMS, optax.sgd(0.1)) for policy in (BARE, CACHED)]
    (ours, metrics), (theirs, expected) = (
        train_step(state, experience, recipe=recipe, **settings) for state in states
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours.params, theirs.params)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-4)
    assert np.max(np.abs(ours.params["qkv"] - PARAMS["qkv"])) > 1e-3


def test_a_completion_of_one_token():
    one = jax.tree.map(lambda x: x[:, :1] if x.shape[1:] == MASK.shape[1:] else x, SHARED)
    found, _ = completion_log_probs(BARE, PARAMS, one, group_size=G)
    expected, _ = completion_log_probs(CACHED, PARAMS, one)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("apply_fn", [blind, infinite])
def test_left_padding_reaches_no_function(apply_fn):
    found = completion_log_probs(policy_from_apply(apply_fn), PARAMS, SHARED, group_size=G)
    expected = completion_log_probs(CACHED, PARAMS, SHARED)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_function_gets_what_is_promised():
    seen = []

    def watch(params, tokens, mask, positions):
        seen.append((tokens, mask, positions))
        return bare(params, tokens, mask, positions)

    mask = jnp.array([[False, True, True, True, False], [True, True, True, True, True]])
    tokens = jnp.array([[0, 7, 8, 9, 0], [2, 3, 4, 5, 6]])
    positions = jnp.array([[0, 0, 1, 2, 2], [0, 1, 2, 3, 4]])
    hidden, cache = policy_from_apply(watch).forward(PARAMS, tokens, mask, positions)
    assert cache is None and hidden.dtype == jnp.float32 and hidden.shape == (2, 5, VOCAB)
    given, real, places = seen[0]
    assert (given.dtype, real.dtype, places.dtype) == (jnp.int32, bool, jnp.int32)
    np.testing.assert_array_equal(given[0, :3], [7, 8, 9])
    np.testing.assert_array_equal(real, [[True, True, True, False, False], [True] * 5])
    np.testing.assert_array_equal(places[0, :3], [0, 1, 2])
    straight, _ = CACHED.forward(PARAMS, tokens, mask, positions)
    expected = CACHED.unembed(PARAMS, straight)
    np.testing.assert_allclose(hidden[mask], expected[mask], atol=2e-5)


def test_logits_of_half_precision_become_float32():
    half = policy_from_apply(lambda *arguments: bare(*arguments).astype(jnp.bfloat16))
    logits, _ = half.forward(PARAMS, jnp.array([[2, 3]] * 3), jnp.ones((3, 2), bool), jnp.zeros((3, 2), int))
    assert logits.dtype == half.unembed(PARAMS, logits).dtype == jnp.float32


def test_slots_that_are_not_written_are_masked():
    seen = []

    def watch(params, tokens, mask, positions):
        seen.append((tokens, mask, positions))
        return bare(params, tokens, mask, positions)

    policy = policy_from_apply(watch)
    mask = jnp.array([[False, True, True, True, True]] * 2)  # what may be attended to once it is written
    cache = policy.grow_cache(policy.init_cache(2, 2), 5)
    _, cache = policy.forward(PARAMS, jnp.array([[0, 7]] * 2), mask, jnp.zeros((2, 2), int), cache)
    hidden, _ = policy.forward(PARAMS, jnp.array([[8], [9]]), mask, jnp.ones((2, 1), int), cache)
    tokens, real, positions = seen[1]
    np.testing.assert_array_equal(real, [[True, True, False, False, False]] * 2)
    np.testing.assert_array_equal(tokens[real], [7, 8, 7, 9])
    np.testing.assert_array_equal(positions[real], [0, 1, 0, 1])
    expected = bare(PARAMS, jnp.array([[7, 8], [7, 9]]), jnp.ones((2, 2), bool), jnp.array([[0, 1]] * 2))
    np.testing.assert_allclose(hidden[:, 0], expected[:, 1], atol=2e-5)


def test_prompts_are_padded_to_the_longest_and_may_be_arrays():
    prompts = pad_prompts([np.array([3, 4]), [5], []])
    np.testing.assert_array_equal(prompts.tokens, [[3, 4], [0, 5], [0, 0]])
    np.testing.assert_array_equal(prompts.mask, [[True, True], [False, True], [False, False]])
    assert pad_prompts([], 3).tokens.shape == (0, 3)


def test_one_function_is_one_policy():
    assert policy_from_apply(bare) is BARE
    assert policy_from_apply(blind) != BARE


def attention_mask_of_pairs(params, tokens, mask, positions):
    """Expects [B,1,L,L], as a linen attention does."""
    length = tokens.shape[1]
    scores = jnp.where(mask, jnp.zeros((tokens.shape[0], 1, length, length)), -1e9)
    return bare(params, tokens, jnp.ones(tokens.shape, bool), positions) + scores[:, 0, :, :1]


BAD = {
    "three arguments": (lambda tokens, mask, positions: 0, r"cannot be called as apply_fn\(params, tokens"),
    "five arguments": (
        lambda p, t, m, q, key: 0,
        r"missing a required argument: 'key'.*policy_from_apply\(lam",
    ),
    "swapped": (lambda params, tokens, positions, mask: 0, "has positions in another place than apply_fn"),
    "no function": ({"params": 1}, "apply_fn is a dict, which cannot be called"),
    "a tuple": (lambda *a: (bare(*a), None), r"returns a tuple, and it must return the logits \[B, L, V\]"),
    "last token": (lambda *a: bare(*a)[:, -1], r"returns float32 \[3, 13\] for tokens \[3, 6\]"),
    "ids": (lambda *a: a[1][..., None], r"returns int32 \[3, 6, 1\] .* floating-point logits \[3, 6, V\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_such_function_is_one_line(name):
    apply_fn, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        generate(policy_from_apply(apply_fn), PARAMS, PROMPTS, KEY, group_size=G, max_new_tokens=5, eos_ids=1)
    assert "\n" not in str(error.value)


def test_another_mask_says_what_the_model_got():
    policy = policy_from_apply(attention_mask_of_pairs)
    with pytest.raises(ValueError, match="broadcast") as error:
        generate(policy, PARAMS, PROMPTS, KEY, group_size=1, max_new_tokens=1, eos_ids=1)
    assert "a bool mask [3, 6] that is True for real tokens" in error.value.__notes__[0]


@pytest.mark.parametrize("rows", [1, 6])
def test_a_mask_that_fits_by_chance_is_no_mask(rows):
    prompts = pad_prompts([[5, 6, 7]] * rows, 6)
    policy = policy_from_apply(attention_mask_of_pairs)
    with pytest.raises(ValueError, match=r"cannot be called for 7 rows of 6 tokens \(.*mask is \[B, L\]"):
        generate(policy, PARAMS, prompts, KEY, group_size=1, max_new_tokens=1, eos_ids=1)
