"""Ratios, weights and the loss that is made of them; the surrogates have a module of their own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.objective.kl import KL_ESTIMATORS, kl_exact, kl_k1
from grpo_jax.objective.losses import RATIO_LEVELS as LEVELS
from grpo_jax.objective.losses import REDUCTIONS, grpo_loss, log_ratios, loss_weights
from grpo_jax.objective.surrogates import clipped_surrogate, gmpo_surrogate, reinforce_surrogate

B, T = 8, 6
CLIP = {"clip_range": 0.2, "clip_range_high": 0.28, "delta": 1.6, "dual_clip": 1.4}
KL_COEF = 0.04


def loss_of(log_probs, old, advantages, mask, weights, ref, clip, kl_coef, *, level="token", estimator="k3"):
    return grpo_loss(
        log_probs,
        old,
        advantages,
        mask,
        weights,
        ref_log_probs=ref,
        ratio_level=level,
        surrogate=functools.partial(clipped_surrogate, **clip),
        kl_estimator=KL_ESTIMATORS[estimator],
        kl_coef=kl_coef,
    )


value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
JITTED = jax.jit(value_and_grad, static_argnames=("level", "estimator"))


def make_batch(seed, *, empty_rows=True, spread=0.4):
    """Random right-padded rows of every length (0 too), as float32 NumPy arrays."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0 if empty_rows else 1, T + 1, B)
    log_probs = -rng.exponential(1.0, (B, T)) - 0.1
    batch = {
        "log_probs": log_probs,
        "old": log_probs + spread * rng.standard_normal((B, T)),
        "advantages": np.where(rng.random(B) < 0.2, 0, rng.standard_normal(B)),
        "ref": log_probs + 0.7 * rng.standard_normal((B, T)),
    }
    batch = {name: value.astype(np.float32) for name, value in batch.items()}
    return {**batch, "mask": np.arange(T) < lengths[:, None]}


def run(batch, *, weights=None, clip=CLIP, kl_coef=KL_COEF, function=JITTED, **choices):
    weights = loss_weights(batch["mask"]) if weights is None else weights
    data = (batch["log_probs"], batch["old"], batch["advantages"], batch["mask"], weights, batch["ref"])
    (loss, metrics), gradient = function(*data, clip, kl_coef, **choices)
    return float(loss), np.asarray(gradient), metrics


# ------------------------------------------------------------------------------------ literal loops
@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from(tuple(LEVELS)),
    st.sampled_from(["k1", "k2", "k3"]),
    st.sampled_from(tuple(REDUCTIONS)),
)
def test_matches_the_loop(seed, level, estimator, reduction):
    batch = make_batch(seed)
    weights = loss_weights(batch["mask"], reduction=reduction, max_length=9)
    if batch["mask"].any():
        np.testing.assert_allclose(
            weights, oracle.weights(batch["mask"], reduction=reduction, max_length=9), rtol=1e-6
        )
    loss, gradient, metrics = run(batch, weights=weights, level=level, estimator=estimator)
    expected_loss, expected_gradient, expected_metrics = oracle.loss(
        **{name: batch[name] for name in ("log_probs", "advantages", "mask", "ref")},
        old_log_probs=batch["old"],
        weights=weights,
        level=level,
        estimator=estimator,
        kl_coef=KL_COEF,
        **CLIP,
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(getattr(metrics, name), value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("level", LEVELS)
def test_eager_is_jitted(level):
    batch = make_batch(3)
    eager, jitted = run(batch, level=level, function=value_and_grad), run(batch, level=level)
    chex.assert_trees_all_close(eager, jitted, rtol=1e-6, atol=1e-7)


def test_log_ratios_by_level():
    log_probs = jnp.array([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
    old = jnp.array([[-1.5, -2.0, -1.0], [-1.0, -3.0, 9.0]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0]], bool)
    np.testing.assert_allclose(log_ratios(log_probs, old, mask), [[0.5, 0, -2], [0, 2, 0]])
    for level in ("sequence", "sequence_token"):
        np.testing.assert_allclose(log_ratios(log_probs, old, mask, level=level), [[-0.5] * 3, [1, 1, 0]])

    def row_sums(level):
        return jax.jacobian(lambda x: log_ratios(x, old, mask, level=level))(log_probs)

    # sequence: every token of the row moves every value; sequence_token: each moves its own.
    np.testing.assert_allclose(row_sums("sequence")[0, :, 0, :], np.full((3, 3), 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(row_sums("sequence")[1, :, 1, :], [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]])
    np.testing.assert_allclose(row_sums("sequence_token")[1, :, 1, :], np.diag([1, 1, 0]))
    np.testing.assert_allclose(row_sums("token")[1, :, 1, :], np.diag([1, 1, 0]))
    # The old policy is data, at every level.
    for level in ("token", "sequence", "sequence_token"):
        by_old = jax.grad(lambda x, level=level: jnp.sum(log_ratios(log_probs, x, mask, level=level)))(old)
        assert (np.asarray(by_old) == 0).all()


# -------------------------------------------------------------------- from the logits, with everything on
V = 4
SURROGATE_CHOICES = {
    "clipped": (clipped_surrogate, CLIP),
    "gmpo": (gmpo_surrogate, {"log_clip_range": 0.4}),
    "reinforce": (reinforce_surrogate, {}),
}


def loss_of_logits(logits, ref_logits, tokens, batch, weights, numbers, *, level, name, estimator):
    """As the learner does: log-probs, entropies and exact KLs of distributions, and what is made of them."""

    def loss(logits):
        log_probs, ref_log_probs = (
            jnp.take_along_axis(jax.nn.log_softmax(x), tokens[..., None], axis=-1)[..., 0]
            for x in (logits, ref_logits)
        )
        probs = jax.nn.softmax(logits)
        surrogate, clip = SURROGATE_CHOICES[name]
        return grpo_loss(
            log_probs,
            batch["old"],
            batch["advantages"],
            batch["mask"],
            weights * batch["factors"],
            ref_log_probs=ref_log_probs,
            ratio_level=level,
            surrogate=functools.partial(surrogate, **clip),
            kl_estimator=KL_ESTIMATORS.get(estimator.removeprefix("ratio_")),
            kl_ratio_corrected=estimator.startswith("ratio_"),
            kls=kl_exact(logits, ref_logits) if estimator == "exact" else None,
            entropies=-jnp.sum(probs * jax.nn.log_softmax(logits), axis=-1),
            penalty_weights=weights,
            **numbers,
        )

    return jax.value_and_grad(loss, has_aux=True)(logits)


jitted_loss_of_logits = jax.jit(loss_of_logits, static_argnames=("level", "name", "estimator"))


@pytest.mark.parametrize("estimator", ["exact", "k2"])
@pytest.mark.parametrize(
    ("name", "level"),
    [("clipped", "token"), ("clipped", "sequence"), ("gmpo", "token"), ("reinforce", "sequence_token")],
)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.3]))
def test_from_the_logits_it_is_the_loop(name, level, estimator, seed, kl_coef, entropy_coef):
    rng = np.random.default_rng(seed)
    batch = {**make_batch(seed), "factors": rng.choice([0.0, 1.0, 1.5], (B, T))}
    batch["advantages"] = batch["advantages"].astype(np.float64)
    logits, ref_logits = 2 * rng.standard_normal((2, B, T, V))
    tokens = rng.integers(0, V, (B, T))
    batch["old"] = oracle_log_probs(logits, tokens) + 0.4 * rng.standard_normal((B, T))
    numbers = {"kl_coef": kl_coef, "entropy_coef": entropy_coef, "max_staleness": 0.1}
    weights = oracle.weights(batch["mask"], reduction="sequence")
    expected_loss, expected_gradient, expected_metrics = oracle.loss_of_logits(
        logits,
        ref_logits,
        tokens,
        batch["old"],
        batch["advantages"],
        batch["mask"],
        weights * batch["factors"],
        level=level,
        name=name,
        estimator=estimator,
        penalty_weights=weights,
        **numbers,
        **SURROGATE_CHOICES[name][1],
    )
    choices = {"level": level, "name": name, "estimator": estimator}
    with jax.enable_x64(True):
        data = jax.tree.map(jnp.asarray, (logits, ref_logits, tokens, batch, weights, numbers))
        (loss, metrics), gradient = jitted_loss_of_logits(*data, **choices)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-11, atol=1e-13)
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(getattr(metrics, key), value, rtol=1e-12, atol=1e-14, err_msg=key)


def oracle_log_probs(logits, tokens):
    return np.array(
        [
            [oracle.token_log_prob(list(z), token)[0] for z, token in zip(*row, strict=True)]
            for row in zip(logits, tokens, strict=True)
        ]
    )


# -------------------------------------------------------------------------------- penalties, one by one
def penalty_of(batch, name, values, coefficient, **settings):
    """The loss of a batch without advantages, as a function of kls or entropies [B,T]."""
    weights = loss_weights(batch["mask"])

    def loss(values):
        data = (batch["log_probs"], batch["old"], np.zeros(B, np.float32), batch["mask"], weights)
        coefficients = {"kls": "kl_coef", "entropies": "entropy_coef"}
        return grpo_loss(*data, **{name: values, coefficients[name]: coefficient}, **settings)[0]

    return jax.value_and_grad(loss)(values)


@pytest.mark.parametrize(("name", "sign"), [("kls", 1), ("entropies", -1)])
def test_exact_kls_raise_the_loss_and_entropies_lower_it(name, sign):
    batch, values = make_batch(16), np.random.default_rng(0).uniform(0, 2, (B, T)).astype(np.float32)
    mask, weights = batch["mask"], np.asarray(loss_weights(batch["mask"]))
    value, gradient = penalty_of(batch, name, values, 0.5)
    np.testing.assert_allclose(value, sign * 0.5 * np.sum(weights[mask] * values[mask]), rtol=1e-5)
    np.testing.assert_allclose(gradient, sign * 0.5 * weights, rtol=1e-6)
    # Weights of their own, and nothing from what stands at masked positions.
    other = np.where(mask, 3.0, 0.0).astype(np.float32)
    dirty = np.where(mask, values, np.float32(np.nan))
    value, gradient = penalty_of(batch, name, dirty, 0.5, penalty_weights=other)
    np.testing.assert_allclose(value, sign * 1.5 * np.sum(values[mask]), rtol=1e-5)
    np.testing.assert_allclose(gradient, sign * 0.5 * other, rtol=1e-6)


def test_penalty_weights_leave_the_policy_term_alone():
    batch = make_batch(17)
    weights = loss_weights(batch["mask"])
    data = [batch[name] for name in ("log_probs", "old", "advantages", "mask")]
    whole, metrics = grpo_loss(*data, weights, ref_log_probs=batch["ref"], kl_coef=0.5)
    same, _ = grpo_loss(*data, weights, ref_log_probs=batch["ref"], kl_coef=0.5, penalty_weights=weights)
    assert same == whole
    only_kl, no_policy = grpo_loss(
        *data, 0 * weights, ref_log_probs=batch["ref"], kl_coef=0.5, penalty_weights=weights
    )
    assert no_policy.policy_loss == 0 and no_policy.kl == metrics.kl
    np.testing.assert_allclose(only_kl + metrics.policy_loss, whole, rtol=1e-5)
    no_kl, _ = grpo_loss(*data, weights, ref_log_probs=batch["ref"], kl_coef=0.5, penalty_weights=0 * weights)
    np.testing.assert_allclose(no_kl, metrics.policy_loss, rtol=1e-6)


def test_stale_sequences_do_not_train_the_policy():
    """Rows whose mean log-prob fell by 0.4, 0.2 and -0.4, each with both signs of the advantage."""
    mask = np.arange(3) < np.array([3, 3, 2, 2, 1, 1, 0])[:, None]
    fallen = np.array([0.4, 0.4, 0.2, 0.2, -0.4, -0.4, 9.0], np.float32)
    advantages = np.array([-1, 1, -1, 1, -1, 1, -1], np.float32)
    log_probs = np.full((7, 3), -1.0, np.float32)
    # The mean decides, not the single token; and masked positions take no part.
    old = np.where(mask, log_probs + fallen[:, None], np.float32(1e4))
    old[0, :2] += [0.3, -0.3]
    weights = loss_weights(mask)

    def run(max_staleness, advantages=advantages):
        def loss(log_probs):
            ref = log_probs + 0.1
            data = (log_probs, old, advantages, mask, weights)
            return grpo_loss(
                *data, ref_log_probs=ref, kl_coef=1.0, kl_estimator=kl_k1, max_staleness=max_staleness
            )

        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(log_probs)
        return metrics, np.asarray(gradient) - np.asarray(weights)  # without that of k1

    off, gradient_off = run(None)
    assert off.stale == 0
    for max_staleness, dropped in [(0.3, [0]), (0.1, [0, 2]), (0.5, []), (float("inf"), [])]:
        metrics, gradient = run(max_staleness)
        expected = gradient_off.copy()
        expected[dropped] = 0
        np.testing.assert_allclose(gradient, expected, atol=1e-7)  # the KL term of a stale row stays
        np.testing.assert_allclose(metrics.stale, mask[dropped].sum() / mask.sum())
        assert (
            metrics.num_tokens == mask.sum() and metrics.kl == off.kl and metrics.ratio_mean == off.ratio_mean
        )
    assert run(0.1, advantages=np.abs(advantages))[0].stale == 0
    assert run(0.1, advantages=0 * advantages)[0].stale == 0


# -------------------------------------------------------------------------------------- inert padding
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e4, -1e4])
@pytest.mark.parametrize("level", LEVELS)
def test_masked_tokens_are_inert(level, junk):
    batch = make_batch(1)
    assert not batch["mask"].all() and not batch["mask"].any(axis=1).all()
    for estimator in KL_ESTIMATORS:
        clean = run(batch, level=level, estimator=estimator)
        assert np.isfinite(clean[1]).all() and (clean[1][~batch["mask"]] == 0).all()
        for name in ("log_probs", "old", "ref", ("log_probs", "old", "ref")):
            names = (name,) if isinstance(name, str) else name
            dirty = {n: np.where(batch["mask"], batch[n], np.float32(junk)) for n in names}
            chex.assert_trees_all_equal(run({**batch, **dirty}, level=level, estimator=estimator), clean)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_rows_and_columns_are_inert(reduction):
    batch = make_batch(2)
    weights = loss_weights(batch["mask"], reduction=reduction, max_length=T)
    loss, gradient, metrics = run(batch, weights=weights)
    pad = ((0, 3), (0, 2))
    padded = {n: np.pad(x, pad[: x.ndim], constant_values=np.nan) for n, x in batch.items() if n != "mask"}
    padded["mask"] = np.pad(batch["mask"], pad)
    padded_weights = loss_weights(padded["mask"], reduction=reduction, max_length=T, num_sequences=B)
    np.testing.assert_allclose(padded_weights[:B, :T], weights, rtol=1e-6)
    assert (np.asarray(padded_weights)[~padded["mask"]] == 0).all()
    padded_loss, padded_gradient, padded_metrics = run(padded, weights=padded_weights)
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(padded_gradient[:B, :T], gradient, rtol=1e-6, atol=1e-9)
    assert (padded_gradient[B:] == 0).all() and (padded_gradient[:, T:] == 0).all()
    chex.assert_trees_all_close(padded_metrics, metrics, rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_row_order_does_not_matter(level, reduction):
    batch = make_batch(4)
    order = np.random.default_rng(0).permutation(B)
    loss, gradient, metrics = run(
        batch, level=level, weights=loss_weights(batch["mask"], reduction=reduction)
    )
    shuffled = {name: value[order] for name, value in batch.items()}
    result = run(shuffled, level=level, weights=loss_weights(shuffled["mask"], reduction=reduction))
    np.testing.assert_allclose(result[0], loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result[1], gradient[order], rtol=1e-6, atol=1e-8)
    chex.assert_trees_all_close(result[2], metrics, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_all_masked_batch(level):
    batch = make_batch(5)
    batch = {**batch, "mask": np.zeros((B, T), bool), "log_probs": np.full((B, T), np.nan, np.float32)}
    for reduction in REDUCTIONS:
        weights = loss_weights(batch["mask"], reduction=reduction)
        assert (np.asarray(weights) == 0).all()
        loss, gradient, metrics = run(batch, weights=weights, level=level)
        assert loss == 0 and (gradient == 0).all()
        chex.assert_trees_all_equal(metrics, jax.tree.map(jnp.zeros_like, metrics))


# --------------------------------------------------------------------------------- slices of the batch
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("num_slices", [1, 2, 4, 8])
def test_slices_add_up_to_the_whole(num_slices, reduction):
    batch = make_batch(6)
    weights = np.asarray(loss_weights(batch["mask"], reduction=reduction))
    loss, gradient, metrics = run(batch, weights=weights)
    parts = []
    for rows in np.split(np.arange(B), num_slices):
        parts.append(run({name: value[rows] for name, value in batch.items()}, weights=weights[rows]))
    np.testing.assert_allclose(sum(part[0] for part in parts), loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        sum(part[2].policy_loss for part in parts), metrics.policy_loss, rtol=1e-6, atol=1e-6
    )
    assert sum(int(part[2].num_tokens) for part in parts) == metrics.num_tokens


# ------------------------------------------------------------------------------- on and off the policy
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_policy_gradient_is_reinforce(reduction):
    batch = make_batch(7)
    batch["old"] = batch["log_probs"]
    weights = np.asarray(loss_weights(batch["mask"], reduction=reduction))
    expected = np.where(batch["mask"], -weights * batch["advantages"][:, None], 0)
    for level in ("token", "sequence_token"):
        gradient = run(batch, weights=weights, kl_coef=0.0, level=level)[1]
        np.testing.assert_array_equal(gradient, expected)
    # The sequence level spreads a row's weight evenly; with the weights of `sequence` that is the same.
    gradient = run(batch, weights=weights, kl_coef=0.0, level="sequence")[1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)
    metrics = run(batch, weights=weights, level="token")[2]
    assert metrics.ratio_mean == metrics.ratio_max == 1 and metrics.clip_low == metrics.clip_high == 0


@pytest.mark.parametrize("level", LEVELS)
def test_gradient_outside_the_clip_is_exactly_zero(level):
    clip = {"clip_range": 0.2, "clip_range_high": 0.28}
    for log_ratio, sign, cut in [(0.3, 1, True), (0.3, -1, False), (-0.3, -1, True), (-0.3, 1, False)]:
        old = np.full((B, T), -1.0, np.float32)
        batch = {**make_batch(8, empty_rows=False), "old": old, "log_probs": old + np.float32(log_ratio)}
        batch["advantages"] = np.full(B, sign, np.float32)
        _, gradient, metrics = run(batch, clip=clip, kl_coef=0.0, level=level)
        assert (gradient[batch["mask"]] == 0).all() == cut
        assert (gradient[batch["mask"]] != 0).all() != cut
        assert metrics.clip_high == float(cut and log_ratio > 0)
        assert metrics.clip_low == float(cut and log_ratio < 0)


@pytest.mark.parametrize("level", LEVELS)
def test_dead_groups_give_exactly_zero_gradient(level):
    batch = {**make_batch(9), "advantages": np.zeros(B, np.float32)}
    for ref in (batch["ref"], None):
        loss, gradient, metrics = run({**batch, "ref": ref}, kl_coef=0.0, level=level)
        assert loss == 0 and (gradient == 0).all()
        assert metrics.clip_low == metrics.clip_high == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_runaway_tokens_stay_finite(level, sign):
    batch = make_batch(10, empty_rows=False)
    for name in ("log_probs", "old", "ref"):
        for value in (1e4, -1e4):
            wild = batch[name].copy()
            wild[:, 0] = value
            changed = {**batch, name: wild, "advantages": np.full(B, sign, np.float32)}
            for clip in (CLIP, {"clip_range": 0.2}):
                for estimator in KL_ESTIMATORS:
                    loss, gradient, metrics = run(changed, level=level, clip=clip, estimator=estimator)
                    assert np.isfinite(loss) and np.isfinite(gradient).all()
                    chex.assert_tree_all_finite(jax.tree.leaves(metrics))


@pytest.mark.parametrize("level", LEVELS)
def test_no_gradient_into_the_data(level):
    batch = make_batch(11)

    def loss(old, advantages, weights, ref, penalty_weights):
        return grpo_loss(
            batch["log_probs"],
            old,
            advantages,
            batch["mask"],
            weights,
            ref_log_probs=ref,
            ratio_level=level,
            kl_coef=KL_COEF,
            kl_ratio_corrected=True,
            penalty_weights=penalty_weights,
            max_staleness=0.1,
        )[0]

    weights = loss_weights(batch["mask"])
    data = (batch["old"], batch["advantages"], weights, batch["ref"], weights)
    chex.assert_trees_all_equal(jax.grad(loss, argnums=range(5))(*data), jax.tree.map(jnp.zeros_like, data))


def test_kl_term():
    batch = make_batch(12)
    without, with_kl, no_ref = run(batch, kl_coef=0.0), run(batch, kl_coef=0.5), run({**batch, "ref": None})
    np.testing.assert_allclose(without[0], no_ref[0], rtol=1e-6)
    np.testing.assert_allclose(without[1], no_ref[1], rtol=1e-6)
    assert with_kl[2].kl == without[2].kl > 0 and no_ref[2].kl == 0  # measured even where it is not used
    assert with_kl[0] > without[0]
    assert with_kl[2].policy_loss == without[2].policy_loss == without[0]


# ------------------------------------------------------------------------------------------- contracts
def test_clip_settings_do_not_compile_again():
    function = jax.jit(jax.value_and_grad(chex.assert_max_traces(loss_of, n=1), has_aux=True))
    batch = make_batch(13)
    settings = [({"clip_range": clip_range}, kl_coef) for clip_range in (0.01, 0.3) for kl_coef in (0.0, 1.0)]
    losses = {run(batch, function=function, clip=clip, kl_coef=kl_coef)[0] for clip, kl_coef in settings}
    assert len(losses) == 4


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights(reduction):
    mask = make_batch(14)["mask"]
    for kwargs in ({}, {"max_length": 11}, {"num_sequences": 5}):
        eager = loss_weights(mask, reduction=reduction, **kwargs)
        jitted = jax.jit(functools.partial(loss_weights, reduction=reduction, **kwargs))(mask)
        chex.assert_shape([eager, jitted], (B, T))
        assert eager.dtype == jnp.float32
        np.testing.assert_allclose(eager, oracle.weights(mask, reduction=reduction, **kwargs), rtol=1e-6)
        np.testing.assert_allclose(eager, jitted, rtol=1e-6)
    alive = mask.any(axis=1).sum()
    total = {
        "sequence": alive / B,
        "token": 1.0,
        "constant": mask.sum() / (B * T),
        "sequence_sum": mask.sum() / B,
        "local_token": 1.0,
    }[reduction]
    np.testing.assert_allclose(loss_weights(mask, reduction=reduction).sum(), total, rtol=1e-6)


def test_local_weights_depend_on_the_slices_and_no_others_do():
    mask = make_batch(14)["mask"].copy()
    mask[2:4] = False  # an empty slice of two rows: it counts as one of the M, and gives 0
    for num_microbatches in (1, 2, 4, 8):
        settings = {"num_microbatches": num_microbatches}
        for reduction in REDUCTIONS:
            weights = loss_weights(mask, reduction=reduction, **settings)
            np.testing.assert_allclose(
                weights, oracle.weights(mask, reduction=reduction, **settings), rtol=1e-6
            )
            same = (weights == loss_weights(mask, reduction=reduction)).all()
            assert same == (reduction != "local_token" or num_microbatches == 1)
        slices = np.asarray(loss_weights(mask, reduction="local_token", **settings)).reshape(
            num_microbatches, -1
        )
        alive = mask.reshape(num_microbatches, -1).any(axis=1)
        np.testing.assert_allclose(slices.sum(axis=1), alive / num_microbatches, rtol=1e-6)


def test_bfloat16_log_probs_give_a_float32_loss():
    batch = make_batch(15)
    batch = {**batch, "log_probs": jnp.asarray(batch["log_probs"], jnp.bfloat16)}
    weights = loss_weights(batch["mask"])
    (loss, _), _ = JITTED(
        *(batch[n] for n in ("log_probs", "old", "advantages", "mask")), weights, None, CLIP, 0.1
    )
    assert loss.dtype == jnp.float32 and loss.shape == ()


@pytest.mark.usefixtures("no_shape_checks")
def test_errors():
    ones = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="'row'; choose one of token, sequence, sequence_token"):
        log_ratios(ones, ones, ones, level="row")
    with pytest.raises(ValueError, match="'mean'; choose one of sequence, token"):
        loss_weights(ones, reduction="mean")
    with pytest.raises(ValueError, match="2 rows do not divide into 4 micro-batches"):
        loss_weights(ones, reduction="local_token", num_microbatches=4)
    with pytest.raises(AssertionError):
        grpo_loss(ones, ones, jnp.ones(2), ones, ones, kls=ones[:1])
    with pytest.raises(AssertionError):
        grpo_loss(ones, ones, jnp.ones(2), ones, ones, entropies=ones[:1])
    with pytest.raises(AssertionError):
        grpo_loss(ones, ones, jnp.ones(3), ones, ones)  # advantages of three rows
    with pytest.raises(AssertionError):
        grpo_loss(ones, ones[:1], jnp.ones(2), ones, ones)
    with pytest.raises(AssertionError):
        grpo_loss(ones, ones, jnp.ones(2), ones, ones, ref_log_probs=ones[:, :2])
    with pytest.raises(AssertionError):
        log_ratios(ones[0], ones[0], ones[0])


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("jitted", [False, True])
def test_arguments_of_another_kind_are_named(jitted):
    ones = jnp.ones((2, 3))
    mask = ones > 0
    good = {
        "log_probs": ones,
        "old_log_probs": ones,
        "advantages": jnp.ones(2),
        "mask": mask,
        "weights": ones,
    }

    def call(**changed):
        function = jax.jit(grpo_loss) if jitted else grpo_loss
        return function(**{**good, **changed})

    assert call()[1].num_tokens == 6
    with pytest.raises(ValueError, match=r"^mask: its dtype is float32; give a bool \[B,T\]") as swapped:
        call(mask=ones, weights=mask)
    assert "\n" not in str(swapped.value)
    with pytest.raises(ValueError, match=r"^mask: its dtype is int32; .* such as mask != 0"):
        call(mask=mask.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"^weights: their dtype is bool; give floats .* loss_weights"):
        call(weights=mask)
    with pytest.raises(ValueError, match=r"^penalty_weights: their dtype is bool"):
        call(penalty_weights=mask)
    with pytest.raises(ValueError, match=r"^at_reference: its dtype is float32"):
        call(at_reference=ones)


@pytest.mark.usefixtures("no_shape_checks")
def test_shapes_that_differ_are_named_with_both():
    ones = jnp.ones((2, 3))
    good = {"log_probs": ones, "old_log_probs": ones, "advantages": ones[:, 0], "mask": ones > 0}
    good["weights"] = ones
    names = ["old_log_probs", "mask", "weights", "ref_log_probs", "kls", "entropies", "penalty_weights"]
    for name in names:
        wrong = (good.get(name, ones))[:, :2]
        with pytest.raises(AssertionError, match=rf"\(2, 2\).*\(2, 3\).*{name} \[B,T\]") as caught:
            grpo_loss(**{**good, name: wrong})
        assert "\n" not in str(caught.value)
    with pytest.raises(AssertionError, match=r"\(2, 1\) but expected \(2\).*advantages \[B\]"):
        grpo_loss(**{**good, "advantages": ones[:, :1]})
    with pytest.raises(AssertionError, match=r"shape \(3,\).*log_probs \[B,T\]"):
        log_ratios(ones[0], ones[0], ones[0] > 0)


def test_a_kl_term_needs_a_reference():
    ones = jnp.ones((2, 3))
    data = (ones, ones, jnp.ones(2), ones > 0, ones)
    for kl_coef in (0.04, np.float32(0.04), jnp.float32(0.04)):
        with pytest.raises(ValueError, match=r"^kl_coef=0.04 needs a reference: give ref_log_probs \[B,T\]"):
            grpo_loss(*data, kl_coef=kl_coef)
    grpo_loss(*data, kl_coef=0.0)
    assert grpo_loss(*data, kl_coef=0.04, kls=ones)[1].kl == 1
    assert jax.jit(lambda kl_coef: grpo_loss(*data, kl_coef=kl_coef))(0.04)[1].kl == 0  # its value is unknown
