"""From judged completions to an Experience: rewards, advantages and weights by value."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective.advantages import ADVANTAGES, MISSING
from grpo_jax.objective.losses import REDUCTIONS, loss_weights
from grpo_jax.objective.recipes import RECIPES, grpo, make_recipe
from grpo_jax.objective.shaping import importance_weights, top_entropy_mask
from grpo_jax.training.experience import add_up_rewards, combine, make_experience
from grpo_jax.types import Judged, Rollout, Totals

N, G, S, T = 6, 4, 3, 5
B = N * G
WEIGHTS = [1.0, 0.5, -2.0]
LENGTHS = np.array([5, 2, 3, 1, 4, 5, 2, 5] * 3)
MASK = np.arange(T) < LENGTHS[:, None]
FINISHED = (LENGTHS < T) | (np.arange(B) % 3 == 0)  # an eos may be the last token there is room for


def test_combine_is_the_weighted_sum_over_what_is_there():
    nan = np.nan
    scores = np.array([[1, 2], [nan, 2], [1, nan], [nan, nan], [0, 0]], np.float32)
    rewards, valid = combine(scores, [1.0, 0.5], missing="skip")
    assert rewards.dtype == np.float32 and valid.dtype == bool
    np.testing.assert_array_equal(rewards, np.array([2, 1, 1, 0, 0], np.float32))
    np.testing.assert_array_equal(valid, [True, True, True, False, True])


def test_combine_against_a_loop():
    rng = np.random.default_rng(0)
    scores, weights = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=5)
    scores[rng.random((40, 5)) < 0.4] = np.nan
    rewards, valid = combine(scores, weights, missing="skip")
    for row, total, ok in zip(scores, rewards, valid, strict=True):
        there = [(s, w) for s, w in zip(row, weights, strict=True) if s == s]
        assert ok == bool(there)
        assert total == pytest.approx(sum(float(s) * w for s, w in there), abs=1e-5)


def test_equal_scores_give_exactly_equal_rewards():
    rewards, _ = combine(np.tile(np.float32([0.35, 0.95, 0.1]), (101, 1)), [0.3, 0.7, 1 / 3])
    assert len(set(rewards.tolist())) == 1


def test_combine_checks_its_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\), weights are 2"):
        combine(np.zeros((2, 3)), [1, 1])


# The helpers of what follows: judged completions, and the objective's loops in float64


def make_judged(scores=None, *, seed=0) -> Judged:
    """Returns N groups of random numbers; what stands at masked positions would be noticed."""
    rng = np.random.default_rng(seed)
    log_probs = np.where(MASK, -rng.exponential(1.0, (B, T)), 99).astype(np.float32)
    noise = rng.normal(size=(2, B, T)).astype(np.float32)
    return Judged(
        rollout=Rollout(
            prompt_tokens=rng.integers(0, 9, (B, S)).astype(np.int32),
            prompt_mask=np.arange(S) >= rng.integers(0, S, (B, 1)),
            tokens=rng.integers(0, 9, (B, T)).astype(np.int32),
            mask=MASK,
            log_probs=log_probs + 0.3 * noise[0],
            kept_mass=np.ones((B, T), np.float32),
            finished=FINISHED,
        ),
        old_log_probs=log_probs,
        entropies=rng.random((B, T)).astype(np.float32),
        ref_log_probs=log_probs + 0.5 * noise[1],
        scores=random_scores(rng) if scores is None else np.asarray(scores, np.float32),
    )


def random_scores(rng, share=0.0) -> np.ndarray:
    """Returns scores [B,3] with some grades in common, group 2 all equal, a share of them missing."""
    scores = rng.integers(0, 3, (B, 3)) / np.float32(2)
    scores[rng.random((B, 3)) < share] = np.nan
    scores[2 * G : 3 * G] = 0.5
    return scores.astype(np.float32)


def take(tree, rows: slice):
    return jax.tree.map(lambda x: x[rows], tree)


def totals_of(judged, recipe, *, reward_weights=WEIGHTS, max_length=T, group_size=G) -> Totals:
    return add_up_rewards(
        judged.scores,
        np.sum(judged.rollout.mask, axis=1),
        judged.rollout.finished,
        recipe,
        reward_weights=reward_weights,
        max_length=max_length,
        group_size=group_size,
    )


def rewards_of(judged, recipe, **changes):
    totals = totals_of(judged, recipe, **changes)
    return totals.rewards, totals.valid


def experience(judged, recipe, **changes):
    """Returns the Experience of completions, whose rewards it adds up before."""
    settings = {"reward_weights": WEIGHTS, "group_size": G, "prompt_length": S, "max_length": T} | changes
    names = ("reward_weights", "group_size", "max_length")
    totals = totals_of(judged, recipe, **{name: settings[name] for name in names})
    return make_experience(judged.replace(totals=totals), recipe, **settings)


def signal_of(judged, recipe, weights=WEIGHTS, group_size=G):
    """Says which groups teach something, [N]."""
    signal = totals_of(judged, recipe, reward_weights=weights, group_size=group_size).signal
    assert signal.dtype == bool and len(signal) == len(judged.scores)
    groups = signal.reshape(-1, group_size)
    assert (groups == groups[:, :1]).all()
    return groups[:, 0]


def normalized(rewards, kind):
    """Advantages of N groups, each a list with None for what is missing: lists of lists."""
    there = [r for group in rewards for r in group if r is not None]
    batch_std = np.std(there, ddof=1) if len(there) > 1 else 0.0
    advantages = []
    for group in rewards:
        values = [r for r in group if r is not None]
        alive = len(set(values)) > 1
        row = []
        for i, r in enumerate(group):
            if r is None or not alive:
                row.append(0.0)
            elif kind == "leave_one_out":
                others = [o for j, o in enumerate(group) if j != i and o is not None]
                row.append(r - sum(others) / len(others))
            else:
                divisor = {"std": np.std(values, ddof=1) + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[kind]
                row.append((r - sum(values) / len(values)) / divisor)
        advantages.append(row)
    return advantages


def row_factors(scores, weights, missing, group):
    """What each function counts in one row: a list with None where it does not, or None if the row is out."""
    pairs = list(zip(scores, weights, strict=True))
    there = [s == s and w != 0 for s, w in pairs]
    applies = [w != 0 and any(row[r] == row[r] for row in group) for r, w in enumerate(weights)]
    if not any(there) or (missing == "drop" and there != applies):
        return None
    counted = sum(abs(w) for (_, w), t in zip(pairs, there, strict=True) if t)
    scale = sum(map(abs, weights)) / counted if missing == "renormalize" else 1.0
    return [w * scale if t else None for w, t in zip(weights, there, strict=True)]


def literal_advantages(scores, weights, *, missing, aggregation, kind, added, live=N, trains=None):
    """Reward functions and what is added to their sum, in loops: [B]."""
    if trains is not None:  # the others leave the group, as if they had not been sampled
        scores = np.where(trains[:, None], scores, np.nan)
    factors = [
        row_factors(row.tolist(), weights, missing, scores[i // G * G : i // G * G + G].tolist())
        if i < live * G
        else None
        for i, row in enumerate(scores)
    ]
    grouped = range(0, B, G)
    if aggregation == "sum_then_normalize":
        totals = [
            None
            if f is None
            else sum(float(s) * w for s, w in zip(row, f, strict=True) if w is not None) + extra
            for row, f, extra in zip(scores, factors, added, strict=True)
        ]
        return np.array(normalized([totals[i : i + G] for i in grouped], kind)).reshape(-1)
    total = np.zeros(B)
    for r in range(len(weights)):
        column = [None if f is None or f[r] is None else float(scores[i, r]) for i, f in enumerate(factors)]
        each = np.array(normalized([column[i : i + G] for i in grouped], kind)).reshape(-1)
        total += [0.0 if f is None or f[r] is None else a * f[r] for a, f in zip(each, factors, strict=True)]
    column = [None if f is None else float(extra) for f, extra in zip(factors, added, strict=True)]
    total += np.array(normalized([column[i : i + G] for i in grouped], kind)).reshape(-1)
    if aggregation == "gdpo":
        valid = [a for a, f in zip(total, factors, strict=True) if f is not None]
        total /= (np.std(valid, ddof=1) if len(valid) > 1 else 0.0) + 1e-4
    return total


# Rewards


def test_overlong_completions_are_punished_by_their_tokens():
    judged = make_judged()
    plain, valid = rewards_of(judged, grpo)
    np.testing.assert_array_equal(plain, judged.scores @ np.float32(WEIGHTS))
    recipe = grpo.replace(overlong_buffer=4)
    shaped, still_valid = rewards_of(judged, recipe)
    penalty = {1: 0.0, 2: -0.25, 3: -0.5, 4: -0.75, 5: -1.0}
    np.testing.assert_allclose(shaped, plain + [penalty[n] for n in LENGTHS], atol=1e-6)
    assert valid.all() and still_valid.all() and shaped.dtype == np.float32


def test_overlong_share_of_dapo():
    judged = make_judged(np.zeros((B, 3)))
    # A fifth of five tokens is one: only a completion that reaches the limit is punished.
    shaped, _ = rewards_of(judged, RECIPES["dapo"])
    np.testing.assert_array_equal(shaped, np.where(LENGTHS == 5, -1, 0))
    # Of 20 tokens it is four, and no completion is longer than the 16 before them.
    shaped, _ = rewards_of(judged, RECIPES["dapo"], max_length=20)
    np.testing.assert_array_equal(shaped, 0)


@pytest.mark.parametrize("missing", MISSING)
def test_rewards_of_rows_that_miss_some(missing):
    nan = np.nan
    scores = np.zeros((B, 3), np.float32)
    scores[:4] = [[1, 2, 3], [nan, 2, 3], [1, nan, nan], [nan, nan, nan]]
    recipe = make_recipe("grpo", missing=missing, overlong_buffer=1)
    rewards, valid = rewards_of(make_judged(scores), recipe)
    expected = {
        "skip": [1 + 1 - 6, 1 - 6, 1, 0],
        "renormalize": [1 + 1 - 6, (1 - 6) * 3.5 / 2.5, 3.5, 0],
        "drop": [1 + 1 - 6, 0, 0, 0],
    }[missing]
    # The first row alone reaches the limit; a row that is out has no penalty either.
    np.testing.assert_allclose(rewards[:4], np.array(expected) - [1, 0, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(valid[:4], [True, missing != "drop", missing != "drop", False])


def test_a_kl_in_the_reward_is_no_signal():
    judged = make_judged(np.ones((B, 3)))
    rloo = RECIPES["rloo"]
    rewards, _ = rewards_of(judged, rloo)
    np.testing.assert_array_equal(rewards, -0.5)
    assert not signal_of(judged, rloo).any()
    assert np.asarray(experience(judged, rloo).advantages).all()


def test_signal_is_a_difference_between_sums_or_within_a_function():
    nan = np.nan
    groups = [
        [[1, 0, 0], [0, 2, 0], [1, 0, 0], [0, 2, 0]],  # sums equal, functions not
        [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]],
        [[1, 1, 1]] * 4,
        [[1, 0, nan], [1, nan, nan], [nan, nan, nan], [1, 0, nan]],
        [[nan, nan, nan]] * 3 + [[1, 1, 1]],
        [[nan, 1, 0], [1, nan, 0], [nan, 1, 0], [1, nan, 0]],  # 1 and 0.5 summed, each function constant
    ]
    judged = make_judged(np.reshape(groups, (B, 3)))
    expected = {
        ("sum_then_normalize", "skip"): [0, 1, 0, 0, 0, 1],
        ("normalize_then_sum", "skip"): [1, 1, 0, 0, 0, 0],
        ("gdpo", "skip"): [1, 1, 0, 0, 0, 0],
        ("sum_then_normalize", "drop"): [0, 1, 0, 0, 0, 0],
        ("normalize_then_sum", "drop"): [1, 1, 0, 0, 0, 0],
    }
    for (aggregation, missing), signal in expected.items():
        recipe = make_recipe("grpo", aggregation=aggregation, missing=missing)
        found = signal_of(judged, recipe)
        np.testing.assert_array_equal(found, np.array(signal, bool), err_msg=f"{aggregation} {missing}")
        # Where there is none, the advantages are exactly 0; where there is, they are not.
        advantages = np.asarray(experience(judged, recipe).advantages).reshape(N, G)
        np.testing.assert_array_equal(found, (advantages != 0).any(axis=1))


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_signal_of_weights_and_of_lengths(aggregation):
    scores = np.zeros((B, 3))
    scores[:G, 1] = [0, 1, 0, 1]
    judged, recipe = make_judged(scores), make_recipe("grpo", aggregation=aggregation)
    np.testing.assert_array_equal(signal_of(judged, recipe), np.arange(N) == 0)
    assert not signal_of(judged, recipe, [1.0, 0.0, 1.0]).any()  # a function of weight 0 decides nothing
    # A punishment of long completions is one: their lengths differ in every group.
    assert signal_of(judged, recipe.replace(overlong_buffer=4)).all()


# Advantages


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum", "gdpo"])
@pytest.mark.parametrize("missing", MISSING)
def test_several_rewards_are_the_loop(missing, aggregation, kind):
    for seed, share in ((0, 0.0), (1, 0.2), (2, 0.6)):
        judged = make_judged(random_scores(np.random.default_rng(seed), share))
        for around in ({}, {"overlong_buffer": 3}):
            for live in (N, 4):
                recipe = make_recipe(
                    "grpo", missing=missing, aggregation=aggregation, advantage=kind, **around
                )
                added = np.clip((T - 3 - LENGTHS) / 3, -1, 0) if around else np.zeros(B)
                expected = literal_advantages(
                    judged.scores, WEIGHTS, missing=missing, aggregation=aggregation, kind=kind,
                    added=added, live=live,
                )  # fmt: skip
                actual = experience(judged, recipe, num_live=live).advantages
                np.testing.assert_allclose(actual, expected, atol=2e-5, err_msg=f"{seed} {around} {live}")
                assert actual.dtype == jnp.float32 and not np.any(actual[live * G :])


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum", "gdpo"])
@pytest.mark.parametrize("kl_on_dead_groups", [True, False])
def test_kl_in_the_reward(aggregation, kl_on_dead_groups):
    judged = make_judged(random_scores(np.random.default_rng(3), 0.2))
    recipe = make_recipe("rloo", aggregation=aggregation, kl_on_dead_groups=kl_on_dead_groups)
    sums = np.sum(np.where(MASK, judged.old_log_probs - judged.ref_log_probs, 0), axis=1, dtype=np.float64)
    signal = np.repeat(signal_of(judged, recipe), G)
    assert not signal[2 * G] and signal.any()
    expected = literal_advantages(
        judged.scores,
        WEIGHTS,
        missing="drop",
        aggregation=aggregation,
        kind="leave_one_out",
        added=-0.03 * sums * (signal | kl_on_dead_groups),
    )
    actual = experience(judged, recipe).advantages
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    assert np.any(actual[2 * G : 3 * G]) == kl_on_dead_groups
    # A coefficient that moved during the run is the one that counts.
    other = experience(judged, recipe.replace(kl_coef=0.3)).advantages
    assert np.abs(other - actual).max() > 0.05


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum", "gdpo"])
@pytest.mark.parametrize("kind", ["std", "batch"])
def test_dropped_rows_take_no_part_in_the_statistics(aggregation, kind):
    scores = random_scores(np.random.default_rng(4))
    scores[1::5, 2] = np.nan
    other = scores.copy()
    other[1::5, :2] += 7
    recipe = make_recipe("grpo", missing="drop", aggregation=aggregation, advantage=kind)
    kept, changed = (experience(make_judged(x), recipe).advantages for x in (scores, other))
    np.testing.assert_array_equal(kept, changed)
    assert not np.any(kept[1::5]) and np.any(kept)


# Weights


@pytest.mark.parametrize("num_minibatches", [1, 2, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_are_those_of_each_mini_batch(reduction, num_minibatches):
    recipe = make_recipe("grpo", reduction=reduction)
    settings = {"num_minibatches": num_minibatches, "num_microbatches": 2, "max_length": 7}
    e = experience(make_judged(), recipe, **settings)
    expected = [
        loss_weights(part, reduction=reduction, max_length=7, num_microbatches=2)
        for part in np.split(MASK, num_minibatches)
    ]
    np.testing.assert_array_equal(e.weights, np.concatenate(expected))
    assert e.penalty_weights is None and e.weights.dtype == jnp.float32
    np.testing.assert_array_equal(e.mask, MASK)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_that_fill_the_shape_are_masked_and_not_counted(reduction):
    recipe = make_recipe("grpo", reduction=reduction, advantage="batch")
    judged, live = make_judged(), 4 * G
    e = experience(judged, recipe, num_live=4)
    expected = loss_weights(MASK[:live], reduction=reduction, max_length=T)
    np.testing.assert_array_equal(e.weights[:live], expected)
    np.testing.assert_array_equal(e.mask[:live], MASK[:live])
    for filled in (e.weights, e.mask, e.advantages):
        assert not np.any(filled[live:])
    # As if the batch had only ever had four groups.
    alone = experience(take(judged, slice(live)), recipe)
    chex.assert_trees_all_equal(take(e, slice(live)), alone)


@pytest.mark.parametrize(("num_live", "counts"), [(6, [12, 12]), (4, [12, 4]), (3, [12, 0]), (0, [0, 0])])
def test_every_mini_batch_counts_its_own_live_rows(num_live, counts):
    e = experience(make_judged(), grpo, num_live=num_live, num_minibatches=2)
    for part, count in zip(np.split(np.asarray(e.weights), 2), counts, strict=True):
        # Each live sequence has the weight 1 / B in all.
        np.testing.assert_allclose(
            part.sum(axis=1), np.where(np.arange(12) < count, 1 / max(count, 1), 0), rtol=1e-6
        )
    assert np.all(np.isfinite(e.weights)) and np.all(np.isfinite(e.advantages))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_truncated_completions_weigh_nothing(reduction):
    judged, recipe = make_judged(), make_recipe("grpo", reduction=reduction, mask_truncated=True)
    e = experience(judged, recipe)
    np.testing.assert_array_equal(
        e.weights, loss_weights(MASK & FINISHED[:, None], reduction=reduction, max_length=T)
    )
    assert 0 < (~FINISHED).sum() < (LENGTHS == T).sum()  # the sampler's word counts, not the length
    assert not np.any(e.weights[~FINISHED])
    np.testing.assert_array_equal(e.mask, MASK)  # they are still measured
    assert not np.any(e.advantages[~FINISHED])


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum", "gdpo"])
@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("kind", ADVANTAGES)
def test_truncated_completions_leave_the_statistics_of_their_group(kind, missing, aggregation):
    judged = make_judged(random_scores(np.random.default_rng(5), 0.2))
    recipe = make_recipe(
        "grpo", mask_truncated=True, advantage=kind, missing=missing, aggregation=aggregation
    )
    expected = literal_advantages(
        judged.scores, WEIGHTS, missing=missing, aggregation=aggregation, kind=kind, added=np.zeros(B),
        trains=FINISHED,
    )  # fmt: skip
    actual = experience(judged, recipe).advantages
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    signal = signal_of(judged, recipe)
    np.testing.assert_array_equal(signal, (expected.reshape(N, G) != 0).any(axis=1))
    # Whatever a truncated completion was given, its siblings do not feel it.
    other = judged.replace(scores=np.where(FINISHED[:, None], judged.scores, np.float32(100)))
    np.testing.assert_array_equal(experience(other, recipe).advantages, actual)
    np.testing.assert_array_equal(signal_of(other, recipe), signal)


def one_group(scores, lengths) -> Judged:
    """Returns one group of 4 completions; those of T tokens are truncated."""
    judged, lengths = take(make_judged(), slice(4)), np.array(lengths)
    rollout = judged.rollout.replace(mask=np.arange(T) < lengths[:, None], finished=lengths < T)
    return judged.replace(scores=np.array(scores, np.float32), rollout=rollout)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "dapo"])
def test_a_masked_outlier_kills_no_baseline(name):
    # 1, 1, 1 beside a masked 100: there is nothing to learn.
    recipe = make_recipe(name, mask_truncated=True, overlong_buffer=0, kl_coef=0.0)
    judged = one_group([[100], [1], [1], [1]], [T, 2, 2, 2])
    assert not signal_of(judged, recipe, [1.0]).any()
    e = experience(judged, recipe, reward_weights=[1.0])
    np.testing.assert_array_equal(e.advantages, 0)


# Missing rewards


def test_a_missing_reward_has_no_influence_by_default():
    nan = np.nan
    weights = [1.0, 1.0]

    def advantages(scores, **choices):
        judged = one_group(scores, [2, 2, 2, 2])
        recipe = make_recipe("grpo", kl_coef=0.0, **choices)
        return experience(judged, recipe, reward_weights=weights).advantages

    # The first lacks what its siblings got, such as a row lost to a timeout: it is out, not punished.
    lost = advantages([[1, nan], [1, 1], [1, 0], [1, 1]])
    np.testing.assert_allclose(lost, [0, 0.577, -1.155, 0.577], atol=1e-3)
    np.testing.assert_array_equal(lost, advantages([[nan, nan], [1, 1], [1, 0], [1, 1]]))
    # As a 0 it would have been the worst of all.
    assert advantages([[1, nan], [1, 1], [1, 0], [1, 1]], missing="skip")[0] < -0.8
    # A function that gave nothing to the whole group does not apply to it: the other one decides.
    alone = advantages([[1, nan], [0, nan], [1, nan], [0, nan]])
    np.testing.assert_allclose(alone, advantages([[1, 5], [0, 5], [1, 5], [0, 5]]), atol=1e-6)
    assert np.all(alone != 0)
    # Nor does it if it judged nothing but a completion that does not train.
    masked = one_group([[1, nan], [0, nan], [1, nan], [0, 3]], [2, 2, 2, T])
    recipe = make_recipe("grpo", mask_truncated=True)
    np.testing.assert_array_equal(
        experience(masked, recipe, reward_weights=weights).advantages[:3] != 0, [True, True, True]
    )


def test_sums_that_no_float32_holds_are_its_largest():
    rewards, valid = combine(np.array([[3e38, 3e38], [-3e38, -3e38], [1e30, 0]]), [1.0, 1e9])
    largest = np.finfo(np.float32).max
    np.testing.assert_array_equal(rewards, np.array([largest, -largest, 1e30], np.float32))
    assert valid.all()


def test_top_entropy_and_importance_factors():
    judged = make_judged()
    base, half = loss_weights(MASK), B // 2
    top = np.concatenate(
        [
            top_entropy_mask(judged.entropies[part], MASK[part], share=0.3)
            for part in (slice(half), slice(half, B))
        ]
    )
    e = experience(judged, grpo.replace(top_entropy=0.3), num_minibatches=2)
    base_of_two = np.concatenate([loss_weights(part) for part in np.split(MASK, 2)])
    np.testing.assert_array_equal(e.weights, base_of_two * top)
    np.testing.assert_array_equal(e.penalty_weights, base_of_two)  # KL and entropy act on every token
    assert top[:half].sum() == np.ceil(0.3 * MASK[:half].sum())

    ratios = np.exp(np.where(MASK, judged.old_log_probs - judged.rollout.log_probs, 0))
    e = experience(judged, grpo.replace(importance_cap=1.2))
    np.testing.assert_allclose(e.weights, base * np.minimum(ratios, 1.2), rtol=1e-5)
    assert (ratios > 1.2).any() and (ratios < 0.9).any()
    np.testing.assert_array_equal(e.penalty_weights, base)

    both = experience(judged, grpo.replace(importance_cap=1.2, top_entropy=0.3)).weights
    factors = top_entropy_mask(judged.entropies, MASK, share=0.3) * importance_weights(
        judged.old_log_probs, judged.rollout.log_probs, MASK, cap=1.2
    )
    np.testing.assert_allclose(both, base * factors, rtol=1e-6)


def test_top_entropy_ranks_only_tokens_that_train():
    judged = make_judged()
    entropies = np.where(FINISHED[:, None] & (np.arange(B) < 4 * G)[:, None], judged.entropies, 50)
    recipe = grpo.replace(top_entropy=0.5, mask_truncated=True)
    e = experience(judged.replace(entropies=entropies.astype(np.float32)), recipe, num_live=4)
    trained = MASK & FINISHED[:, None] & (np.arange(B) < 4 * G)[:, None]
    assert (np.asarray(e.weights) > 0).sum() == np.ceil(0.5 * trained.sum())
    assert not np.any(np.asarray(e.weights)[~trained])


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_dead_groups_without_kl(aggregation):
    judged = make_judged(random_scores(np.random.default_rng(5)))
    recipe = make_recipe("grpo", kl_on_dead_groups=False, aggregation=aggregation)
    signal = signal_of(judged, recipe)
    assert not signal.all()
    e = experience(judged, recipe, num_live=5)
    base = np.where(np.arange(B)[:, None] < 5 * G, loss_weights(MASK, num_sequences=5 * G), 0)
    np.testing.assert_allclose(e.weights, base, rtol=1e-6)  # B counts dead groups as before
    np.testing.assert_allclose(e.penalty_weights, base * np.repeat(signal, G)[:, None], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"mask_truncated": True, "entropy_coef": 0.1, "max_staleness": 1.0, "overlong_buffer": 2}, False),
        ({"dynamic_sampling": True, "aggregation": "gdpo"}, False),
        ({"top_entropy": 1.0}, True),
        ({"importance_cap": 2.0}, True),
        ({"kl_on_dead_groups": False}, True),
    ],
)
def test_penalty_weights_exist_only_where_they_differ(changes, needed):
    assert (experience(make_judged(), grpo.replace(**changes)).penalty_weights is not None) == needed


# The rest


@pytest.mark.parametrize("name", RECIPES)
def test_mini_batches_are_rollouts_of_their_own(name):
    """But for advantages scaled over the batch, which is that of the rollout."""
    recipe = make_recipe(
        name, top_entropy=0.4, importance_cap=1.5, mask_truncated=True, kl_on_dead_groups=False
    )
    judged = make_judged(random_scores(np.random.default_rng(6), 0.1))
    whole = experience(judged, recipe, num_minibatches=3, num_microbatches=2)
    for i in range(3):
        rows = slice(i * B // 3, (i + 1) * B // 3)
        alone = experience(take(judged, rows), recipe, num_microbatches=2)
        chex.assert_trees_all_close(take(whole, rows), alone, rtol=1e-6)


def test_what_is_only_passed_on():
    judged = make_judged()
    e = experience(judged, grpo, prompt_length=S + 2)
    np.testing.assert_array_equal(e.prompt_tokens, np.pad(judged.rollout.prompt_tokens, ((0, 0), (2, 0))))
    np.testing.assert_array_equal(e.prompt_mask, np.pad(judged.rollout.prompt_mask, ((0, 0), (2, 0))))
    np.testing.assert_array_equal(e.tokens, judged.rollout.tokens)
    np.testing.assert_array_equal(e.old_log_probs, judged.old_log_probs)
    np.testing.assert_array_equal(e.ref_log_probs, judged.ref_log_probs)
    assert experience(judged.replace(ref_log_probs=None), grpo).ref_log_probs is None
    # It comes from the host or from the device; what the learner compiles for is the same.
    on_device = experience(jax.tree.map(jnp.asarray, judged), grpo, prompt_length=S + 2)
    chex.assert_trees_all_equal(on_device, e)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(e))
