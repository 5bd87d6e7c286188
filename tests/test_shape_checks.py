"""The shapes in the annotations are checked in tests, and only there."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shape_checks
from jaxtyping import TypeCheckError

from grpo_jax.objective.kl import kl_exact
from grpo_jax.objective.losses import grpo_loss, loss_weights
from grpo_jax.objective.recipes import grpo
from grpo_jax.policy.shapes import split_rows
from grpo_jax.training.experience import add_up_rewards, make_experience
from grpo_jax.training.train_state import init_train_state
from grpo_jax.types import Experience, Judged, Rollout

ROOT = Path(__file__).parent.parent
FLOATS = np.zeros((2, 3), np.float32)
MASK = np.ones((2, 3), bool)
ADVANTAGES = np.ones(2, np.float32)
EXPERIENCE = Experience(
    prompt_tokens=np.zeros((2, 4), np.int32),
    prompt_mask=np.ones((2, 4), bool),
    tokens=np.zeros((2, 3), np.int32),
    mask=MASK,
    advantages=ADVANTAGES,
    weights=FLOATS,
    old_log_probs=None,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_good_shapes_pass_in_every_precision(array, dtype):
    with jax.enable_x64(True):
        floats = array(FLOATS.astype(jnp.dtype(dtype)))
        advantages = array(ADVANTAGES.astype(jnp.dtype(dtype)))
        mask = array(MASK)
        for loss in (grpo_loss, jax.jit(grpo_loss)):
            value, _ = loss(floats, floats, advantages, mask, floats)
            assert value == 0


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        ((FLOATS, FLOATS, np.ones(3, np.float32), MASK, FLOATS), {}),  # B of the advantages
        ((FLOATS, FLOATS, ADVANTAGES, MASK[:, :2], FLOATS), {}),  # T of the mask
        ((FLOATS, FLOATS, ADVANTAGES, FLOATS, FLOATS), {}),  # weights in place of the mask
        ((FLOATS, FLOATS, ADVANTAGES, MASK, FLOATS), {"kls": FLOATS[:1]}),
        ((FLOATS, FLOATS, ADVANTAGES, MASK, FLOATS), {"kl_coef": np.ones(2)}),
    ],
)
def test_a_wrong_argument_of_a_function_is_caught(arguments, choices):
    for loss in (grpo_loss, jax.jit(grpo_loss)):
        with pytest.raises(TypeCheckError, match=r"checking the parameters of grpo_jax.objective.losses"):
            loss(*arguments, **choices)


def test_a_wrong_result_is_caught(monkeypatch):
    monkeypatch.setattr(jax.nn, "log_softmax", lambda logits: logits[..., None])
    with pytest.raises(TypeCheckError, match=r"checking the return value of grpo_jax.objective.kl.kl_exact"):
        kl_exact(FLOATS, FLOATS)


def totals_of(**changes):
    arguments = {
        "scores": np.zeros((2, 2), np.float32),
        "lengths": np.array([3, 3]),
        "finished": np.ones(2, bool),
        "reward_weights": [1.0, 2.0],
    }
    return add_up_rewards(recipe=grpo, max_length=3, group_size=2, **arguments | changes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lengths": np.array([3])},  # one row would be broadcast
        {"lengths": np.ones(2, np.float32)},
        {"finished": np.ones((2, 1), bool)},
        {"finished": np.ones(2, np.int32)},
        {"reward_weights": np.ones(3)},
    ],
)
def test_wrong_rewards_are_caught(wrong):
    assert totals_of().rewards.shape == (2,)
    with pytest.raises(TypeCheckError, match=r"parameters of grpo_jax\.training\.experience\.add_up_rewards"):
        totals_of(**wrong)


def experience_of(recipe=grpo, **settings):
    rollout = Rollout(
        prompt_tokens=EXPERIENCE.prompt_tokens,
        prompt_mask=EXPERIENCE.prompt_mask,
        tokens=EXPERIENCE.tokens,
        mask=MASK,
        log_probs=FLOATS,
        kept_mass=FLOATS,
        finished=np.ones(2, bool),
    )
    judged = Judged(
        rollout=rollout,
        old_log_probs=FLOATS,
        entropies=None,
        ref_log_probs=None,
        scores=np.zeros((2, 2), np.float32),
        totals=totals_of(),
    )
    settings = {"reward_weights": [1.0, 2.0], "max_length": 3, "group_size": 2, "prompt_length": 4} | settings
    return make_experience(judged, recipe, **settings)


def test_a_wrong_argument_of_make_experience_is_caught():
    assert experience_of().advantages.shape == (2,)
    with pytest.raises(
        TypeCheckError, match=r"parameters of grpo_jax\.training\.experience\.make_experience"
    ):
        experience_of(reward_weights=np.ones((1, 2)))


def test_advantages_of_groups_in_place_of_rows_are_caught():
    def advantage(rewards, *, valid):
        return rewards.mean(axis=1)

    with pytest.raises(TypeCheckError, match=r"return value of grpo_jax\.training\.experience\._advantages"):
        experience_of(grpo.replace(advantage=advantage))


def test_a_wrong_counter_of_a_state_is_caught(toy_policy):
    policy, params = toy_policy
    state = init_train_state(policy, params, optax.sgd(0.1))
    assert state.replace(skipped=np.int32(3)).skipped == 3
    for wrong in ({"skipped": np.zeros(2, np.int32)}, {"step": np.zeros((), np.float32)}, {"policy": None}):
        with pytest.raises(TypeCheckError, match=r"grpo_jax\.training\.train_state\.TrainState"):
            state.replace(**wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"mask": MASK[:, :2]},
        {"advantages": np.ones(3, np.float32)},
        {"tokens": FLOATS},
        {"ref_log_probs": FLOATS[:1]},
        {"prompt_mask": MASK[0]},
    ],
)
def test_a_wrong_field_of_a_record_is_caught(change):
    with pytest.raises(TypeCheckError, match=r"grpo_jax\.types\.Experience"):
        EXPERIENCE.replace(**change)


def test_pytrees_of_records_are_good_whatever_their_leaves_are():
    stacked = split_rows(EXPERIENCE, 2)
    assert stacked.tokens.shape == (2, 1, 3) and stacked.advantages.shape == (2, 1)
    shapes = jax.eval_shape(lambda e: e, EXPERIENCE)
    assert shapes.tokens == jax.ShapeDtypeStruct((2, 3), jnp.int32)
    assert jax.jit(lambda e: e.replace(advantages=-e.advantages))(EXPERIENCE).advantages.tolist() == [-1, -1]
    assert jax.tree.structure(EXPERIENCE) == jax.tree.structure(jax.tree.map(jnp.asarray, EXPERIENCE))
    for leaf in (True, np.True_, np.zeros(7), "name", None, object()):
        assert jax.tree.map(lambda _, leaf=leaf: leaf, EXPERIENCE).mask is leaf


def test_off_is_off_and_ends():
    with shape_checks.off():
        loss_weights(FLOATS)
    with pytest.raises(TypeCheckError):
        loss_weights(FLOATS)


def test_the_wrapped_functions_keep_their_signature():
    assert list(inspect.signature(grpo_loss).parameters)[:3] == ["log_probs", "old_log_probs", "advantages"]
    assert grpo_loss.__name__ == "grpo_loss"


def test_without_the_hook_nothing_is_checked():
    code = """
import sys
import numpy as np
from grpo_jax.objective.losses import grpo_loss, loss_weights
from grpo_jax.types import Prompts
assert not hasattr(grpo_loss, "__wrapped__") and not hasattr(loss_weights, "__wrapped__")
assert "beartype" not in sys.modules
loss_weights(np.ones((2, 3)))  # not bool
Prompts(tokens=np.ones(2), mask=None)
"""
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, check=True, timeout=120
    )
