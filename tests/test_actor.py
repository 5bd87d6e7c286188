"""The actor: row order, missing rewards, padding, buckets, metrics."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import actor as actor_module
from grpo_jax.actor import Actor, bucket_length, collect, judge
from grpo_jax.data import Example
from grpo_jax.log_probs import completion_log_probs
from grpo_jax.losses import loss_weights
from grpo_jax.models import decode, load_model
from grpo_jax.recipes import dr_grpo, grpo
from grpo_jax.rewards import Reward, RewardError

GROUP, NEW, PROMPT = 4, 5, 10
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
EXAMPLES = [
    Example("12+34=", {"answer": "46", "tag": "a"}),
    Example("7+8=", {"answer": "15", "tag": "b"}),
    Example("50+5=", {"answer": "55", "tag": "c"}),
]
KEY = jax.random.key(3)


def correct(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def length(completions):
    return [len(c) / 10 for c in completions]


@pytest.fixture(scope="module")
def model():
    return load_model("packaged:arithmetic")


@pytest.fixture(scope="module")
def ref_params(model):
    return jax.tree.map(lambda x: x * 1.01, model.params)


def make_actor(model, rewards=(correct, length), **changes) -> Actor:
    settings = {
        "model": model,
        "recipe": grpo,
        "rewards": tuple(
            Reward(name=f.__name__, function=f, weight=w) for f, w in zip(rewards, (1.0, 0.5), strict=False)
        ),
        "group_size": GROUP,
        "prompt_length": PROMPT,
        "max_new_tokens": NEW,
        "sampling": SAMPLING,
    }
    return Actor(**settings | changes)


def draw(key=KEY):
    """Every round samples the same examples."""
    return lambda round_: (EXAMPLES, jax.random.fold_in(key, round_) if round_ else key)


@pytest.fixture(scope="module")
def collected(model, ref_params):
    return collect(make_actor(model), model.params, ref_params, draw())


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


def test_judge_gives_columns_in_the_order_of_the_rows():
    seen = {}

    def f(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return list(range(len(completions)))

    examples = [e for e in EXAMPLES[:2] for _ in range(2)]
    scores = judge((Reward(name="f", function=f, weight=2.0),), examples, list("wxyz"))
    assert seen == {
        "prompts": ["12+34=", "12+34=", "7+8=", "7+8="],
        "completions": ["w", "x", "y", "z"],
        "answer": ["46", "46", "15", "15"],
        "tag": ["a", "a", "b", "b"],
    }
    np.testing.assert_array_equal(scores, [[0], [1], [2], [3]])


def test_judge_hands_messages_to_conversations():
    messages = [{"role": "user", "content": "hi"}]
    seen = []

    def f(completions):
        seen.extend(completions)
        return [1.0, 1.0]

    judge((Reward(name="f", function=f),), [Example(messages, {}), Example("hi", {})], ["a", "b"])
    assert seen == [[{"role": "assistant", "content": "a"}], "b"]


def test_judge_of_missing_rewards():
    def some(completions):
        return [None, 1.0, None]

    def none(completions):
        return [None, None, 0.5]

    rewards = (Reward(name="some", function=some), Reward(name="none", function=none, weight=4.0))
    scores = judge(rewards, EXAMPLES, ["x"] * 3)
    np.testing.assert_array_equal(np.isnan(scores), [[True, True], [False, True], [True, False]])


def test_rows_are_prompt_major(collected, model):
    e = collected.experience
    assert e.tokens.shape == (3 * GROUP, NEW) and e.prompt_tokens.shape == (3 * GROUP, PROMPT)
    prompts = decode(model, np.asarray(e.prompt_tokens)[:, ::-1], np.asarray(e.prompt_mask)[:, ::-1])
    wanted = [x.prompt for x in EXAMPLES for _ in range(GROUP)]
    assert [p[::-1] for p in prompts] == wanted
    assert [row["prompt"] for row in collected.samples] == wanted
    assert [row["completion"] for row in collected.samples] == decode(
        model, np.asarray(e.tokens), np.asarray(e.mask)
    )
    answers = [x.columns["answer"] for x in EXAMPLES for _ in range(GROUP)]
    for row, answer in zip(collected.samples, answers, strict=True):
        assert row["rewards/correct"] == float(row["completion"] == answer)
        assert row["rewards/length"] == pytest.approx(len(row["completion"]) / 10)
        assert row["reward"] == pytest.approx(row["rewards/correct"] + 0.5 * row["rewards/length"])


def test_advantages_and_weights_are_the_recipes(collected, model):
    e = collected.experience
    rewards = np.array([row["reward"] for row in collected.samples], np.float32).reshape(3, GROUP)
    np.testing.assert_allclose(
        np.asarray(e.advantages).reshape(3, GROUP), grpo.advantages(rewards), atol=1e-6
    )
    assert [row["advantage"] for row in collected.samples] == np.asarray(e.advantages).tolist()
    np.testing.assert_array_equal(e.weights, loss_weights(e.mask, reduction="sequence"))
    other = collect(make_actor(model, recipe=dr_grpo), model.params, None, draw())
    np.testing.assert_array_equal(
        other.experience.weights, loss_weights(e.mask, reduction="constant", max_length=NEW)
    )
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(other.experience.advantages, centred.reshape(-1), atol=1e-6)


def test_old_and_reference_log_probs(collected, model, ref_params):
    e = collected.experience
    chex.assert_trees_all_close(
        e.old_log_probs, completion_log_probs(model.policy, model.params, e)[0], atol=1e-5
    )
    chex.assert_trees_all_close(
        e.ref_log_probs, completion_log_probs(model.policy, ref_params, e)[0], atol=1e-5
    )
    assert not np.allclose(e.old_log_probs, e.ref_log_probs, atol=1e-3)


def test_without_a_reference(model):
    assert collect(make_actor(model), model.params, None, draw()).experience.ref_log_probs is None


def test_log_probs_are_those_of_the_temperature(model):
    actor = make_actor(model, sampling={**SAMPLING, "temperature": 0.5})
    e = collect(actor, model.params, None, draw()).experience
    expected = completion_log_probs(model.policy, model.params, e, temperature=0.5)[0]
    chex.assert_trees_all_close(e.old_log_probs, expected, atol=1e-5)


def test_micro_batches_change_nothing(collected, model, ref_params):
    sliced = collect(make_actor(model, num_microbatches=3), model.params, ref_params, draw())
    chex.assert_trees_all_close(sliced.experience, collected.experience, atol=1e-5)


@pytest.mark.parametrize("size", [6, 8, 20])
def test_padding_changes_nothing(size, collected, model, ref_params, monkeypatch):
    # Generation pads to a bucket, the experience to the run's length; neither changes a token.
    monkeypatch.setattr(actor_module, "bucket_length", lambda *_: size)
    actor = make_actor(model, prompt_length=20)
    other = collect(actor, model.params, ref_params, draw())
    e, o = collected.experience, other.experience
    assert o.prompt_tokens.shape[1] == o.prompt_mask.shape[1] == 20
    np.testing.assert_array_equal(o.prompt_mask.sum(1), e.prompt_mask.sum(1))
    np.testing.assert_array_equal(o.tokens, e.tokens)
    np.testing.assert_array_equal(o.mask, e.mask)
    np.testing.assert_allclose(o.old_log_probs, e.old_log_probs, atol=1e-5)
    np.testing.assert_allclose(o.ref_log_probs, e.ref_log_probs, atol=1e-5)
    assert other.samples == collected.samples


def test_metrics_by_value(collected):
    m, samples, mask = collected.metrics, collected.samples, np.asarray(collected.experience.mask)
    rewards = np.array([row["reward"] for row in samples])
    groups, each = (
        rewards.reshape(3, GROUP),
        {n: np.array([r[f"rewards/{n}"] for r in samples]) for n in ("correct", "length")},
    )
    assert m["reward"] == pytest.approx(rewards.mean(), abs=1e-6)
    assert m["reward_std"] == pytest.approx(groups.std(axis=1, ddof=1).mean(), abs=1e-6)
    assert m["frac_reward_zero_std"] == pytest.approx((groups.std(axis=1) == 0).mean())
    assert m["completions/mean_length"] == pytest.approx(mask.sum(1).mean())
    for name, values in each.items():
        assert m[f"rewards/{name}/mean"] == pytest.approx(values.mean(), abs=1e-6)
        assert m[f"rewards/{name}/std"] == pytest.approx(values.std(ddof=1), abs=1e-6)
    assert 0 <= m["sampling/logp_difference_max"] < 1e-4
    assert all(m[f"time/{phase}"] > 0 for phase in ("generate", "reward", "score"))
    assert all(isinstance(value, float) for value in m.values())


def test_missing_rewards_teach_nothing(model):
    def every_other(completions):
        return [None if i % 2 else float(i) for i in range(len(completions))]

    def never(completions):
        return [None] * len(completions)

    got = collect(make_actor(model, rewards=(every_other, never)), model.params, None, draw())
    advantages = np.asarray(got.experience.advantages)
    assert (advantages[1::2] == 0).all() and (advantages[0::2] != 0).all()
    assert [row["reward"] for row in got.samples][:4] == [0.0, None, 2.0, None]
    assert got.samples[1]["rewards/every_other"] is None and got.samples[0]["rewards/never"] is None
    # 0, 2, 4, ..., 10
    assert got.metrics["rewards/every_other/mean"] == 5.0 and got.metrics["reward"] == 5.0
    assert "rewards/never/mean" not in got.metrics  # no value is not the value 0
    assert np.isfinite(advantages).all()


def test_the_key_and_nothing_else_decides(collected, model, ref_params):
    again = collect(make_actor(model), model.params, ref_params, draw())
    chex.assert_trees_all_equal(again.experience, collected.experience)
    assert again.samples == collected.samples
    other = collect(make_actor(model), model.params, ref_params, draw(jax.random.fold_in(KEY, 1)))
    assert not jnp.array_equal(other.experience.tokens, collected.experience.tokens)


def test_own_params_of_the_model_are_not_used(collected, model, ref_params):
    shapes = jax.eval_shape(lambda p: p, model.params)
    actor = make_actor(dataclasses.replace(model, params=shapes))
    got = collect(actor, model.params, ref_params, draw())
    chex.assert_trees_all_equal(got.experience, collected.experience)


def test_prompt_beyond_the_runs_length(model):
    with pytest.raises(ValueError, match="a prompt has 6 tokens, more than the 5 of this run"):
        collect(make_actor(model, prompt_length=5), model.params, None, draw())


def test_failing_reward_names_function_and_row(model):
    def fails(completions, tag):
        return [{"a": 1.0, "b": 1.0}[t] for t in tag]

    with pytest.raises(RewardError, match=r"reward `fails` .*KeyError\('c'\).* row 8 "):
        collect(make_actor(model, rewards=(fails,)), model.params, None, draw())
