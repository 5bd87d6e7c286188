"""Dynamic sampling: batches of whole groups that teach something.

This is DAPO's equation 11, https://arxiv.org/abs/2503.14476, in static shapes. A batch always has the same
number of rows. If there are too few informative groups, the rest of it is filled with dead groups and masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from grpo_jax.types import Judged


@dataclass(frozen=True, kw_only=True)
class Groups:
    """N whole groups of G completions.

    Args:
        judged: N*G rows.
        samples: N*G dictionaries with what a human reads of each row.
    """

    judged: Judged
    samples: list[dict[str, Any]]


def take_groups(groups: Groups, indices: Sequence[int] | Int[np.ndarray, " n"], group_size: int) -> Groups:
    """Returns the groups at the given indices, in that order, on the host."""
    rows = (np.asarray(indices, int)[:, None] * group_size + np.arange(group_size)).reshape(-1)
    judged = jax.tree.map(lambda x: np.asarray(x)[rows], groups.judged)
    return Groups(judged=judged, samples=[groups.samples[row] for row in rows])


def join_groups(parts: Sequence[Groups]) -> Groups:
    """Puts groups one after the other. One part is returned as it is.

    Prompts of different lengths are padded on the left to the longest.
    """
    if len(parts) == 1:
        return parts[0]
    length = max(part.judged.rollout.prompt_tokens.shape[1] for part in parts)
    judged = [widen_prompts(part.judged, length) for part in parts]
    joined = jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *judged)
    return Groups(judged=joined, samples=[sample for part in parts for sample in part.samples])


def fill_batch(
    informative: Groups | None, dead: Groups | None, *, count: int, group_size: int
) -> tuple[Groups, int, Groups | None]:
    """Makes a batch of exactly `count` groups, informative ones first.

    Args:
        informative: groups that teach something, or None.
        dead: groups that teach nothing, which fill the shape. They may be None if none are needed.
        count: number of groups in the batch.
        group_size: G.

    Returns:
        (batch of `count` groups, number of informative ones in it, leftover informative groups or None).
    """
    live = 0 if informative is None else len(informative.samples) // group_size
    if live >= count:
        batch = take_groups(informative, range(count), group_size)
        rest = take_groups(informative, range(count, live), group_size) if live > count else None
        return batch, count, rest
    filling = take_groups(dead, np.arange(count - live) % (len(dead.samples) // group_size), group_size)
    parts = [filling] if informative is None else [informative, filling]
    return join_groups(parts), live, None


def widen_prompts(judged: Judged, length: int) -> Judged:
    """Pads the prompts on the left to `length` tokens."""
    rollout = judged.rollout
    padding = ((0, 0), (length - rollout.prompt_tokens.shape[1], 0))
    return judged.replace(
        rollout=rollout.replace(
            prompt_tokens=np.pad(rollout.prompt_tokens, padding),
            prompt_mask=np.pad(rollout.prompt_mask, padding),
        )
    )
