"""Metrics: every definition by value, and slices that join into the whole."""

import dataclasses
import itertools
import json
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run

from grpo_jax.models.loading import load_model
from grpo_jax.objective.losses import LossMetrics, grpo_loss, loss_weights
from grpo_jax.objective.recipes import dr_grpo, make_recipe
from grpo_jax.objective.surrogates import SURROGATES
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.rewards.loading import Reward
from grpo_jax.run.build import actor_inputs
from grpo_jax.train import train
from grpo_jax.training import actor as actor_module
from grpo_jax.training import metrics as metrics_module
from grpo_jax.training.actor import Actor, collect
from grpo_jax.training.experience import add_up_rewards, make_experience
from grpo_jax.training.learner import train_step
from grpo_jax.training.metrics import (
    loss_metrics_dict,
    merge_loss_metrics,
    reward_metrics,
    rollout_metrics,
    token_mean,
)
from grpo_jax.training.train_state import init_train_state
from grpo_jax.types import Example, Judged, Rollout

B, T = 8, 5
LEARNING_RATE = 0.125
SGD = optax.sgd(LEARNING_RATE)
MASK = np.arange(T) < np.array([[5, 3, 0, 1, 2, 5, 0, 4]]).T


def floats(metrics) -> dict[str, float]:
    chex.assert_shape(list(metrics.values()), ())
    return {name: float(value) for name, value in metrics.items()}


def test_token_mean_counts_real_tokens_only():
    values = np.where(MASK, np.arange(B * T).reshape(B, T), np.nan)
    np.testing.assert_allclose(token_mean(jnp.asarray(values), jnp.asarray(MASK)), np.nanmean(values))
    assert token_mean(jnp.ones((B, T)), jnp.zeros((B, T), bool)) == 0


# Slices


@pytest.fixture(scope="module")
def batch():
    """Arguments of grpo_loss whose clipping acts on both sides."""
    rng = np.random.default_rng(0)
    old, log_probs, ref = -2 + rng.normal(size=(3, B, T)).astype(np.float32)
    advantages = rng.normal(size=B).astype(np.float32)
    return tuple(map(jnp.asarray, (log_probs, old, advantages, MASK, loss_weights(MASK), ref)))


@jax.jit
def evaluate(log_probs, old, advantages, mask, weights, ref) -> LossMetrics:
    return grpo_loss(log_probs, old, advantages, mask, weights, ref_log_probs=ref, kl_coef=0.1)[1]


@pytest.mark.parametrize("cuts", [[0, 8], [0, 4, 8], [0, 2, 3, 6, 7, 8], [0, 1, 8]], ids=str)
def test_joined_slices_are_the_whole(batch, cuts):
    # Slices of unequal size, and rows 2 and 6 alone: a slice without a token.
    parts = [evaluate(*(x[start:stop] for x in batch)) for start, stop in itertools.pairwise(cuts)]
    merged = merge_loss_metrics(jax.tree.map(lambda *x: jnp.stack(x), *parts))
    whole = evaluate(*batch)
    chex.assert_trees_all_close(merged, whole, rtol=1e-5, atol=1e-6)
    assert whole.clip_low > 0 and whole.clip_high > 0 and whole.num_tokens == MASK.sum()


def test_slices_without_any_token_give_finite_zeros(batch):
    empty = evaluate(*batch[:3], jnp.zeros((B, T), bool), jnp.zeros((B, T)), batch[5])
    merged = merge_loss_metrics(jax.tree.map(lambda x: jnp.stack([x, x]), empty))
    for value in jax.tree.leaves(merged):
        assert value == 0


def test_every_field_has_its_logged_name():
    fields = LossMetrics(
        policy_loss=1.0,
        kl=2.0,
        ratio_mean=3.0,
        ratio_max=4.0,
        clip_low=0.25,
        clip_high=0.5,
        stale=0.125,
        num_tokens=9,
    )
    assert loss_metrics_dict(fields) == {
        "policy_loss": 1.0,
        "kl": 2.0,
        "ratio/mean": 3.0,
        "ratio/max": 4.0,
        "clip_ratio/low_mean": 0.25,
        "clip_ratio/high_mean": 0.5,
        "clip_ratio/region_mean": 0.75,
        "stale_tokens": 0.125,
    }
    assert len(dataclasses.fields(fields)) == 8  # a new field needs a name


# Rewards


def reward_metrics_loop(rewards, valid) -> dict[str, float]:
    groups = [row[ok] for row, ok in zip(rewards, valid, strict=True)]
    stds = [np.std(g, ddof=1) if len(g) > 1 else 0.0 for g in groups if len(g)]
    everything = np.concatenate(groups)
    return {
        "reward": np.mean(everything) if len(everything) else 0.0,
        "reward_std": np.mean(stds) if stds else 0.0,
        "frac_reward_zero_std": np.mean([len(g) == 0 or np.ptp(g) == 0 for g in groups]),
    }


def test_reward_metrics_by_value():
    rewards = np.array([[0.0, 1.0, 1.0, 2.0], [0.5, 0.5, 0.5, 0.5]], np.float32)
    metrics = floats(reward_metrics(jnp.asarray(rewards), jnp.ones((2, 4), bool)))
    assert metrics == pytest.approx(
        {"reward": 0.75, "reward_std": math.sqrt(2 / 3) / 2, "frac_reward_zero_std": 0.5}
    )


def test_missing_rewards_count_nowhere():
    rewards = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    valid = np.array(
        [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool
    )
    rewards[4, :2] = 0.3
    rewards[~valid] = np.nan
    metrics = floats(reward_metrics(jnp.asarray(rewards), jnp.asarray(valid)))
    assert metrics == pytest.approx(reward_metrics_loop(rewards, valid), rel=1e-5)
    assert metrics["frac_reward_zero_std"] == pytest.approx(0.5)


def test_no_reward_at_all_gives_finite_zeros():
    metrics = floats(reward_metrics(jnp.full((2, 4), jnp.nan), jnp.zeros((2, 4), bool)))
    assert metrics == {"reward": 0, "reward_std": 0, "frac_reward_zero_std": 1}


@pytest.mark.parametrize("reward", [0.35, 0.95, 1e6 + 0.1])
def test_equal_rewards_have_exactly_no_std(reward):
    # The float32 mean of eight times 0.35 is not 0.35; the definition decides by equality.
    metrics = floats(reward_metrics(jnp.full((3, 8), reward), jnp.ones((3, 8), bool)))
    assert metrics["reward_std"] == 0 and metrics["frac_reward_zero_std"] == 1
    assert metrics["reward"] == pytest.approx(reward)


# Rollouts


def make_rollout(mask, finished) -> Rollout:
    rng = np.random.default_rng(1)
    log_probs, kept = rng.uniform(-3, 0, mask.shape), rng.uniform(0.5, 1, mask.shape)
    return Rollout(
        prompt_tokens=jnp.zeros((len(mask), 2), jnp.int32),
        prompt_mask=jnp.ones((len(mask), 2), bool),
        tokens=jnp.zeros(mask.shape, jnp.int32),
        mask=jnp.asarray(mask),
        log_probs=jnp.asarray(np.where(mask, log_probs, 0), jnp.float32),
        kept_mass=jnp.asarray(np.where(mask, kept, 0), jnp.float32),
        finished=jnp.asarray(finished),
    )


def test_rollout_metrics_by_value():
    mask = np.arange(5) < np.array([[5, 5, 3, 1]]).T
    rollout = make_rollout(mask, [False, True, True, True])  # one row ends at the last position
    scored = np.array(rollout.log_probs)
    scored[1, 4] += 0.5
    scored[0, 0] -= 0.75
    scored[3, 1:] = np.nan  # masked: not a token
    metrics = floats(rollout_metrics(rollout, jnp.asarray(scored)))
    assert metrics == pytest.approx(
        {
            "completions/mean_length": 3.5,
            "completions/min_length": 1,
            "completions/max_length": 5,
            "completions/clipped_ratio": 0.25,
            "completions/mean_terminated_length": 3,
            "sampling/logp_difference_max": 0.75,
            "sampling/kept_mass": np.mean(np.asarray(rollout.kept_mass)[mask]),
        }
    )


def test_when_every_completion_is_cut_off():
    rollout = make_rollout(np.ones((3, 4), bool), [False] * 3)
    metrics = floats(rollout_metrics(rollout, rollout.log_probs))
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["completions/mean_terminated_length"] == 0
    assert metrics["completions/mean_length"] == 4
    assert metrics["sampling/logp_difference_max"] == 0


def test_mean_terminated_length_ignores_rows_that_were_cut_off():
    mask = np.arange(4) < np.array([[4, 4, 1, 2]]).T
    rollout = make_rollout(mask, [False, False, True, True])
    metrics = floats(rollout_metrics(rollout, rollout.log_probs))
    assert metrics["completions/mean_terminated_length"] == 1.5


# Every logged name, by value: an update


def softmax_by_loop(policy, params, e, temperature):
    """Returns (log pi [B,T,V]) from one full forward pass, float64."""
    tokens = jnp.concatenate([e.prompt_tokens, e.tokens], axis=1)
    mask = jnp.concatenate([e.prompt_mask, e.mask], axis=1)
    positions = jnp.clip(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, _ = policy.forward(params, tokens, mask, positions, None)
    logits = np.asarray(policy.unembed(params, hidden[:, e.prompt_tokens.shape[1] - 1 : -1]), np.float64)
    logits = logits / temperature
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def surrogate_by_loop(name, d, log_prob, advantage, row_d, clip) -> tuple[float, bool]:
    """Returns (surrogate to be minimised, whether its gradient is cut) of one token."""
    rho = math.exp(d)
    if name == "clipped":
        low, high = 1 - clip["clip_range"], 1 + clip.get("clip_range_high", clip["clip_range"])
        value = -min(rho * advantage, min(max(rho, low), high) * advantage)
        return value, rho > high if advantage > 0 else rho < low
    if name == "cispo":
        return -min(rho, clip["cap"]) * advantage * log_prob, False
    if name == "sapo":
        tau = clip["tau"] if advantage > 0 else clip["tau_negative"]
        return -4 / tau / (1 + math.exp(-tau * (rho - 1))) * advantage, False
    if name == "gmpo":
        bound = clip["log_clip_range"]
        inside = [min(x, bound) if advantage > 0 else max(x, -bound) for x in row_d]
        return -advantage * math.exp(sum(inside) / len(inside)), abs(d) > bound and (d > 0) == (advantage > 0)
    assert name == "reinforce"
    return -advantage * log_prob, False


def kl_by_loop(name, log_prob, ref_log_prob, d, log_pi, log_ref) -> float:
    if name == "exact":
        return sum(math.exp(p) * (p - q) for p, q in zip(log_pi, log_ref, strict=True))
    x = log_prob - ref_log_prob
    value = {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) + x - 1}[name.removeprefix("ratio_")]
    return value * math.exp(d) if name.startswith("ratio_") else value


def update_by_loops(recipe, choices, policy, params, ref_params, e, temperature) -> dict[str, float]:
    """Computes what an update logs, token by token, as the table of `grpo_jax.training.metrics` says it."""
    log_pi, log_ref = (softmax_by_loop(policy, p, e, temperature) for p in (params, ref_params))
    surrogate = choices["surrogate"]
    mask, tokens, old = (np.asarray(x) for x in (e.mask, e.tokens, np.asarray(e.old_log_probs, np.float64)))
    penalty_weights = e.weights if e.penalty_weights is None else e.penalty_weights
    n = mask.sum()
    totals = dict.fromkeys(("policy_loss", "penalty", "kl", "entropy", "ratio", "low", "high", "stale"), 0.0)
    largest = 0.0
    for i in range(len(mask)):
        steps = [t for t in range(mask.shape[1]) if mask[i, t]]
        advantage = float(e.advantages[i])
        log_probs = {t: log_pi[i, t, tokens[i, t]] for t in steps}
        d = {t: log_probs[t] - old[i, t] for t in steps}
        mean = sum(d.values()) / max(len(steps), 1)
        stale = recipe.max_staleness is not None and advantage < 0 and -mean > recipe.max_staleness
        if recipe.ratio_level != "token":
            d = dict.fromkeys(steps, mean)
        for t in steps:
            value, cut = surrogate_by_loop(
                surrogate, d[t], log_probs[t], advantage, list(d.values()), recipe.clip
            )
            rho = math.exp(d[t])
            kl = kl_by_loop(
                choices["kl_estimator"],
                log_probs[t],
                log_ref[i, t, tokens[i, t]],
                d[t],
                log_pi[i, t],
                log_ref[i, t],
            )
            entropy = -sum(math.exp(p) * p for p in log_pi[i, t])
            totals["policy_loss"] += 0.0 if stale else float(e.weights[i, t]) * value
            in_loss = recipe.kl_coef * kl if recipe.kl_placement == "loss" else 0.0
            totals["penalty"] += float(penalty_weights[i, t]) * (
                in_loss - (recipe.entropy_coef or 0.0) * entropy
            )
            totals["kl"] += kl / n
            totals["entropy"] += entropy / n
            totals["ratio"] += rho / n
            totals["stale"] += stale / n
            totals["low"] += (cut and advantage != 0 and rho < 1) / n
            totals["high"] += (cut and advantage != 0 and rho > 1) / n
            largest = max(largest, rho)
    return {
        "loss": totals["policy_loss"] + totals["penalty"],
        "policy_loss": totals["policy_loss"],
        "kl": totals["kl"],
        "entropy": totals["entropy"],
        "ratio/mean": totals["ratio"],
        "ratio/max": largest,
        "clip_ratio/low_mean": totals["low"],
        "clip_ratio/high_mean": totals["high"],
        "clip_ratio/region_mean": totals["low"] + totals["high"],
        "stale_tokens": totals["stale"],
    }


EVERYTHING = {
    "aggregation": "normalize_then_sum", "advantage": "batch", "missing": "renormalize", "kl_coef": 0.1,
    "kl_estimator": "ratio_k3", "kl_on_dead_groups": False, "entropy_coef": 0.05, "top_entropy": 0.5,
    "importance_cap": 1.2, "max_staleness": 0.05, "mask_truncated": True,
}  # fmt: skip
UPDATES = {
    "grpo, batch scaling": {"recipe": "grpo", "advantage": "batch", "kl_coef": 0.1},
    "dapo, all around it": {"recipe": "dapo", "clip_range": 0.02, **EVERYTHING},
    "gspo, gdpo": {"recipe": "gspo", "aggregation": "gdpo", "clip_range": 0.01, "kl_estimator": "k2"},
    "dr_grpo, exact KL": {"recipe": "dr_grpo", "kl_coef": 0.1, "kl_estimator": "exact"},
    "gmpo, missing dropped": {"recipe": "gmpo", "log_clip_range": 0.2, "missing": "drop", "kl_coef": 0.1},
    "cispo": {"recipe": "cispo", "cap": 1.1, "missing": "renormalize"},
    "sapo, batch scaling": {"recipe": "sapo", "advantage": "batch"},
    "rloo": {"recipe": "rloo"},
    "reinforce": {"recipe": "reinforce", "entropy_coef": 0.1},
}
N, G, S, V, TEMPERATURE = 4, 4, 3, 13, 0.9


@pytest.fixture(scope="module")
def arithmetic():
    return load_model("packaged:arithmetic")


@pytest.fixture(scope="module")
def judged(toy_policy) -> Judged:
    """Four groups with two reward functions, values missing, the third dead; sampled a while ago."""
    rng = np.random.default_rng(3)
    rows = N * G
    lengths = rng.integers(1, T + 1, rows)
    mask = np.arange(T) < lengths[:, None]
    rollout = Rollout(
        prompt_tokens=jnp.asarray(rng.integers(0, V, (rows, S)), jnp.int32),
        prompt_mask=jnp.asarray(np.arange(S) >= rng.integers(0, S, (rows, 1))),
        tokens=jnp.asarray(rng.integers(0, V, (rows, T)), jnp.int32),
        mask=jnp.asarray(mask),
        log_probs=jnp.zeros((rows, T)),
        kept_mass=jnp.ones((rows, T)),
        finished=jnp.asarray(lengths < T),
    )
    policy, params = toy_policy
    log_probs, entropies = completion_log_probs(policy, params, rollout, temperature=TEMPERATURE)
    noise = 0.3 * rng.normal(size=(3, rows, T)).astype(np.float32)
    scores = rng.integers(0, 2, (rows, 2)).astype(np.float32) * np.float32([1, 5])
    scores[2 * G : 3 * G] = 1.0
    scores[[1, 4, 13], [0, 1, 0]] = np.nan
    return Judged(
        rollout=rollout.replace(log_probs=jnp.where(mask, log_probs + noise[0], 0)),
        old_log_probs=jnp.where(mask, log_probs + noise[1], 0),
        entropies=entropies,
        ref_log_probs=jnp.where(mask, log_probs + noise[2], 0),
        scores=scores,
    )


def experience_of(judged, recipe, **changes):
    settings = {"reward_weights": [1.0, 0.5], "group_size": G, "max_length": T}
    lengths = np.sum(judged.rollout.mask, axis=1)
    totals = add_up_rewards(judged.scores, lengths, judged.rollout.finished, recipe, **settings)
    return make_experience(judged.replace(totals=totals), recipe, prompt_length=S, **settings, **changes)


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_by_value(toy_policy, judged, name, num_microbatches):
    policy, params = toy_policy
    choices = dict(UPDATES[name])
    recipe = make_recipe(choices.pop("recipe"), **choices)
    ref_params = jax.tree.map(lambda x: x * 1.1, params)
    ref_log_probs, _ = completion_log_probs(policy, ref_params, judged.rollout, temperature=TEMPERATURE)
    judged = judged.replace(ref_log_probs=None if recipe.exact_kl else ref_log_probs)
    e = experience_of(judged, recipe, num_live=3)
    functions = {function: key for key, function in SURROGATES.items()}
    names = {"surrogate": functions[recipe.surrogate], "kl_estimator": recipe.kl_estimator.__name__[3:]}
    names |= {key: value for key, value in choices.items() if key in names}
    expected = update_by_loops(recipe, names, policy, params, ref_params, e, TEMPERATURE)
    settings = {"recipe": recipe, "num_microbatches": num_microbatches, "temperature": TEMPERATURE}
    ref = {"ref_params": ref_params} if recipe.exact_kl else {}
    state, metrics = train_step(init_train_state(policy, params, SGD), e, **settings, **ref)
    moved = [
        np.asarray(a - b, np.float64)
        for a, b in zip(*map(jax.tree.leaves, (params, state.params)), strict=True)
    ]
    expected["grad_norm"] = math.sqrt(sum((x**2).sum() for x in moved)) / LEARNING_RATE
    counters = ("skipped_updates", "skipped_updates_in_a_row", "idle_updates")
    assert floats(metrics) == pytest.approx(expected | dict.fromkeys(counters, 0), rel=1e-3, abs=2e-5)
    assert np.asarray(e.mask)[: 3 * G].all(axis=1).any() and not np.asarray(e.mask)[3 * G :].any()
    if recipe.max_staleness is not None:
        assert expected["stale_tokens"] > 0
    if names["surrogate"] in ("clipped", "gmpo"):
        assert min(expected["clip_ratio/low_mean"], expected["clip_ratio/high_mean"]) > 0


def test_counters_of_updates(toy_policy, judged):
    """Good, not finite, not finite, without a gradient, not finite, good."""
    policy, params = toy_policy
    good = experience_of(judged, dr_grpo)
    bad = good.replace(advantages=good.advantages.at[0].set(jnp.nan))
    dead = good.replace(advantages=jnp.zeros_like(good.advantages))
    state, seen = init_train_state(policy, params, SGD), []
    for experience in (good, bad, bad, dead, bad, good):
        state, metrics = train_step(state, experience, recipe=dr_grpo)
        names = ("skipped_updates", "skipped_updates_in_a_row", "idle_updates")
        seen.append(tuple(int(metrics[name]) for name in names))
    assert seen == [(0, 0, 0), (1, 1, 0), (2, 2, 0), (2, 0, 1), (3, 1, 1), (3, 0, 1)]


# Every logged name, by value: a rollout


def rewards_by_loop(scores, lengths, weights, recipe, limit, size) -> list[float | None]:
    """Returns the reward of every completion, None where it does not count."""
    rewards, buffer = [], recipe.overlong_tokens(limit)
    for i, (row, length) in enumerate(zip(scores, lengths, strict=True)):
        group = scores[i // size * size : i // size * size + size]
        applies = sum(any(sibling[r] == sibling[r] for sibling in group) for r in range(len(weights)))
        given = [(s, w) for s, w in zip(row, weights, strict=True) if s == s]
        total = sum(s * w for s, w in given)
        if recipe.missing == "renormalize" and given:
            total *= sum(weights) / sum(w for _, w in given)
        dropped = not given or (recipe.missing == "drop" and len(given) < applies)
        penalty = min(0.0, max(-1.0, (limit - buffer - length) / buffer)) if buffer else 0.0
        rewards.append(None if dropped else total + penalty)
    return rewards


def rollout_by_loops(records, scores, scored, rewards, recipe, actor) -> dict[str, float]:
    """Computes what a rollout logs, row by row; records are its rounds."""
    masks = np.concatenate([np.asarray(r.mask) for r in records])
    finished = np.concatenate([np.asarray(r.finished) for r in records])
    sampler, kept = (
        np.concatenate([np.asarray(getattr(r, k), np.float64) for r in records])
        for k in ("log_probs", "kept_mass")
    )
    lengths, limit, size = masks.sum(axis=1), actor.max_new_tokens, actor.group_size
    weights = [reward.weight for reward in rewards]
    totals = rewards_by_loop(scores, lengths, weights, recipe, limit, size)
    stds, signals = [], 0
    for start in range(0, len(totals), size):
        rows = range(start, start + size)
        there = [totals[i] for i in rows if totals[i] is not None]
        if there:
            stds.append(np.std(there, ddof=1) if len(there) > 1 else 0.0)
        if recipe.aggregation == "sum_then_normalize":
            columns = [there]
        else:
            live = [i for i in rows if totals[i] is not None]
            columns = [[s for i in live if (s := scores[i][k]) == s] for k in range(len(weights))]
            columns.append([max(0, lengths[i] - limit + recipe.overlong_tokens(limit)) for i in live])
        signals += any(len(set(np.float32(column))) > 1 for column in columns)
    counted = [total for total in totals if total is not None]
    expected = {
        "reward": np.mean(counted),
        "reward_std": np.mean(stds),
        "frac_reward_zero_std": 1 - signals / (len(totals) / size),
        "completions/mean_length": np.mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": np.mean([not x for x in finished]),
        "completions/mean_terminated_length": np.mean(
            [n for n, x in zip(lengths, finished, strict=True) if x]
        ),
    }
    for k, reward in enumerate(rewards):
        given = [row[k] for row in scores if row[k] == row[k]]
        expected |= {
            f"rewards/{reward.name}/mean": np.mean(given),
            f"rewards/{reward.name}/std": np.std(given, ddof=1),
            f"rewards/{reward.name}/missing": (len(scores) - len(given)) / len(scores),
        }
    tokens = [(i, t) for i in range(len(masks)) for t in range(masks.shape[1]) if masks[i, t]]
    differences = [scored[i, t] - sampler[i, t] for i, t in tokens]
    expected["sampling/logp_difference_max"] = max(abs(x) for x in differences)
    expected["sampling/kept_mass"] = np.mean([kept[i, t] for i, t in tokens])
    if recipe.importance_cap is not None:
        ratios = [math.exp(x) for x in differences]
        capped = [min(ratio, recipe.importance_cap) for ratio in ratios]
        expected["sampling/importance_mean"] = np.mean(capped)
        expected["sampling/importance_capped"] = np.mean([r > recipe.importance_cap for r in ratios])
    return expected


GDPO = {"kl_coef": 0.0, "aggregation": "gdpo", "advantage": "batch", "missing": "drop"}
ROLLOUTS = {
    "grpo": {"recipe": "grpo", "kl_coef": 0.0},
    "batch scaling": {"recipe": "grpo", "advantage": "batch", "kl_coef": 0.0, "importance_cap": 1.05},
    "normalized first": {"recipe": "dr_grpo", "aggregation": "normalize_then_sum", "missing": "renormalize"},
    "gdpo, batch scaling": {"recipe": "grpo", **GDPO},
    "dapo": {"recipe": "dapo", "overlong_buffer": 3},
    "dapo, one round": {"recipe": "dapo", "missing": "drop", "max_rounds": 1},
    "dapo, gdpo": {"recipe": "dapo", "aggregation": "gdpo", "overlong_buffer": 3, "importance_cap": 1.01},
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_rollout_by_value(arithmetic, monkeypatch, name):
    """Two reward functions, the second often without a value; the first group is dead."""
    choices = dict(ROLLOUTS[name])
    max_rounds = choices.pop("max_rounds", 2)
    recipe = make_recipe(choices.pop("recipe"), **choices)

    def first(prompts, completions):
        values = [float(sum(map(ord, text)) % 2) for text in completions]
        return [0.0 if p == "12+34=" else v for p, v in zip(prompts, values, strict=True)]

    def second(prompts, completions):
        digits = [sum(map(ord, text)) % 3 for text in completions]
        values = [None if digit == 2 else 1.0 + digit for digit in digits]
        return [0.5 if p == "12+34=" else v for p, v in zip(prompts, values, strict=True)]

    rewards = (
        Reward(name="first", function=first),
        Reward(name="second", function=second, weight=0.25),
    )
    inputs, scores = actor_inputs(arithmetic, rewards), []

    def judge(*args):
        verdict = inputs["judge"](*args)
        scores.append(verdict.scores)
        return verdict

    actor = Actor(
        **inputs | {"judge": judge},
        recipe=recipe,
        group_size=8,
        prompt_length=6,
        max_new_tokens=5,
        sampling={"temperature": 1.3, "top_k": 0, "top_p": 0.95, "min_p": 0.0},
        max_rounds=max_rounds,
    )
    records = []

    def generate(*args, **kwargs):
        rollout = actor_module_generate(*args, **kwargs)
        noise = 0.05 * jax.random.normal(jax.random.key(len(records)), rollout.log_probs.shape)
        records.append(rollout.replace(log_probs=jnp.where(rollout.mask, rollout.log_probs + noise, 0)))
        return records[-1]

    actor_module_generate = actor_module.generate
    monkeypatch.setattr(actor_module, "generate", generate)
    examples = [Example(prompt, {}) for prompt in ("12+34=", "68+87=", "95+79=")]
    collected = collect(
        actor,
        arithmetic.params,
        None,
        lambda round_: (examples, jax.random.fold_in(jax.random.key(5), round_)),
    )
    scored = np.concatenate(
        [completion_log_probs(arithmetic.policy, arithmetic.params, r, temperature=1.3)[0] for r in records]
    )
    everything = np.concatenate(scores).tolist()
    assert np.isnan(everything).any() and not np.isnan(everything).all()
    expected = rollout_by_loops(records, everything, scored, rewards, recipe, actor)
    if recipe.dynamic_sampling:
        alive = round((1 - expected["frac_reward_zero_std"]) * 3 * len(records))
        assert alive == 2 * max_rounds  # the first group never has a signal
        expected |= {
            "dynamic_sampling/rounds": max_rounds,
            "dynamic_sampling/missing_groups": max(0, 3 - alive),
            "dynamic_sampling/leftover_groups": max(0, alive - 3),
        }
    metrics = {k: v for k, v in collected.metrics.items() if not k.startswith("time/")}
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0 < metrics["frac_reward_zero_std"] < 1 and metrics["rewards/second/missing"] > 0


def test_functions_that_give_some_one_or_no_value():
    nan = np.nan
    scores = np.array([[1, nan, nan], [0.5, 3, nan], [nan, nan, nan], [0, nan, nan]], np.float32)
    assert metrics_module.reward_means(("some", "one", "none"), scores) == pytest.approx(
        {
            "rewards/some/mean": 0.5,
            "rewards/some/std": 0.5,
            "rewards/some/missing": 0.25,
            "rewards/one/mean": 3.0,
            "rewards/one/std": 0.0,
            "rewards/one/missing": 0.75,
            "rewards/none/missing": 1.0,
        }
    )


# Every logged name, by value: a run


def documented_names() -> list[str]:
    """Returns the names of the table, placeholders included."""
    rows = re.findall(r"^ {4}(\S.*)$", metrics_module.__doc__, re.MULTILINE)
    return [name for row in rows for name in row.split("  ")[0].split(", ")]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The rows of a plain run, and of one with everything that has names of its own."""
    runs = []
    silent = tmp_path_factory.mktemp("rewards") / "silent.py"
    silent.write_text("def silent(completions, **columns):\n    return [None] * len(completions)\n")
    everything = {
        "algorithm__name": "dapo", "algorithm__num_minibatches": 2, "algorithm__num_iterations": 2,
        "algorithm__kl_coef": 0.1, "algorithm__kl_target": 1e-4, "algorithm__importance_cap": 2,
        "training__lr_schedule": "linear", "training__num_steps": 5, "evaluation__category": "answer",
        "rewards": "[{function: numeric_answer, timeout: 60}]",
        "evaluation__rewards": f"[{{function: numeric_answer}}, {{function: '{silent}:silent'}}]",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_run.share_compilations(monkeypatch)
        for changes in ({"training__num_steps": 2}, everything):
            run_dir = tmp_path_factory.mktemp("metrics") / "run"
            assert train(small_run.config(run_dir, **changes)) == 0
            lines = (run_dir / "metrics.jsonl").read_text().splitlines()
            runs.append([json.loads(line) for line in lines])
    return runs


@pytest.mark.slow
def test_every_logged_name_is_defined_and_the_other_way_round(logged):
    names = documented_names()
    assert len(names) == len(set(names)) > 40
    # <name> is that of a reward function, <category> a value of a column, @k a number of samples
    patterns = {n: re.sub("<name>|<category>", "[^/]+", re.escape(n)).replace("@k", r"@\d+") for n in names}
    seen = {name for run in logged for row in run for name in row} - {"step"}
    undefined = {s for s in seen if not any(re.fullmatch(p, s) for p in patterns.values())}
    unseen = {n for n, p in patterns.items() if not any(re.fullmatch(p, s) for s in seen)}
    assert not undefined and not unseen


@pytest.mark.slow
def test_what_a_run_adds(logged):
    """Learning rate, coefficient, token count and times, over updates that share rollouts."""
    rows = [row for row in logged[1] if "loss" in row]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-4 * (5 - k) / 5 for k in range(5)])
    for before, after in itertools.pairwise(rows):  # the controller moves by 2 percent at most
        assert not 0.8e-4 < before["kl"] < 1.2e-4
        factor = 1.02 if before["kl"] > 1e-4 else 0.98
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * factor)
    assert rows[0]["kl"] < 1e-4 < rows[1]["kl"] and rows[0]["kl_coef"] == pytest.approx(0.1)
    fresh = [True, False, False, False, True]  # 2 mini-batches x 2 passes
    for row, new in zip(rows, fresh, strict=True):
        for name in ("time/generate", "time/reward", "time/score"):
            assert (row[name] > 0) == new
        parts = sum(value for name, value in row.items() if name.startswith("time/"))
        assert 0 < row["time/update"] <= parts <= row["step_time"] * 1.01
    assert [row["num_tokens"] for row in rows[:4]] == [rows[0]["num_tokens"]] * 4
    assert rows[4]["num_tokens"] > rows[0]["num_tokens"]


@pytest.mark.slow
def test_num_tokens_counts_prompts_and_completions(logged):
    expected = 0.0
    for row in (row for row in logged[0] if "loss" in row):
        expected += 32 * row["completions/mean_length"]
        prompts = row["num_tokens"] - expected  # one token per character, 4 to 6 of them
        assert 4 * 32 * row["step"] <= round(prompts) <= 6 * 32 * row["step"] and prompts % 1 < 1e-3


@pytest.mark.slow
def test_the_learning_rate_counts_updates_that_moved_something(tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(
        "calls = []\n"
        "def late(completions):\n"
        "    calls.append(1)\n"
        "    return [float(len(calls) in (2, 5) and i % 2) for i in range(len(completions))]\n"
    )
    small_run.share_compilations(monkeypatch)
    changes = {
        "rewards": f"[{{function: '{tmp_path}/late.py:late'}}]", "training__lr_schedule": "linear",
        "training__num_steps": 6, "algorithm__kl_coef": 0, "evaluation__num_prompts": 0,
    }  # fmt: skip
    assert train(small_run.config(tmp_path / "run", **changes)) == 0
    rows = small_run.rows(tmp_path / "run")
    assert [row["idle_updates"] for row in rows] == [1, 1, 2, 3, 3, 4]
    assert [row["grad_norm"] > 0 for row in rows] == [False, True, False, False, True, False]
    moved = [0, 0, 1, 1, 1, 2]  # before each
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-4 * (6 - k) / 6 for k in moved])
