"""What every record is: a frozen dataclass and a pytree that can be replaced, pickled and compared."""

import dataclasses
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.objective.losses import LossMetrics
from grpo_jax.objective.recipes import Recipe, grpo
from grpo_jax.policy.cache import DecoderCache
from grpo_jax.policy.decoding import _Decode, _Rows
from grpo_jax.training.train_state import init_train_state
from grpo_jax.types import Experience, Judged, Policy, Prompts, Rollout, Totals

RECORDS = [
    Prompts,
    Rollout,
    Totals,
    Judged,
    Experience,
    Policy,
    LossMetrics,
    Recipe,
    DecoderCache,
    _Decode,
    _Rows,
]
PROMPTS = Prompts(tokens=np.zeros((1, 2), np.int32), mask=np.ones((1, 2), bool))


@pytest.mark.parametrize("record", RECORDS)
def test_every_record_is_of_one_kind(record):
    assert dataclasses.is_dataclass(record) and record.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(record))
    assert record.replace is dataclasses.replace


def test_leaves_have_the_order_and_the_names_of_the_fields():
    leaves = jax.tree_util.tree_leaves_with_path(PROMPTS)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".tokens", ".mask"]


def test_a_record_is_replaced_pickled_and_frozen():
    other = PROMPTS.replace(mask=~PROMPTS.mask)
    assert other.tokens is PROMPTS.tokens and not other.mask.any()
    again = pickle.loads(pickle.dumps(PROMPTS))
    np.testing.assert_array_equal(again.mask, PROMPTS.mask)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROMPTS.mask = None


def test_a_policy_is_static_and_its_functions_are_its_identity(toy_policy):
    policy, _ = toy_policy
    same = policy.replace()
    other = policy.replace(unembed=lambda params, hidden: hidden)
    assert jax.tree.leaves(policy) == []
    assert policy == same and hash(policy) == hash(same) and policy != other
    traces = []
    compiled = jax.jit(lambda policy, x: traces.append(policy) or x)
    for each in (policy, same, other, policy):
        compiled(each, jnp.ones(()))
    assert len(traces) == 2


def test_the_numbers_of_a_recipe_are_leaves():
    assert jax.tree.leaves(grpo) == [0.2, 0.04]


def test_flax_serializes_a_train_state_without_its_policy(toy_policy):
    policy, params = toy_policy
    state = init_train_state(policy, params, optax.sgd(0.1))
    stored = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(state.replace(step=state.step + 5), stored)
    assert restored.step == 0 and restored.policy == policy
    assert flax.serialization.to_state_dict(state)["policy"] == {}
