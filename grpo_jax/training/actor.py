"""The actor makes an Experience of prompts: it samples, judges and adds up, on the device and on the host."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, PRNGKeyArray

from grpo_jax.objective.recipes import Recipe
from grpo_jax.policy.decoding import generate, pad_prompts
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.policy.shapes import bucket_length, token_lists, tokens_in_use
from grpo_jax.training.dynamic_sampling import Groups, fill_batch, join_groups, take_groups, widen_prompts
from grpo_jax.training.experience import add_up_rewards, make_experience
from grpo_jax.training.metrics import reward_means, reward_metrics, rollout_metrics
from grpo_jax.training.reference import is_reference
from grpo_jax.types import Example, Experience, Judged, Params, Policy, Rollout, Silence, Verdict

# round -> (examples of its N prompts, key of its noise). A rollout counts its rounds from 0.
NextPrompts = Callable[[int], tuple[Sequence[Example], PRNGKeyArray]]


@dataclass(frozen=True, kw_only=True)
class Actor:
    """The settings and functions of sampling and judging, which stay the same from step to step.

    Args:
        policy: functions of the model.
        recipe: the objective.
        encode: (N examples) -> the token ids of their prompts.
        decode: (tokens [B,T], mask [B,T]) -> the texts of the B completions.
        judge: (B examples, B texts) -> the verdict of the reward functions. If it has a parameter
            `completion_ids`, it is also given the token ids of each completion, by that name.
        reward_weights: name -> weight of the R rewards, in the order of the columns of scores.
        eos_ids: tokens that end a completion, see `generate`.
        stop_table: stop strings that end a completion, see `generate`.
        group_size: G.
        prompt_length: S of every Experience. No prompt may be longer.
        max_new_tokens: T.
        sampling: temperature, top_k, top_p, min_p of `generate`.
        num_microbatches: number of slices of each optimizer batch in which log-probs are computed.
        num_minibatches: number of optimizer batches in one rollout.
        max_rounds: largest number of rounds of sampling, for a recipe with dynamic sampling. Others make one.
        rescores_rollout: whether the log-probs of the completions are computed again, under the policy that
            sampled. Otherwise the update takes its own log-probs as the old ones. These are the same numbers
            if it is the only update from the rollout.
    """

    policy: Policy
    recipe: Recipe
    encode: Callable[[Sequence[Example]], Sequence[Sequence[int]]]
    decode: Callable[[np.ndarray, np.ndarray], Sequence[str]]
    judge: Callable[..., Verdict]
    reward_weights: Mapping[str, float]
    eos_ids: Int[ArrayLike, "..."]
    stop_table: Int[ArrayLike, "states V"] | None = None
    group_size: int
    prompt_length: int
    max_new_tokens: int
    sampling: Mapping[str, float]
    num_microbatches: int = 1
    num_minibatches: int = 1
    max_rounds: int = 1
    rescores_rollout: bool = True


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One judged rollout: an Experience for the learner, metrics for the log and samples for a human."""

    experience: Experience
    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # one per row: prompt, completion, reward, advantage, rewards/<name>
    num_tokens: int  # prompt and completion tokens of everything sampled
    num_rounds: int  # rounds of prompts that were sampled
    leftovers: Groups | None = None  # informative groups beyond the batch
    silences: tuple[Silence, ...] = ()  # rewards that said nothing, the first of all rounds


def collect(
    actor: Actor,
    params: Params,
    ref_params: Params | None,
    next_prompts: NextPrompts,
    leftovers: Groups | None = None,
) -> Collected:
    """Samples completions of N prompts, judges them and computes their log-probs.

    With dynamic sampling only groups with a signal train. More rounds are sampled until there are enough of
    them or max_rounds is reached. Groups beyond the batch are returned for the next rollout.

    Args:
        actor: settings and functions.
        params: parameters of the policy that samples.
        ref_params: parameters of the reference, for a KL estimate. None means that there is no KL term or
            an exact one.
        next_prompts: function that gives the prompts and the key of each round.
        leftovers: groups that the rollout before left over.

    Raises:
        RewardError: a reward function failed.
        ValueError: a prompt is longer than actor.prompt_length, or a function logs a metric under the name of
            another one.
    """
    rounds: list[_Round] = []
    if not actor.recipe.dynamic_sampling:
        rounds.append(_sample_round(actor, params, ref_params, *next_prompts(0)))
        batch = rounds[0].groups
        num_live = None
        leftovers = None
    else:
        batch, num_live, leftovers = _informative_batch(
            actor, params, ref_params, next_prompts, leftovers, rounds
        )
        if leftovers is not None:  # A checkpoint has one shape, whatever the bucket of the round is.
            leftovers = replace(leftovers, judged=widen_prompts(leftovers.judged, actor.prompt_length))
    started = time.perf_counter()
    experience = make_experience(
        batch.judged,
        actor.recipe,
        prompt_length=actor.prompt_length,
        num_live=num_live,
        num_minibatches=actor.num_minibatches,
        num_microbatches=actor.num_microbatches,
        **_settings(actor),
    )
    everything = join_groups([one.groups for one in rounds]).judged
    num_lost = {name: sum(one.num_lost[name] for one in rounds) for name in rounds[0].num_lost}
    means = reward_means(list(actor.reward_weights), np.asarray(everything.scores), num_lost)
    measured = {**_measure(actor, everything), **means}
    logged = _mean_of_logged(rounds, measured)
    jax.block_until_ready(experience)
    times = {name: sum(one.times[name] for one in rounds) for name in rounds[0].times}
    times["time/score"] += time.perf_counter() - started
    if num_live is not None:
        kept = len(leftovers.samples) // actor.group_size if leftovers else 0
        measured |= {
            "dynamic_sampling/rounds": len(rounds),
            "dynamic_sampling/missing_groups": len(batch.samples) // actor.group_size - num_live,
            "dynamic_sampling/leftover_groups": kept,
        }
    return Collected(
        experience=experience,
        metrics={name: float(value) for name, value in {**measured, **logged, **times}.items()},
        samples=[
            {**sample, "advantage": float(value)}
            for sample, value in zip(batch.samples, np.asarray(experience.advantages), strict=True)
        ],
        num_tokens=int(everything.rollout.prompt_mask.sum() + everything.rollout.mask.sum()),
        num_rounds=len(rounds),
        leftovers=leftovers,
        silences=_all_silences(rounds),
    )


@dataclass(frozen=True, kw_only=True)
class _Round:
    """The judged completions of N prompts."""

    groups: Groups
    times: dict[str, float]
    silences: Sequence[Silence] = ()
    num_lost: Mapping[str, int] = field(default_factory=dict)  # see Verdict
    logged: Mapping[str, Sequence[float]] = field(default_factory=dict)  # see Verdict


def _mean_of_logged(rounds: Sequence[_Round], measured: Mapping[str, Any]) -> dict[str, float]:
    """Returns the mean of what reward functions logged under each name."""
    values: dict[str, list[float]] = {}
    for one in rounds:
        for name, some in one.logged.items():
            values.setdefault(name, []).extend(some)
    if taken := sorted(values.keys() & measured.keys()):
        raise ValueError(
            f"a reward function logs a metric {taken[0]!r}, which every run has; give it another name"
        )
    return {name: float(np.mean(some)) for name, some in values.items()}


def _all_silences(rounds: Sequence[_Round]) -> tuple[Silence, ...]:
    """Returns the first silence of each reward and kind. `lowest` counts if it holds in every round."""
    found: dict[tuple[str, str], Silence] = {}
    for one in rounds:
        for silence in one.silences:
            found.setdefault((silence.reward, silence.kind), silence)
    same = [{s.reward for s in one.silences if s.kind == "lowest"} for one in rounds]
    return tuple(s for s in found.values() if s.kind != "lowest" or all(s.reward in names for names in same))


def _informative_batch(actor, params, ref_params, next_prompts, leftovers, rounds: list[_Round]):
    """Samples rounds, which it appends to `rounds`, and returns what `fill_batch` returns."""
    informative = [] if leftovers is None else [leftovers]
    dead = None
    count = None
    found = sum(len(part.samples) // actor.group_size for part in informative)
    while len(rounds) < actor.max_rounds and (count is None or found < count):
        one = _sample_round(actor, params, ref_params, *next_prompts(len(rounds)))
        rounds.append(one)
        signal = one.groups.judged.totals.signal[:: actor.group_size]
        count = len(signal)
        if signal.any():
            informative.append(take_groups(one.groups, np.flatnonzero(signal), actor.group_size))
        if not signal.all():
            dead = take_groups(one.groups, np.flatnonzero(~signal), actor.group_size)
        found += int(signal.sum())
    alive = join_groups(informative) if informative else None
    return fill_batch(alive, dead, count=count, group_size=actor.group_size)


def add_up(actor: Actor, judged: Judged) -> Judged:
    """Returns judged completions with the totals of their rewards."""
    rollout = judged.rollout
    totals = add_up_rewards(
        np.asarray(judged.scores),
        np.asarray(rollout.mask).sum(axis=1),
        np.asarray(rollout.finished),
        actor.recipe,
        **_settings(actor),
    )
    return judged.replace(totals=totals)


def _settings(actor: Actor) -> dict[str, Any]:
    """Returns the settings that the functions of `experience` have in common."""
    return {
        "reward_weights": list(actor.reward_weights.values()),
        "max_length": actor.max_new_tokens,
        "group_size": actor.group_size,
    }


def _sample_round(actor, params, ref_params, examples: Sequence[Example], key: PRNGKeyArray) -> _Round:
    started = time.perf_counter()
    rollout = _rollout(actor, params, examples, key)
    tokens = np.asarray(rollout.tokens)
    mask = np.asarray(rollout.mask)
    texts = actor.decode(tokens, mask)
    generated = time.perf_counter()

    # This is dispatched and not awaited, so the device computes log-probs while the host calls the rewards.
    old_log_probs = None
    entropies = None
    if actor.rescores_rollout:
        old_log_probs, entropies = _log_probs(actor, params, rollout)
    ref_log_probs = None if ref_params is None else _log_probs(actor, ref_params, rollout)[0]
    if ref_log_probs is not None and old_log_probs is not None:
        # The KL in the reward of a policy that is its reference is exactly 0, whatever a program rounds. The
        # choice is made on the device, because an `if` on the host would wait for the log-probs.
        same = is_reference(params, ref_params)
        ref_log_probs = jnp.where(same, old_log_probs, ref_log_probs)
    repeated = [example for example in examples for _ in range(actor.group_size)]
    given = {}
    if "completion_ids" in inspect.signature(actor.judge).parameters:
        given["completion_ids"] = token_lists(tokens, mask)
    verdict = actor.judge(repeated, texts, **given)
    rewarded = time.perf_counter()
    judged = Judged(
        rollout=rollout,
        old_log_probs=old_log_probs,
        entropies=entropies,
        ref_log_probs=ref_log_probs,
        scores=verdict.scores,
    )
    judged = add_up(actor, judged)
    samples = _samples(actor.reward_weights, repeated, texts, judged, verdict.columns)
    jax.block_until_ready(judged)
    times = {
        "time/generate": generated - started,
        "time/reward": rewarded - generated,
        "time/score": time.perf_counter() - rewarded,
    }
    return _Round(
        groups=Groups(judged=judged, samples=samples),
        times=times,
        silences=verdict.silences,
        num_lost=verdict.num_lost,
        logged=verdict.logged,
    )


def _measure(actor: Actor, judged: Judged) -> dict[str, Any]:
    """Computes the metrics of everything that was sampled."""
    totals = judged.totals
    groups = (-1, actor.group_size)
    return {
        **reward_metrics(totals.rewards.reshape(groups), totals.valid.reshape(groups)),
        **rollout_metrics(judged.rollout, judged.old_log_probs, importance_cap=actor.recipe.importance_cap),
        "frac_reward_zero_std": 1.0 - totals.signal.mean(),
    }


def _rollout(actor: Actor, params: Params, examples: Sequence[Example], key: PRNGKeyArray) -> Rollout:
    sequences = actor.encode(examples)
    longest = max(len(sequence) for sequence in sequences)
    if longest > actor.prompt_length:
        raise ValueError(f"a prompt has {longest} tokens, more than the {actor.prompt_length} of this run")
    prompts = pad_prompts(sequences, bucket_length(longest, actor.prompt_length))
    rollout = generate(
        actor.policy,
        params,
        prompts,
        key,
        group_size=actor.group_size,
        max_new_tokens=actor.max_new_tokens,
        eos_ids=actor.eos_ids,
        stop_table=actor.stop_table,
        **actor.sampling,
    )
    return jax.block_until_ready(rollout)


def _log_probs(
    actor: Actor, params: Params, rollout: Rollout
) -> tuple[Float[ArrayLike, "B T"], Float[ArrayLike, "B T"]]:
    """Returns (log_probs, entropies)."""
    return completion_log_probs(
        actor.policy,
        params,
        rollout,
        temperature=actor.sampling["temperature"],
        group_size=actor.group_size,
        num_microbatches=actor.num_microbatches * actor.num_minibatches,
        num_tokens=tokens_in_use(rollout.mask, actor.num_microbatches * actor.num_minibatches),
    )


def _samples(names, examples, texts, judged: Judged, columns) -> list[dict[str, Any]]:
    """Returns what a human reads of every completion, with the columns that reward functions add."""

    def number(value: float | np.floating) -> float | None:
        return None if np.isnan(value) else float(value)

    totals = judged.totals
    rows = zip(examples, texts, judged.scores, totals.rewards, totals.valid, strict=True)
    return [
        {
            "prompt": example.prompt,
            "completion": text,
            "reward": float(reward) if valid else None,
            **{f"rewards/{name}": number(score) for name, score in zip(names, scores, strict=True)},
            **{name: values[row] for name, values in columns.items()},
        }
        for row, (example, text, scores, reward, valid) in enumerate(rows)
    ]
