"""The actor: prompts -> rollout -> rewards -> Experience. The boundary between device and host."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.data import Example
from grpo_jax.decoding import generate
from grpo_jax.log_probs import completion_log_probs
from grpo_jax.metrics import reward_metrics, rollout_metrics
from grpo_jax.models import Model, decode, encode, pad_prompts
from grpo_jax.recipes import Recipe
from grpo_jax.rewards import Reward, combine, score
from grpo_jax.types import Array, Experience, Params, Rollout


@dataclass(frozen=True, kw_only=True)
class Actor:
    """What stays the same from step to step.

    Args:
        model: functions, tokenizer and eos ids; its own params are not used.
        recipe: the objective.
        rewards: reward functions.
        group_size: G.
        prompt_length: S of every Experience; no prompt may be longer.
        max_new_tokens: T.
        sampling: temperature, top_k, top_p, min_p of `generate`.
        num_microbatches: slices of the batch in scoring.
    """

    model: Model
    recipe: Recipe
    rewards: tuple[Reward, ...]
    group_size: int
    prompt_length: int
    max_new_tokens: int
    sampling: Mapping[str, float]
    num_microbatches: int = 1


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One rollout, judged: what the learner needs, what the log needs, what a human wants to read."""

    experience: Experience
    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # B rows: prompt, completion, reward, advantage, rewards/<name>


def bucket_length(length: int, limit: int) -> int:
    """Returns the padded prompt length: 8, 16, 24, 32, 48, 64, 96, 128, ..., at most limit.

    Two sizes per octave bound both the padding (a third) and the number of compilations.
    """
    size = 8
    while size < length:
        octave = 1 << (size.bit_length() - 1)
        size += max(octave // 2, 8)
    return min(size, limit)


def judge(
    rewards: Sequence[Reward], examples: Sequence[Example], texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores completions with every reward function.

    Args:
        rewards: R reward functions.
        examples: B examples, one per completion.
        texts: B completions.

    Returns:
        (scores [B,R] with NaN for missing, rewards [B] weighted sums, valid [B] bool).

    Raises:
        RewardError: a reward function failed, named with its row.
    """
    columns = {name: [example.columns[name] for example in examples] for name in examples[0].columns}
    scores = score(rewards, [example.prompt for example in examples], texts, columns)
    return scores, *combine(scores, [reward.weight for reward in rewards])


def collect(
    actor: Actor, params: Params, ref_params: Params | None, examples: Sequence[Example], key: Array
) -> Collected:
    """Samples completions of N prompts, scores and rewards them.

    Args:
        actor: what stays the same.
        params: of the policy that samples.
        ref_params: of the frozen reference; None: no KL term.
        examples: N prompts with their columns.
        key: of this step; see `generate`.

    Raises:
        RewardError: a reward function failed.
        ValueError: a prompt is longer than actor.prompt_length.
    """
    started = time.perf_counter()
    rollout = _rollout(actor, params, examples, key)
    texts = decode(actor.model, np.asarray(rollout.tokens), np.asarray(rollout.mask))
    generated = time.perf_counter()

    # Dispatched, not awaited: the device scores while the host rewards.
    old_log_probs, ref_log_probs = _score(actor, params, ref_params, rollout)
    repeated = [example for example in examples for _ in range(actor.group_size)]
    scores, rewards, valid = judge(actor.rewards, repeated, texts)
    rewarded = time.perf_counter()

    groups = (len(examples), actor.group_size)
    advantages = actor.recipe.advantages(rewards.reshape(groups), valid=valid.reshape(groups)).reshape(-1)
    measured = {
        **reward_metrics(rewards.reshape(groups), valid.reshape(groups)),
        **rollout_metrics(rollout, old_log_probs),
    }
    experience = _experience(actor, rollout, advantages, old_log_probs, ref_log_probs)
    jax.block_until_ready((experience, measured))
    metrics = {
        **{name: float(value) for name, value in measured.items()},
        **_each_reward(actor.rewards, scores),
        "time/generate": generated - started,
        "time/reward": rewarded - generated,
        "time/score": time.perf_counter() - rewarded,
    }
    return Collected(
        experience=experience,
        metrics=metrics,
        samples=_samples(actor.rewards, repeated, texts, scores, rewards, valid, np.asarray(advantages)),
    )


def _rollout(actor: Actor, params: Params, examples: Sequence[Example], key: Array) -> Rollout:
    sequences = encode(actor.model, [example.prompt for example in examples])
    longest = max(len(sequence) for sequence in sequences)
    if longest > actor.prompt_length:
        raise ValueError(f"a prompt has {longest} tokens, more than the {actor.prompt_length} of this run")
    prompts = pad_prompts(sequences, bucket_length(longest, actor.prompt_length))
    rollout = generate(
        actor.model.policy,
        params,
        prompts,
        key,
        group_size=actor.group_size,
        max_new_tokens=actor.max_new_tokens,
        eos_ids=jnp.asarray(actor.model.eos_ids, jnp.int32),
        **actor.sampling,
    )
    return jax.block_until_ready(rollout)


def _score(actor: Actor, params: Params, ref_params: Params | None, rollout: Rollout):
    """Returns (old_log_probs [B,T], ref_log_probs [B,T] | None)."""

    def log_probs(params):
        return completion_log_probs(
            actor.model.policy,
            params,
            rollout,
            temperature=actor.sampling["temperature"],
            num_microbatches=actor.num_microbatches,
        )[0]

    return log_probs(params), None if ref_params is None else log_probs(ref_params)


def _experience(actor: Actor, rollout: Rollout, advantages, old_log_probs, ref_log_probs) -> Experience:
    # Generation runs in length buckets; the learner compiles once, for the longest prompt of the run.
    padding = ((0, 0), (actor.prompt_length - rollout.prompt_tokens.shape[1], 0))
    return Experience(
        prompt_tokens=jnp.pad(rollout.prompt_tokens, padding),
        prompt_mask=jnp.pad(rollout.prompt_mask, padding),
        tokens=rollout.tokens,
        mask=rollout.mask,
        advantages=advantages,
        weights=actor.recipe.weights(rollout.mask, max_length=actor.max_new_tokens),
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
    )


def _each_reward(rewards: Sequence[Reward], scores: np.ndarray) -> dict[str, float]:
    """Returns rewards/<name>/mean and /std over the values each function gave (0 if it gave none)."""
    metrics = {}
    for reward, column in zip(rewards, scores.astype(np.float64).T, strict=True):
        values = column[~np.isnan(column)]
        metrics[f"rewards/{reward.name}/mean"] = float(values.mean()) if values.size else 0.0
        metrics[f"rewards/{reward.name}/std"] = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return metrics


def _samples(rewards, examples, texts, scores, totals, valid, advantages) -> list[dict[str, Any]]:
    def number(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    return [
        {
            "prompt": example.prompt,
            "completion": text,
            "reward": float(total) if ok else None,
            "advantage": float(advantage),
            **{f"rewards/{reward.name}": number(value) for reward, value in zip(rewards, row, strict=True)},
        }
        for example, text, row, total, ok, advantage in zip(
            examples, texts, scores, totals, valid, advantages, strict=True
        )
    ]
