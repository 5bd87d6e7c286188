"""Statistics of n samples per prompt: pass@k, groups of other sizes, and differences with their noise."""

import itertools
import math

import numpy as np

_INDICES_AT_ONCE = 2_000_000  # bounds the memory of the bootstrap


def doublings(limit: int) -> list[int]:
    """Returns 1, 2, 4, ... up to limit, and limit itself.

    >>> doublings(6)
    [1, 2, 4, 6]
    """
    return sorted({*(2**i for i in range(limit.bit_length())), limit})


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Estimates the chance that at least one of k samples is correct, without bias.

    It is ``1 - C(n - c, k) / C(n, k)``, averaged over prompts, as in https://arxiv.org/abs/2107.03374,
    equation 1.

    Args:
        correct: bool [N, n], True at correct samples.
        k: number of samples, 1 to n.

    Raises:
        ValueError: k is not in 1 to n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per prompt; there are {n}")
    wrong = n - correct.sum(axis=1)
    # C(w, k) / C(n, k) is a product of k factors, and is 0 as soon as w < k.
    factors = [np.clip(wrong - i, 0, None) / (n - i) for i in range(k)]
    return float(np.mean(1.0 - np.prod(factors, axis=0)))


def subsets(n: int, size: int, *, limit: int = 13_000, seed: int = 0) -> np.ndarray:
    """Returns ways to choose `size` of n samples, each a group that might have been sampled.

    Averaged over them, any figure of a group is an unbiased estimate of what groups of that size have.

    Args:
        n: number of samples.
        size: number of samples in a group, 1 to n.
        limit: number of subsets up to which all are returned. If there are more, that many random ones are.
        seed: seed of the random subsets.

    Returns:
        int [K, size], distinct within each row.

    Raises:
        ValueError: size is not in 1 to n.
    """
    if not 1 <= size <= n:
        raise ValueError(f"groups of {size} need at least {size} samples per prompt, not {n}")
    if math.comb(n, size) <= limit:
        return np.array(list(itertools.combinations(range(n), size)))
    return np.argsort(np.random.default_rng(seed).random((limit, n)), axis=1)[:, :size]


def paired_bootstrap(
    sums: np.ndarray,
    baseline_sums: np.ndarray,
    *,
    counts: np.ndarray | None = None,
    baseline_counts: np.ndarray | None = None,
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Compares two means on the same prompts, with a percentile interval over resampled prompts.

    A mean is ``sum_i sums_i / sum_i counts_i``, or 0 if nothing counts. Both models are resampled together,
    prompt by prompt, so what makes a prompt hard for both cancels.

    Args:
        sums: [N], sums of the model's values on each prompt.
        baseline_sums: [N], the same for the other model.
        counts: [N], numbers of values on each prompt. None means one each.
        baseline_counts: [N], the same for the other model.
        num_resamples: number of times that N prompts are sampled with replacement.
        level: share of these samples inside the interval.
        seed: seed of the samples.

    Returns:
        (difference, low, high).
    """
    rows = np.stack(
        [
            np.ones(len(sums)) if x is None else np.asarray(x, np.float64)
            for x in (sums, counts, baseline_sums, baseline_counts)
        ]
    )  # [4,N]

    def difference(totals: np.ndarray) -> np.ndarray:
        mine, my_count, theirs, their_count = totals
        return mine / np.maximum(my_count, 1) - theirs / np.maximum(their_count, 1)

    rng = np.random.default_rng(seed)
    size = len(sums)
    at_once = max(1, _INDICES_AT_ONCE // size)
    found = []
    for start in range(0, num_resamples, at_once):
        indices = rng.integers(size, size=(min(at_once, num_resamples - start), size))
        found.append(difference(np.stack([row[indices].sum(axis=1) for row in rows])))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(difference(rows.sum(axis=1))), float(low), float(high)
