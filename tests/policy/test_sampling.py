import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.policy.sampling import process_logits, sample_token, scale_logits

V = 37
LAST_UNIFORM = np.float32(1 - 2**-24)  # the largest float32 below 1
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
JITTED = jax.jit(process_logits)
SAMPLE = jax.jit(sample_token)
SAMPLE_ALL = jax.jit(jax.vmap(sample_token, in_axes=(None, 1), out_axes=1))  # many uniforms for the same rows


def processed(logits, **changed):
    return np.asarray(JITTED(logits, **{**OFF, **changed}))


def kept(row):
    return {int(i) for i in np.flatnonzero(np.isfinite(row))}


def random_logits(seed, kind="normal", shape=(V,)):
    rng = np.random.default_rng(seed)
    if kind == "ties":  # few distinct values, both signs
        return rng.integers(-2, 3, shape).astype(np.float32)
    logits = (3 * rng.standard_normal(shape)).astype(np.float32)
    if kind == "masked":
        logits = np.where(rng.random(shape) < 0.3, -np.inf, logits)
        logits[..., 0] = 0.0
    return logits.astype(np.float32)


# --------------------------------------------------------------------------------------- process_logits
SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 2.0, 0.0]),
        "top_k": st.sampled_from([0, 0, 1, 2, 5, V - 1, V, 1000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.05, 0.4, 0.73, 0.95, 0.999]),
        "min_p": st.sampled_from([0.0, 0.0, 0.01, 0.11, 0.57]),
    }
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["normal", "masked", "ties"]), SETTINGS)
def test_keeps_what_sorting_keeps(seed, kind, setting):
    logits = random_logits(seed, kind)
    result = processed(logits, **setting)
    assert result.dtype == np.float32 and result.shape == (V,)
    expected = oracle.kept_tokens(logits, **setting)
    if kept(result) != expected:  # an edge closer than float32 can tell may fall either way
        nudged = [oracle.kept_tokens(logits, **nudge(setting, factor)) for factor in (1 - 1e-5, 1 + 1e-5)]
        assert kept(result) in nudged
    tokens = sorted(kept(result))
    scale = setting["temperature"] or 1.0
    np.testing.assert_allclose(result[tokens], logits[tokens] / scale, rtol=1e-6)
    assert (np.delete(result, tokens) == -np.inf).all()


def nudge(setting, factor):
    return {**setting, "top_p": min(1.0, setting["top_p"] * factor), "min_p": setting["min_p"] * factor}


def test_each_filter_by_hand():
    logits = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))
    assert kept(processed(logits)) == {0, 1, 2, 3, 4}
    assert kept(processed(logits, top_k=2)) == {1, 3}
    assert kept(processed(logits, top_p=0.6)) == {1, 3}  # 0.4 is not enough, 0.65 is
    assert kept(processed(logits, top_p=0.66)) == {1, 3, 4}
    assert kept(processed(logits, top_p=1e-6)) == {1}
    # At least this probability: exactly half is enough.
    assert kept(processed(np.float32([np.log(2), 0, 0]), top_p=0.5)) == {0}
    assert kept(processed(logits, min_p=0.3)) == {1, 3, 4}  # 0.12 and more
    # top_p acts on what top_k left, renormalised: 0.4 / 0.65 = 0.615.
    assert kept(processed(logits, top_k=2, top_p=0.61)) == {1}
    assert kept(processed(logits, top_k=2, top_p=0.62)) == {1, 3}
    # The temperature comes first: at 0.5 the squares count, 0.16 of 0.275.
    assert kept(processed(logits, temperature=0.5, top_p=0.58)) == {1}
    assert kept(processed(logits, temperature=0.5, top_p=0.59)) == {1, 3}
    assert kept(processed(logits, temperature=0.5, min_p=0.3)) == {1, 3}
    assert kept(processed(logits, temperature=0.0)) == {1}


def test_ties():
    logits = np.array([1.0, 3.0, 3.0, -2.0, 3.0, 1.0], np.float32)
    assert kept(processed(logits, top_k=1)) == {1, 2, 4}  # ties with the last one kept are kept
    assert kept(processed(logits, top_k=4)) == {0, 1, 2, 4, 5}
    assert kept(processed(logits, top_p=0.01)) == {1, 2, 4}
    assert kept(processed(logits, temperature=0.0)) == {1}  # greedy takes the first
    assert kept(processed(np.zeros(6, np.float32), top_k=2, top_p=0.5)) == set(range(6))
    zeros = np.array([0.0, -0.0, -1.0], np.float32)
    assert kept(processed(zeros, top_k=1)) == {0, 1}  # both zeros are the same number


def test_off_changes_nothing():
    logits = random_logits(0, "masked", (4, V))
    np.testing.assert_array_equal(processed(logits), logits)
    np.testing.assert_array_equal(processed(logits, top_k=V), logits)
    np.testing.assert_array_equal(processed(logits, top_p=1.0, min_p=0.0, top_k=0), logits)


def test_greedy_ignores_the_filters():
    logits = random_logits(1, shape=(5, V))
    for changed in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.9}):
        result = processed(logits, temperature=0.0, **changed)
        np.testing.assert_array_equal(np.argmax(result, -1), np.argmax(logits, -1))
        assert np.isfinite(result).sum() == 5
        for uniform in (0.0, 0.5, LAST_UNIFORM):
            np.testing.assert_array_equal(
                SAMPLE(result, np.full(5, uniform, np.float32)), np.argmax(logits, -1)
            )


@pytest.mark.parametrize(
    "logits",
    [
        [-np.inf, 2.0, -np.inf, -np.inf],
        [1e30, -1e30, 0.0, 1.0],
        [-1e30, -1e30, -1e30, -2e30],
        [3e38, 3e38, -3e38, 0.0],
        [1e-40, 0.0, -1e-40, 1.0],
    ],
)
def test_extreme_logits(logits):
    logits = np.array(logits, np.float32)
    for changed in (
        {},
        {"top_k": 2},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"top_k": 3, "top_p": 0.9, "min_p": 0.5},
    ):
        result = processed(logits, **changed)
        assert not np.isnan(result).any() and int(np.argmax(logits)) in kept(result)
        for uniform in (np.float32(0), LAST_UNIFORM):
            assert int(SAMPLE(result, uniform)) in kept(result)


def test_rows_are_independent_whatever_their_shape():
    logits = random_logits(2, shape=(2, 3, V))
    changed = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02}
    result = processed(logits, **changed)
    chex.assert_shape(result, (2, 3, V))
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(result[i, j], processed(logits[i, j], **changed), rtol=1e-6)
    eager = process_logits(logits, **changed)
    chex.assert_trees_all_close(np.asarray(eager), result, rtol=1e-6)


def test_bfloat16_logits():
    logits = jnp.asarray(random_logits(3, shape=(4, V)), jnp.bfloat16)
    wide = np.asarray(logits, np.float32)
    for changed in (
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 0.0},
    ):
        result = processed(logits, **changed)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, processed(wide, **changed))


def test_settings_do_not_compile_again():
    function = jax.jit(chex.assert_max_traces(process_logits, n=1))
    logits = random_logits(4)
    for setting in (
        {},
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.5},
        {"min_p": 0.1},
    ):
        result = np.asarray(function(logits, **{**OFF, **setting}))
        assert kept(result) == oracle.kept_tokens(logits, **setting)


def test_settings_are_numbers():
    with pytest.raises(AssertionError):
        process_logits(jnp.zeros((2, 4)), temperature=jnp.ones(2))


def test_scale_logits():
    logits = random_logits(5)
    np.testing.assert_allclose(scale_logits(jnp.asarray(logits), 0.5), logits / 0.5)
    np.testing.assert_array_equal(scale_logits(jnp.asarray(logits), 0.0), logits)
    assert scale_logits(jnp.ones(3, jnp.bfloat16), 1.0).dtype == jnp.float32


# ------------------------------------------------------------------------------------------ sample_token
SIZES = (1, 5, 127, 128, 129, 1000, 50257)


@pytest.mark.parametrize("size", SIZES)
def test_sample_token_inverts_the_cumulative_distribution(size):
    rng = np.random.default_rng(size)
    rows = 64
    logits = (3 * rng.standard_normal(size)).astype(np.float32)
    logits[rng.random(size) < 0.3] = -np.inf
    logits[size // 2] = 1.0
    uniforms = rng.random(rows).astype(np.float32)
    uniforms[:2] = 0.0, LAST_UNIFORM
    tokens = SAMPLE(np.broadcast_to(logits, (rows, size)), uniforms)
    chex.assert_shape(tokens, (rows,))
    assert tokens.dtype == jnp.int32
    edges_missed = 0
    for token, uniform in zip(np.asarray(tokens), uniforms, strict=True):
        assert logits[token] > -np.inf
        expected, distance = oracle.inverse_cdf(logits, float(uniform))
        if token != expected:  # float32 sums put an edge up to a few 1e-7 elsewhere
            edges_missed += 1
            assert distance < 2e-6
    assert edges_missed <= rows // 8


@pytest.mark.parametrize("size", SIZES)
def test_sample_token_never_picks_what_cannot_be(size):
    rng = np.random.default_rng(size)
    uniforms = np.float32([0, 1e-30, 2**-24, 0.5, 1 - 2**-23, LAST_UNIFORM])
    for alive in ([0], [size - 1], [size // 2], sorted({0, size - 1}), sorted(set(rng.integers(0, size, 3)))):
        for spread in (0.0, 60.0):  # 60 nats down: a probability that float32 sums do not see
            logits = np.full(size, -np.inf, np.float32)
            logits[alive] = -spread * np.arange(len(alive))
            tokens = np.asarray(SAMPLE(np.broadcast_to(logits, (len(uniforms), size)), uniforms))
            assert set(tokens) <= set(alive)
            assert tokens[0] == alive[0]  # uniform 0 is the first token that can be drawn
            if spread == 0:
                assert tokens[-1] == alive[-1]


@pytest.mark.parametrize(
    "alive", [slice(127, 128), slice(64, 96), slice(0, 1)], ids=["last", "middle", "first"]
)
def test_rounding_at_the_edges_never_picks_a_dead_neighbour(alive):
    # Uniforms within a few ulps of every edge between two blocks, where the two levels may disagree by
    # rounding about which side they are on: what is left for the second level is then below 0 or too much.
    rng = np.random.default_rng(0)
    blocks, rows = 40, 400
    logits = np.full((rows, blocks + 2, 128), -np.inf, np.float32)  # the last two blocks are dead
    logits[:, :blocks, alive] = rng.standard_normal((rows, blocks, logits[0, 0, alive].size))
    logits = logits.reshape(rows, -1)
    possible = np.isfinite(logits)
    probs = np.asarray(jax.nn.softmax(logits)).reshape(rows, -1, 128).sum(-1)
    edges = np.cumsum(probs, axis=1, dtype=np.float32)[:, : blocks + 1]
    for shift in (-2, -1, 0, 1, 2):
        uniforms = np.clip(edges + np.float32(shift * 2**-24), 0, LAST_UNIFORM)
        tokens = np.asarray(SAMPLE_ALL(logits, uniforms))
        assert np.take_along_axis(possible, tokens, axis=1).all()


def test_sample_token_frequencies():
    probs = np.array([0.5, 0.25, 0.125, 0.0, 0.0625, 0.0625])
    for start in (0, 125):  # the second one straddles two blocks
        logits = np.full(start + 6, -np.inf, np.float32)
        with np.errstate(divide="ignore"):
            logits[start:] = np.log(probs)
        rows = 20_000
        uniforms = jax.random.uniform(jax.random.key(0), (rows,))
        tokens = SAMPLE(np.broadcast_to(logits, (rows, start + 6)), uniforms)
        counts = np.bincount(np.asarray(tokens), minlength=start + 6)[start:]
        assert counts[3] == 0 and counts.sum() == rows
        live = probs > 0
        chi_square = np.sum((counts[live] - rows * probs[live]) ** 2 / (rows * probs[live]))
        assert chi_square < 18.5  # 4 degrees of freedom, one in a thousand


def test_sample_token_is_exact_on_a_grid():
    # Equal probabilities of 2^-k are exact in float32, so every edge is where it belongs.
    size = 1024
    uniforms = (np.arange(size) / size).astype(np.float32)
    tokens = SAMPLE(np.zeros((size, size), np.float32), uniforms)
    np.testing.assert_array_equal(tokens, np.arange(size))


def test_sample_token_shapes():
    logits = random_logits(6, shape=(2, 3, V))
    uniforms = jax.random.uniform(jax.random.key(1), (2, 3))
    eager, jitted = sample_token(jnp.asarray(logits), uniforms), SAMPLE(logits, uniforms)
    chex.assert_shape([eager, jitted], (2, 3))
    chex.assert_trees_all_equal(eager, jitted)
    for i in range(2):
        for j in range(3):
            assert int(SAMPLE(logits[i, j], uniforms[i, j])) == int(jitted[i, j])
