"""Whole groups: taken, joined, filled up to one shape; over many rollouts none is lost or used twice."""

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.training.dynamic_sampling import Groups, fill_batch, join_groups, take_groups, widen_prompts
from grpo_jax.types import Judged, Rollout

G, T, R = 3, 4, 2


def make_groups(ids, *, length: int = 5, reference: bool = True) -> Groups:
    """Returns one group per id. Every number of a row tells its group and its place in it."""
    rows = np.array([[10 * i + g] for i in ids for g in range(G)], np.float32).reshape(-1, 1)
    tokens = np.tile(rows, T).astype(np.int32)
    rollout = Rollout(
        prompt_tokens=np.tile(rows, length).astype(np.int32) + 1,
        prompt_mask=np.ones((len(rows), length), bool),
        tokens=tokens,
        mask=np.arange(T) < 1 + tokens % T,
        log_probs=rows - 0.1 * np.arange(T, dtype=np.float32),
        kept_mass=np.tile(rows, T),
        finished=rows[:, 0] % 2 == 0,
    )
    judged = Judged(
        rollout=rollout,
        old_log_probs=rows - 0.2 * np.arange(T, dtype=np.float32),
        entropies=np.tile(rows, T),
        ref_log_probs=np.tile(-rows, T) if reference else None,
        scores=np.tile(rows, R),
    )
    return Groups(judged=judged, samples=[{"row": float(row)} for row in rows[:, 0]])


def ids_of(groups: Groups) -> list[int]:
    """Returns the group ids, after checking that groups are whole and samples go with their rows."""
    rows = np.asarray(groups.judged.rollout.tokens)[:, 0]
    assert [sample["row"] for sample in groups.samples] == rows.tolist()
    np.testing.assert_array_equal(rows.reshape(-1, G) % 10, np.tile(np.arange(G), (len(rows) // G, 1)))
    return (rows[::G] // 10).tolist()


@pytest.mark.parametrize("indices", [[0], [2, 0], [3, 3, 1], range(4)])
def test_taken_groups_come_in_the_order_asked_for(indices):
    taken = take_groups(make_groups([4, 5, 6, 7]), indices, G)
    wanted = make_groups([4 + i for i in indices])
    chex.assert_trees_all_equal(taken.judged, wanted.judged)
    assert taken.samples == wanted.samples
    assert all(isinstance(x, np.ndarray) for x in (taken.judged.scores, taken.judged.rollout.tokens))


def test_one_part_is_returned_as_it_is():
    one = make_groups([1, 2])
    assert join_groups([one]) is one


def test_joined_groups_keep_their_order_and_every_number():
    parts = [make_groups([3]), make_groups([1, 2]), make_groups([0])]
    joined, wanted = join_groups(parts), make_groups([3, 1, 2, 0])
    chex.assert_trees_all_equal(joined.judged, wanted.judged)
    chex.assert_trees_all_equal_dtypes(joined.judged, wanted.judged)
    assert joined.samples == wanted.samples


def test_prompts_of_other_lengths_are_padded_on_the_left():
    joined = join_groups([make_groups([1], length=2), make_groups([2], length=5)]).judged
    long = make_groups([1, 2], length=5).judged
    tokens, mask = long.rollout.prompt_tokens.copy(), long.rollout.prompt_mask.copy()
    tokens[:G, :3], mask[:G, :3] = 0, False
    wanted = long.replace(rollout=long.rollout.replace(prompt_tokens=tokens, prompt_mask=mask))
    chex.assert_trees_all_equal(joined, wanted)


def test_widening_touches_nothing_but_the_prompts():
    judged = make_groups([1, 2], length=3).judged
    assert widen_prompts(judged, 3).rollout.prompt_tokens.shape == (2 * G, 3)
    wide = widen_prompts(judged, 7)
    assert not wide.rollout.prompt_mask[:, :4].any() and wide.rollout.prompt_mask[:, 4:].all()
    np.testing.assert_array_equal(wide.rollout.prompt_tokens[:, 4:], judged.rollout.prompt_tokens)
    back = wide.rollout.replace(
        prompt_tokens=wide.rollout.prompt_tokens[:, 4:], prompt_mask=wide.rollout.prompt_mask[:, 4:]
    )
    chex.assert_trees_all_equal(wide.replace(rollout=back), judged)
    with pytest.raises(ValueError, match="negative"):
        widen_prompts(judged, 2)


@pytest.mark.parametrize(
    ("live", "dead", "batch", "num_live", "rest"),
    [
        ([1, 2, 3], [], [1, 2, 3], 3, None),
        ([1, 2, 3, 4, 5], [], [1, 2, 3], 3, [4, 5]),
        ([1, 2, 3, 4], [7], [1, 2, 3], 3, [4]),
        ([1, 2], [7, 8], [1, 2, 7], 2, None),
        ([1], [7], [1, 7, 7], 1, None),  # one dead group fills as often as needed
        ([], [7, 8], [7, 8, 7], 0, None),
    ],
)
def test_a_batch_of_constant_size(live, dead, batch, num_live, rest):
    parts = [make_groups(ids) if ids else None for ids in (live, dead)]
    filled, count, leftovers = fill_batch(*parts, count=3, group_size=G)
    assert (ids_of(filled), count) == (batch, num_live)
    chex.assert_trees_all_equal(filled.judged, make_groups(batch).judged)
    assert (None if leftovers is None else ids_of(leftovers)) == rest


def test_without_a_reference_there_is_none_afterwards():
    live, dead = make_groups([1], reference=False), make_groups([2], length=3, reference=False)
    filled, _, _ = fill_batch(live, dead, count=2, group_size=G)
    assert filled.judged.ref_log_probs is None and ids_of(filled) == [1, 2]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 4),
    rollouts=st.lists(
        st.lists(st.tuples(st.lists(st.booleans(), min_size=4, max_size=4), st.integers(2, 6)), min_size=1),
        min_size=1,
        max_size=5,
    ),
)
def test_every_informative_group_is_used_once(count, rollouts):
    """Over consecutive rollouts of any number of rounds, each with its own prompt length."""
    name, made, used, leftovers = 0, [], [], None
    for rounds in rollouts:
        informative, dead = leftovers, None
        for signal, length in rounds:
            groups = make_groups(range(name, name + count), length=length)
            alive = np.array(signal[:count])
            made += (name + np.flatnonzero(alive)).tolist()
            name += count
            if alive.any():
                taken = take_groups(groups, np.flatnonzero(alive), G)
                informative = taken if informative is None else join_groups([informative, taken])
            if not alive.all():
                dead = take_groups(groups, np.flatnonzero(~alive), G)
        batch, num_live, leftovers = fill_batch(informative, dead, count=count, group_size=G)
        ids = ids_of(batch)
        assert len(ids) == count and (num_live == count or leftovers is None)
        assert not set(ids[num_live:]) & set(made)  # what fills is dead
        used += ids[:num_live]
    assert used + (ids_of(leftovers) if leftovers else []) == made  # none lost, none twice, first come first
