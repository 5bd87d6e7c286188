"""Estimators against enumeration: every subset, every resample."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.evaluation import statistics
from grpo_jax.evaluation.statistics import doublings, paired_bootstrap, pass_at_k, subsets


def matrices(elements):
    """[N, n] of elements, and a size from 1 to n."""
    rows = st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(elements, min_size=n, max_size=n), min_size=1, max_size=4), st.integers(1, n)
        )
    )
    return rows.map(lambda case: (np.array(case[0]), case[1]))


def test_doublings():
    assert [doublings(n) for n in (1, 2, 3, 4, 5, 16)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 5], [1, 2, 4, 8, 16]
    ]  # fmt: skip


@settings(deadline=None)
@given(matrices(st.booleans()))
def test_pass_at_k_against_enumeration(case):
    correct, k = case
    subsets = list(itertools.combinations(range(correct.shape[1]), k))
    expected = np.mean([[row[list(subset)].any() for subset in subsets] for row in correct])
    assert pass_at_k(correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_edges():
    assert pass_at_k(np.array([[True] * 300, [False] * 300]), 200) == 0.5  # no overflow
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples per prompt; there are 3"):
            pass_at_k(np.ones((2, 3), bool), k)


def test_subsets_are_all_groups_that_might_have_been_sampled():
    for n in range(1, 7):
        for size in range(1, n + 1):
            assert subsets(n, size).tolist() == [list(x) for x in itertools.combinations(range(n), size)]
    for size in (0, 5):
        with pytest.raises(ValueError, match=f"groups of {size} need at least {size} samples .* not 4"):
            subsets(4, size)


def test_of_too_many_subsets_some_are_drawn():
    drawn = subsets(300, 100, limit=500)
    assert drawn.shape == (500, 100) and all(len(set(row)) == 100 for row in drawn.tolist())
    assert np.array_equal(drawn, subsets(300, 100, limit=500)) and len(np.unique(drawn)) == 300
    np.testing.assert_allclose(np.bincount(drawn.reshape(-1)) / 500, 1 / 3, atol=0.1)


# The paired bootstrap


def test_difference_and_interval_against_every_resample():
    """All 5^5 resamples of 5 prompts, equally likely, give the exact interval."""
    mine, theirs = np.array([1.0, 0, 1, 1, 0]), np.array([0.0, 0, 1, 0, 1])
    resamples = np.array(list(itertools.product(range(5), repeat=5)))
    differences = (mine - theirs)[resamples].mean(axis=1)
    exact = np.quantile(differences, [0.025, 0.975], method="inverted_cdf")
    value, low, high = paired_bootstrap(mine, theirs)
    assert value == pytest.approx(0.2)
    assert (low, high) == pytest.approx(tuple(exact))


def test_means_of_unequal_counts():
    """A prompt without any value counts for nothing, in a resample as in the whole."""
    sums, counts = np.array([3.0, 0.0, 1.0]), np.array([3, 0, 2])
    theirs, their_counts = np.array([0.0, 1.0, 1.0]), np.array([2, 2, 1])
    resamples = np.array(list(itertools.product(range(3), repeat=3)))

    def mean(sums, counts):
        total, count = sums[resamples].sum(axis=1), counts[resamples].sum(axis=1)
        return np.array([t / c if c else 0 for t, c in zip(total, count, strict=True)])

    differences = mean(sums, counts) - mean(theirs, their_counts)
    exact = np.quantile(differences, [0.05, 0.95], method="inverted_cdf")
    value, low, high = paired_bootstrap(sums, theirs, counts=counts, baseline_counts=their_counts, level=0.9)
    assert value == pytest.approx(4 / 5 - 2 / 5)
    assert (low, high) == pytest.approx(tuple(exact))


def test_pairs_stay_together():
    """Prompts differ far more than the models do: only a paired interval tells the models apart."""
    hard = np.random.default_rng(0).uniform(size=200)
    value, low, high = paired_bootstrap(hard + 0.01, hard)
    assert (value, low, high) == pytest.approx((0.01, 0.01, 0.01))


def test_the_interval_has_the_width_of_its_noise():
    difference = np.random.default_rng(1).normal(0.1, 1, size=400)
    value, low, high = paired_bootstrap(difference, np.zeros(400))
    assert value == pytest.approx(difference.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * difference.std() / 20, rel=0.05)
    assert (low + high) / 2 == pytest.approx(value, abs=0.01)


def test_seed_and_slices(monkeypatch):
    mine, theirs = np.random.default_rng(2).uniform(size=(2, 30))
    whole = paired_bootstrap(mine, theirs, seed=3)
    assert whole == paired_bootstrap(mine, theirs, seed=3)
    assert whole[0] == paired_bootstrap(mine, theirs, seed=4)[0] and whole != paired_bootstrap(
        mine, theirs, seed=4
    )
    monkeypatch.setattr(statistics, "_INDICES_AT_ONCE", 7 * 30)  # 10,000 is no multiple of 7
    assert paired_bootstrap(mine, theirs, seed=3) == pytest.approx(whole, abs=1e-15)


def test_memory_is_bounded():
    tracemalloc.start()
    try:
        paired_bootstrap(np.ones(2000), np.zeros(2000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6  # all draws at once and what they pick would be 320 MB
