"""The static sizes: few of them, and none too small."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.policy.shapes import (
    NUM_BUCKETS,
    bucket_length,
    decode_stages,
    padded_length,
    shared_rows,
    split_rows,
    tokens_in_use,
)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_bucket_length(length, limit):
    length = min(length, limit)
    size = bucket_length(length, limit)
    assert length <= size <= limit
    assert size <= bucket_length(min(length + 1, limit), limit)  # monotone
    if length > 24:
        assert (size - length) / size <= 1 / 3
    assert bucket_length(size, limit) == size


def test_bucket_lengths_are_few():
    sizes = sorted({bucket_length(length, 10**9) for length in range(1, 1025)})
    assert sizes == [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert {bucket_length(length, 40) for length in range(33, 41)} == {40}


def test_padded_length_leaves_positions_for_the_completion():
    assert padded_length(17, 5, None) == padded_length(17, 5, 100) == 24
    assert padded_length(17, 5, 25) == 20 and padded_length(17, 5, 20) == 17


def test_decode_stages():
    assert decode_stages(64, 64) == ((64, 32), (64, 64), (32, 64), (16, 64), (8, 64))
    assert decode_stages(24, 33) == ((24, 16), (24, 33), (12, 33), (6, 33))
    assert decode_stages(64, 31) == ((64, 31),) and decode_stages(7, 64) == ((7, 32), (7, 64))


def test_tokens_in_use_is_the_smallest_bucket_of_six():
    def bucket(lengths, num_microbatches=1, limit=64):
        return tokens_in_use(np.arange(limit) < np.array(lengths)[:, None], num_microbatches)

    assert bucket([8, 8]) == 16 and bucket([8, 9]) == 32 and bucket([33, 0]) == 48  # eighths of 128
    assert bucket([64, 32]) == 96 and bucket([64, 33]) is None and bucket([0, 0]) == 16
    assert bucket([40, 2], num_microbatches=2) == 48  # the fuller slice decides
    assert bucket([1, 1], limit=31) is None
    assert len({bucket([length, length]) for length in range(1, 65)}) == NUM_BUCKETS == 6


def test_shared_rows():
    assert shared_rows(32, 8, 1) == 8 and shared_rows(32, 8, 8) == 4 and shared_rows(24, 8, 2) == 4
    assert shared_rows(32, 8, 32) == 1 and shared_rows(12, 1, 2) == 1


def test_split_rows_keeps_the_order_and_refuses_a_remainder():
    split = split_rows({"x": jnp.arange(6), "y": jnp.arange(12).reshape(6, 2)}, 3)
    np.testing.assert_array_equal(split["x"], [[0, 1], [2, 3], [4, 5]])
    chex.assert_shape(split["y"], (3, 2, 2))
    with pytest.raises(ValueError, match="6 rows do not divide into 4"):
        split_rows({"x": jnp.arange(6)}, 4)
