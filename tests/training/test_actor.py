"""The actor: row order, missing rewards, padding, buckets, metrics, dynamic sampling."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.models.loading import decode, load_model
from grpo_jax.objective.losses import loss_weights
from grpo_jax.objective.recipes import dapo, dr_grpo, grpo, make_recipe
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.rewards.loading import Reward, RewardError
from grpo_jax.run.build import actor_inputs
from grpo_jax.training import actor as actor_module
from grpo_jax.training import experience
from grpo_jax.training.actor import Actor, add_up, collect
from grpo_jax.training.dynamic_sampling import Groups
from grpo_jax.types import Example, Judged, Rollout, Verdict

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


def constant(completions):
    return [0.35] * len(completions)


@pytest.fixture(scope="module")
def model():
    return load_model("packaged:arithmetic")


@pytest.fixture(scope="module")
def ref_params(model):
    return jax.tree.map(lambda x: x * 1.01, model.params)


def make_actor(model, rewards=(correct, length), **changes) -> Actor:
    functions = tuple(
        Reward(name=f.__name__, function=f, weight=w) for f, w in zip(rewards, (1.0, 0.5), strict=False)
    )
    settings = {
        **actor_inputs(model, functions),
        "recipe": grpo,
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


def test_a_policy_that_is_its_reference_has_no_kl_in_its_rewards(model, monkeypatch):
    score, calls = actor_module._log_probs, []

    def rounding(actor, params, rollout):
        calls.append(params)
        log_probs, entropies = score(actor, params, rollout)
        return log_probs + 1e-6 * len(calls) * rollout.mask, entropies  # no two programs round alike

    monkeypatch.setattr(actor_module, "_log_probs", rounding)
    settings = {"recipe": make_recipe("rloo"), "rewards": (constant,)}
    copied = jax.tree.map(jnp.copy, model.params)
    e = collect(make_actor(model, **settings), model.params, copied, draw()).experience
    np.testing.assert_array_equal(e.ref_log_probs, e.old_log_probs)
    np.testing.assert_array_equal(e.advantages, 0)
    moved = jax.tree.map(lambda x: x * 1.001, model.params)
    e = collect(make_actor(model, **settings), moved, copied, draw()).experience
    assert np.any(np.asarray(e.advantages) != 0)


def test_an_actor_needs_callables_and_no_checkpoint(toy_policy):
    policy, params = toy_policy
    judged = []

    def judge(examples, texts):
        judged.extend(zip((e.prompt for e in examples), texts, strict=True))
        return Verdict(scores=np.array([[len(text)] for text in texts], np.float32), num_lost={"length": 2})

    actor = Actor(
        policy=policy,
        recipe=grpo,
        encode=lambda examples: [[ord(c) - ord("a") for c in e.prompt] for e in examples],
        decode=lambda tokens, mask: [
            "".join(chr(97 + i) for i in row[m]) for row, m in zip(tokens, mask, strict=True)
        ],
        judge=judge,
        reward_weights={"length": 2.0},
        eos_ids=jnp.array([1]),
        group_size=GROUP,
        prompt_length=8,
        max_new_tokens=NEW,
        sampling=SAMPLING,
    )
    got = collect(actor, params, None, lambda _: ([Example("cd"), Example("hij")], KEY))
    lengths = np.asarray(got.experience.mask).sum(axis=1)
    assert [row["prompt"] for row in got.samples] == ["cd"] * GROUP + ["hij"] * GROUP
    assert [(row["prompt"], row["completion"]) for row in got.samples] == judged
    assert [row["rewards/length"] for row in got.samples] == lengths.tolist()
    assert [row["reward"] for row in got.samples] == (2 * lengths).tolist()
    assert got.metrics["rewards/length/timeouts"] == 2 / (2 * GROUP)


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
    np.testing.assert_allclose(np.asarray(e.advantages).reshape(3, GROUP), grpo.advantage(rewards), atol=1e-6)
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


# Dynamic sampling: in a pattern, each letter is a group, A alive and d dead, each word a round of N = 3


def alternating(completions, alive):
    return [float(i % 2) if a else 1.0 for i, a in enumerate(alive)]


class Rounds:
    """What is drawn: the same prompts in every round, and groups that are alive or dead as the words say."""

    def __init__(self, words: str):
        self.words, self.drawn = words.split(), []

    def __call__(self, round_: int):
        self.drawn.append(round_)
        alive = [letter == "A" for letter in self.words[round_]]
        examples = [Example(e.prompt, {"alive": a}) for e, a in zip(EXAMPLES, alive, strict=True)]
        return examples, self.key(round_)

    @staticmethod
    def key(round_: int):
        return jax.random.fold_in(KEY, round_)


PLAIN = dapo.replace(overlong_buffer=0)  # without it only `alternating` decides who is alive


def dynamic(model, words, *, leftovers=None, recipe=PLAIN, **changes):
    """Collects with dynamic sampling: (what was collected, the rounds drawn)."""
    draw, settings = Rounds(words), {"rewards": (alternating,), "recipe": recipe, "max_rounds": 3}
    got = collect(make_actor(model, **settings | changes), model.params, None, draw, leftovers)
    return got, draw.drawn


@pytest.fixture(scope="module")
def rounds(model):
    """The Experience of each round, whoever is alive."""
    draws = [lambda _, r=r: (EXAMPLES, Rounds.key(r)) for r in range(3)]
    return [collect(make_actor(model), model.params, None, draw).experience for draw in draws]


@pytest.fixture(scope="module")
def sampled(rounds):
    """The tokens [N,G,T] of each round."""
    return [np.asarray(e.tokens).reshape(3, GROUP, NEW) for e in rounds]


def test_every_round_has_its_own_noise(sampled):
    for r in range(3):
        assert not np.array_equal(sampled[r], sampled[r - 1])


@pytest.mark.parametrize("num_minibatches", [1, 3])
@pytest.mark.parametrize(
    ("words", "count", "trained", "filling", "left"),
    [
        ("AAA", 1, [(0, 0), (0, 1), (0, 2)], [], []),
        ("AdA dAd", 2, [(0, 0), (0, 2), (1, 1)], [], []),
        ("dAA AdA", 2, [(0, 1), (0, 2), (1, 0)], [], [(1, 2)]),
        ("AAd AAA", 2, [(0, 0), (0, 1), (1, 0)], [], [(1, 1), (1, 2)]),
        ("dAd ddd dAA", 3, [(0, 1), (2, 1), (2, 2)], [], []),
        ("ddA ddd ddd", 3, [(0, 2)], [(2, 0), (2, 1)], []),
        ("ddd dAd Add", 3, [(1, 1), (2, 0)], [(2, 1)], []),
    ],
)
def test_only_informative_groups_train(words, count, trained, filling, left, num_minibatches, model, sampled):
    got, drawn = dynamic(model, words, num_minibatches=num_minibatches)
    assert drawn == list(range(count)) and got.num_rounds == count
    e, live = got.experience, len(trained) * GROUP
    tokens = np.concatenate([sampled[r][n] for r, n in trained + filling])
    np.testing.assert_array_equal(e.tokens, tokens)
    assert not np.any(e.mask[live:]) and not np.any(e.weights[live:]) and not np.any(e.advantages[live:])
    assert np.all(np.any(e.mask[:live], axis=1)) and np.all(e.advantages[:live] != 0)
    for part in np.split(np.arange(3 * GROUP), num_minibatches):
        np.testing.assert_array_equal(e.weights[part], loss_weights(e.mask[part], reduction="token"))
    assert got.metrics["dynamic_sampling/rounds"] == count
    assert got.metrics["dynamic_sampling/missing_groups"] == 3 - len(trained)
    assert got.metrics["dynamic_sampling/leftover_groups"] == len(left)
    if left:
        rollout = got.leftovers.judged.rollout
        np.testing.assert_array_equal(rollout.tokens, np.concatenate([sampled[r][n] for r, n in left]))
        # Generation pads these prompts to 8, a leftover has the length of the run: one shape in a checkpoint.
        assert rollout.prompt_tokens.shape[1] == PROMPT
    else:
        assert got.leftovers is None
    texts = decode(model, np.asarray(e.tokens), np.asarray(sampled_mask(e, got)))
    assert [row["completion"] for row in got.samples] == texts
    assert [row["advantage"] for row in got.samples] == np.asarray(e.advantages).tolist()


def sampled_mask(experience, got):
    """The mask of a batch before what fills it was masked: a completion ends with its first eos."""
    mask = np.asarray(experience.mask).copy()
    for row, sample in enumerate(got.samples):
        mask[row, : len(sample["completion"])] = True
    return mask


def test_leftovers_come_first_and_are_scored_by_the_policy_that_sampled_them(model, ref_params, sampled):
    first, _ = dynamic(model, "AAd dAA")
    assert first.metrics["dynamic_sampling/leftover_groups"] == 1
    actor = make_actor(model, rewards=(alternating,), recipe=PLAIN, max_rounds=3)
    # The policy has moved meanwhile; what was sampled before keeps its log-probs.
    second = collect(actor, ref_params, None, Rounds("Add AAA"), first.leftovers)
    e = second.experience
    np.testing.assert_array_equal(e.tokens[:GROUP], sampled[1][2])
    alone = collect(actor, model.params, None, lambda _: Rounds("AAA AAA")(1)).experience
    old = take_rows(alone, slice(2 * GROUP, 3 * GROUP))
    np.testing.assert_array_equal(e.old_log_probs[:GROUP], old.old_log_probs)
    np.testing.assert_array_equal(e.prompt_tokens[:GROUP], old.prompt_tokens)
    np.testing.assert_array_equal(e.advantages[:GROUP], old.advantages)
    assert [row["prompt"] for row in second.samples][::GROUP] == [EXAMPLES[i].prompt for i in (2, 0, 0)]
    assert len(second.leftovers.samples) == 2 * GROUP
    assert second.num_rounds == 2  # one leftover and one new group are not three
    third = collect(actor, ref_params, None, Rounds("Add"), second.leftovers)
    assert third.num_rounds == 1 and third.leftovers is None
    again = collect(actor, ref_params, None, Rounds("Add AAA"), to_device(first.leftovers))
    chex.assert_trees_all_equal(again.experience, e)  # from a checkpoint they come on the device


def take_rows(tree, rows):
    return jax.tree.map(lambda x: x[rows], tree)


def to_device(groups):
    return Groups(judged=jax.tree.map(jnp.asarray, groups.judged), samples=groups.samples)


def test_metrics_are_of_everything_sampled(model, rounds):
    got, _ = dynamic(model, "dAd AAA")
    # Two dead groups of ones and four alive ones of 0, 1, 0, 1 have been seen.
    assert got.metrics["reward"] == pytest.approx((2 * 1 + 4 * 0.5) / 6)
    assert got.metrics["rewards/alternating/mean"] == pytest.approx((2 * 1 + 4 * 0.5) / 6)
    assert got.metrics["frac_reward_zero_std"] == pytest.approx(2 / 6)
    assert all(got.metrics[f"time/{phase}"] > 0 for phase in ("generate", "reward", "score"))
    assert got.num_tokens == sum(e.prompt_mask.sum() + e.mask.sum() for e in rounds[:2])


def test_without_dynamic_sampling_there_is_one_round(model, collected):
    recipe = PLAIN.replace(dynamic_sampling=False)
    left, _ = dynamic(model, "AAd dAA")
    got, drawn = dynamic(model, "ddd AAA", recipe=recipe, leftovers=left.leftovers)
    assert drawn == [0] and got.num_rounds == 1 and got.leftovers is None
    assert not np.any(got.experience.advantages) and np.any(got.experience.mask)
    assert not [name for name in (*got.metrics, *collected.metrics) if name.startswith("dynamic_sampling")]


def test_rewards_are_added_up_once_in_every_round(model, monkeypatch):
    add_up_once, calls = experience.combine, []

    def combine(*args, **settings):
        calls.append(settings)
        return add_up_once(*args, **settings)

    monkeypatch.setattr(experience, "combine", combine)
    recipe = PLAIN.replace(kl_on_dead_groups=False)
    got, _ = dynamic(model, "dAd ddd dAA", recipe=recipe)
    assert len(calls) == got.num_rounds == 3
    collect(make_actor(model, recipe=recipe.replace(dynamic_sampling=False)), model.params, None, draw())
    assert len(calls) == 4


def test_the_overlong_penalty_is_a_signal(model):
    # Equal rewards, but some completions are longer: DAPO's penalty makes the group informative.
    got, _ = dynamic(model, "ddd ddd ddd", recipe=dapo.replace(overlong_buffer=NEW))
    live = 3 - int(got.metrics["dynamic_sampling/missing_groups"])
    lengths = np.asarray(got.experience.mask).sum(axis=1).reshape(3, GROUP)[:live]
    assert live > 0 and all(len(set(group)) > 1 for group in lengths)


@settings(max_examples=25, deadline=None)
@given(
    rollouts=st.lists(
        st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=4, max_size=4),
        min_size=1,
        max_size=4,
    ),
    max_rounds=st.integers(1, 4),
)
def test_every_informative_group_trains_once(rollouts, max_rounds, model):
    """The loop itself, over consecutive rollouts of fake rounds; the tokens are the group's number."""
    actor = make_actor(model, rewards=(correct,), recipe=PLAIN, max_rounds=max_rounds)
    made, used, leftovers, name = [], [], None, 0

    def sample_round(actor, params, ref_params, signal, key):
        nonlocal name
        made.extend(name + i for i, alive in enumerate(signal) if alive)
        groups = fake_groups(range(name, name + 3), signal)
        name += 3
        return actor_module._Round(
            groups=dataclasses.replace(groups, judged=add_up(actor, groups.judged)),
            times=dict.fromkeys(("time/generate", "time/score"), 0.0),
        )

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(actor_module, "_sample_round", sample_round)
        for rounds in rollouts:
            got = collect(actor, None, None, lambda r, rounds=rounds: (rounds[r], None), leftovers)
            e, leftovers = got.experience, got.leftovers
            assert 1 <= got.num_rounds <= max_rounds
            live = np.asarray(e.mask).any(axis=1)
            assert e.tokens.shape == (3 * GROUP, NEW)
            assert live.sum() == 3 * GROUP or (got.num_rounds == max_rounds and leftovers is None)
            used += np.asarray(e.tokens)[live, 0][::GROUP].tolist()
    waiting = [] if leftovers is None else leftovers.judged.rollout.tokens[::GROUP, 0].tolist()
    assert used + waiting == made


def fake_groups(names, signal) -> Groups:
    tokens = np.repeat(np.array(names, np.int32), GROUP)[:, None] * np.ones(NEW, np.int32)
    scores = np.tile(np.array([0, 1, 0, 1], np.float32), 3)[:, None] * np.repeat(signal, GROUP)[:, None]
    ones = np.ones(tokens.shape, np.float32)
    rollout = Rollout(
        prompt_tokens=tokens[:, :2],
        prompt_mask=np.ones((len(tokens), 2), bool),
        tokens=tokens,
        mask=np.ones(tokens.shape, bool),
        log_probs=-ones,
        kept_mass=ones,
        finished=np.ones(len(tokens), bool),
    )
    judged = Judged(
        rollout=rollout,
        old_log_probs=-ones,
        entropies=ones,
        ref_log_probs=None,
        scores=scores.astype(np.float32),
    )
    return Groups(judged=judged, samples=[{"prompt": str(t)} for t in tokens[:, 0]])
