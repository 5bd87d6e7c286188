"""The static sizes of a run, which decide how often XLA compiles.

Every size below is an argument of a jitted function or a shape of its arrays, so each value that occurs costs
one more compilation. `plan` counts them before a run.
"""

import math

import jax
import numpy as np

PACKED_FROM = 32  # Completions with a lower limit are not worth packing.
# Packed completions get one of these eighths of a batch's tokens, or all of them.
_EIGHTHS = (1, 2, 3, 4, 6)
NUM_BUCKETS = len(_EIGHTHS) + 1


def bucket_length(length: int, limit: int) -> int:
    """Returns the padded prompt length: 8, 16, 24, 32, 48, 64, 96, 128, ..., at most limit.

    Two sizes per octave bound both the padding (a third) and the number of compilations.
    """
    size = 8
    while size < length:
        octave = 1 << (size.bit_length() - 1)
        size += max(octave // 2, 8)
    return min(size, limit)


def padded_length(prompt_length: int, max_new_tokens: int, max_positions: int | None) -> int:
    """Returns the bucket of prompts of so many tokens, within the positions that completions leave to them.

    Args:
        prompt_length: number of tokens of the longest prompt.
        max_new_tokens: limit T of the tokens of a completion.
        max_positions: number of positions of the model. `None` means that it has no limit.
    """
    left = max(prompt_length, (max_positions or 10**9) - max_new_tokens)
    return bucket_length(prompt_length, left)


def decode_stages(batch: int, max_new_tokens: int) -> tuple[tuple[int, int], ...]:
    """Returns the (rows, slots) that decoding runs with, one after the other.

    The cache starts with slots for half of the tokens. As rows finish, B, B/2, B/4 and B/8 of them go on.
    Each stage compiles the loop once more, so short completions and small batches have one.
    """
    if max_new_tokens < 32:
        return ((batch, max_new_tokens),)
    stages = [(batch, max_new_tokens // 2), (batch, max_new_tokens)]
    while len(stages) < 5 and stages[-1][0] >= 8:
        stages.append((-(-stages[-1][0] // 2), max_new_tokens))
    return tuple(stages)


def tokens_in_use(mask: np.ndarray, num_microbatches: int = 1) -> int | None:
    """Returns the bucket of completion tokens that holds every slice of a batch, `None` for all of them.

    Args:
        mask: bool [B,T], on the host.
        num_microbatches: number of slices of the batch. The fullest decides.

    Returns:
        A size not below the count, one of `NUM_BUCKETS` per shape, since each compiles once more: 1, 2, 3, 4
        or 6 eighths of the slice's B*T, or `None`. Short completions have `None` alone.
    """
    mask = np.asarray(mask)
    size = mask.size // num_microbatches
    if mask.shape[1] < PACKED_FROM:
        return None
    most = int(mask.reshape(num_microbatches, -1).sum(axis=1).max())
    buckets = (-(-size * eighths // 8) for eighths in _EIGHTHS)
    return next((bucket for bucket in buckets if most <= bucket), None)


def shared_rows(num_rows: int, group_size: int, num_microbatches: int) -> int:
    """Returns how many consecutive rows of every slice surely have the same prompt."""
    return math.gcd(num_rows // num_microbatches, group_size)


def split_rows(batch, num_parts: int):
    """Splits every array [B, ...] of a pytree into [num_parts, B / num_parts, ...], rows in order.

    Raises:
        ValueError: num_parts is not a divisor of B.
    """

    def split(x):
        if x.shape[0] % num_parts:
            raise ValueError(
                f"{x.shape[0]} rows do not divide into {num_parts} equal micro-batches; "
                "choose num_microbatches among the divisors of the batch size"
            )
        return x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])

    return jax.tree.map(split, batch)


def token_lists(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """Returns the token ids of completions without their padding.

    Args:
        tokens: token ids [B,T].
        mask: bool [B,T], True on the first tokens of each row.
    """
    return [row[:length].tolist() for row, length in zip(tokens, mask.sum(axis=1), strict=True)]
