"""A rehearsal of a run: what the base model and the rewards make of training prompts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_jax.data.loading import batch
from grpo_jax.evaluation.outcomes import Sampled, sample_completions
from grpo_jax.evaluation.statistics import doublings, pass_at_k, subsets
from grpo_jax.evaluation.verdicts import Correct, choose_correct
from grpo_jax.policy.shapes import padded_length
from grpo_jax.rewards.extras import Extras, TrainerState
from grpo_jax.rewards.judging import judge
from grpo_jax.rewards.silences import find_silences, lost_rows
from grpo_jax.run.build import Run
from grpo_jax.trackers.console import spread
from grpo_jax.training.experience import add_up_rewards
from grpo_jax.types import Example, Silence, Totals

_BINS = 8  # number of bins in a histogram
# The figures of a distribution that are reported.
QUANTILES = {"min": 0.0, "25%": 0.25, "50%": 0.5, "75%": 0.75, "max": 1.0}


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """N training prompts with n judged completions each; the n rows of a prompt follow each other."""

    examples: list[Example]  # N
    texts: list[str]  # N*n
    lengths: np.ndarray  # [N*n] tokens
    finished: np.ndarray  # [N*n] bool
    scores: np.ndarray  # [N*n,R] float32, NaN for missing
    rewards: np.ndarray  # [N*n] float32, what trains: the weighted sum and the overlong penalty
    valid: np.ndarray  # [N*n] bool, where rewards count
    tokens_per_second: float  # speed of sampling, without the compilation
    seconds_per_call: dict[str, float]  # reward function -> mean seconds of a call
    rows_per_call: int
    silences: tuple[Silence, ...] = ()  # rewards that say nothing, each with a row

    @property
    def num_samples(self) -> int:
        """Returns n."""
        return len(self.texts) // len(self.examples)


def rehearse(run: Run, *, num_prompts: int, num_samples: int) -> Rehearsal:
    """Samples and judges completions of the first prompts of a run, as its config says, without training.

    Args:
        run: the run.
        num_prompts: number N of prompts, at most as many as there are training prompts.
        num_samples: number n of completions of a prompt.

    Raises:
        RewardError: a reward function failed.
    """
    config = run.config
    num_prompts = min(num_prompts, len(run.task.train))
    examples = batch(run.task.train, seed=config.training.seed, step=0, num_prompts=num_prompts)
    settings = {
        "group_size": num_samples,
        "prompt_length": padded_length(
            run.prompt_length, config.sampling.max_new_tokens, run.model.max_positions
        ),
        "max_new_tokens": config.sampling.max_new_tokens,
        "batch_size": config.evaluation.batch_size,
        "seed": config.training.seed,
        "sampling": run.sampling,
    }
    params = run.start_params()
    # Compiles, so that the time is that of sampling.
    sample_completions(
        run.model,
        params,
        examples[: max(1, config.evaluation.batch_size // num_samples)],
        **settings,
    )
    started = time.perf_counter()
    sampled = sample_completions(run.model, params, examples, **settings)
    seconds = time.perf_counter() - started

    repeated = [example for example in examples for _ in range(num_samples)]
    rows = config.num_prompts * config.algorithm.group_size  # rows of one rollout
    scores, seconds_per_call, lost = _judge(run, repeated, sampled, rows)
    totals = _add_up(run, scores, sampled.lengths, sampled.finished, group_size=num_samples)
    return Rehearsal(
        examples=examples,
        texts=sampled.texts,
        lengths=sampled.lengths,
        finished=sampled.finished,
        scores=scores,
        rewards=totals.rewards,
        valid=totals.valid,
        tokens_per_second=float(sampled.lengths.sum() / seconds),
        seconds_per_call=seconds_per_call,
        rows_per_call=min(rows, len(sampled.texts)),
        silences=tuple(find_silences(run.rewards, repeated, sampled.texts, scores, lost)),
    )


def _add_up(run: Run, scores, lengths, finished, *, group_size: int) -> Totals:
    """Adds up the rewards of groups as training does."""
    return add_up_rewards(
        scores,
        lengths,
        finished,
        run.recipe,
        reward_weights=[reward.weight for reward in run.rewards],
        max_length=run.config.sampling.max_new_tokens,
        group_size=group_size,
    )


def _judge(
    run: Run, examples: Sequence[Example], sampled: Sampled, rows: int
) -> tuple[np.ndarray, dict[str, float], list[dict[int, str]]]:
    """Calls the rewards with at most `rows` completions.

    Returns:
        (scores [B,R], mean seconds of a call by reward, for each reward the lost rows with the reason).
    """
    starts = range(0, len(sampled.texts), rows)
    state = TrainerState(max_steps=run.num_steps)
    columns: list[np.ndarray] = []
    seconds: dict[str, float] = {}
    lost: list[dict[int, str]] = []
    for reward in run.rewards:
        started = time.perf_counter()
        called = []
        gone = {}
        for start in starts:
            part = slice(start, start + rows)
            extras = Extras(completion_ids=sampled.ids[part], trainer_state=state)
            called.append(judge([reward], examples[part], sampled.texts[part], extras))
            gone |= {start + row: reason for row, reason in lost_rows([reward])[0].items()}
        seconds[reward.name] = (time.perf_counter() - started) / len(starts)
        columns.append(np.concatenate(called))
        lost.append(gone)
    return np.concatenate(columns, axis=1), seconds, lost


def dead_group_share(run: Run, rehearsal: Rehearsal, group_size: int) -> float:
    """Estimates the share of groups of G completions that teach nothing, by the rule of training.

    Every group that the samples of a prompt allow counts, or 13,000 random ones if there are more.
    """
    count = rehearsal.num_samples
    shares = []
    for start in range(0, len(rehearsal.texts), count):
        rows = start + subsets(count, group_size).reshape(-1)
        totals = _add_up(
            run,
            rehearsal.scores[rows],
            rehearsal.lengths[rows],
            rehearsal.finished[rows],
            group_size=group_size,
        )
        shares.append(1.0 - totals.signal.mean())
    return float(np.mean(shares))


def _distribution(values: np.ndarray) -> dict[str, Any]:
    """Describes values [B], of which NaN ones are missing.

    Without a valid one all figures but `missing` are None. `histogram` counts them in eight equal parts of
    the way from min to max.
    """
    valid = values[~np.isnan(values)].astype(np.float64)
    figures: dict[str, Any] = dict.fromkeys(("mean", "std", *QUANTILES, "histogram"))
    if valid.size:
        figures["mean"] = float(valid.mean())
        figures["std"] = float(valid.std(ddof=1)) if valid.size > 1 else 0.0
        figures |= {name: float(np.quantile(valid, q)) for name, q in QUANTILES.items()}
        counts, _ = np.histogram(valid, bins=_BINS, range=(valid.min(), valid.max()))
        figures["histogram"] = counts.tolist()
    return {**figures, "missing": 1.0 - valid.size / values.size}


def correct_in_training(run: Run) -> Correct:
    """Returns what counts as correct among the training rewards.

    That is what evaluation takes for it, unless a reward of evaluation alone decides there.
    """
    if run.correct.index < len(run.rewards):
        return run.correct
    return choose_correct(run.rewards, columns=run.task.train[0].columns)


def report(run: Run, rehearsal: Rehearsal) -> dict[str, Any]:
    """Turns a rehearsal into the figures that are printed."""
    num_prompts = len(rehearsal.examples)
    num_samples = rehearsal.num_samples
    verdict = correct_in_training(run)
    correct = verdict.judge(rehearsal.scores[:, verdict.index]).reshape(num_prompts, num_samples)
    sizes = {2**i for i in range(1, num_samples.bit_length())} | {run.config.algorithm.group_size}
    return {
        "model": run.model.source,
        "num_prompts": num_prompts,
        "num_samples": num_samples,
        "rewards": {
            reward.name: {
                "weight": reward.weight,
                **_distribution(column),
                "seconds_per_call": rehearsal.seconds_per_call[reward.name],
            }
            for reward, column in zip(run.rewards, rehearsal.scores.T, strict=True)
        },
        "total": _distribution(np.where(rehearsal.valid, rehearsal.rewards, np.nan)),
        "rows_per_call": rehearsal.rows_per_call,
        "dead_groups": {
            str(size): dead_group_share(run, rehearsal, size) for size in sorted(sizes) if size <= num_samples
        },
        "pass@k": {str(k): pass_at_k(correct, k) for k in doublings(num_samples)},
        "correct": {"reward": verdict.name, "threshold": verdict.threshold},
        "clipped_ratio": float(1.0 - rehearsal.finished.mean()),
        "mean_length": float(rehearsal.lengths.mean()),
        "tokens_per_second": rehearsal.tokens_per_second,
    }


def advice(figures: dict[str, Any], *, group_size: int, silences: Sequence[Silence] = ()) -> list[str]:
    """Returns a line for every figure of a report that bodes ill.

    Args:
        figures: the figures that `report` returns.
        group_size: G of the run.
        silences: rewards that say nothing, of the same completions.
    """
    lines = []
    correct = figures["correct"]
    if list(figures["pass@k"].values())[-1] == 0 and _gives_other_values(figures):
        top = np.float32(figures["rewards"][correct["reward"]]["max"])
        lines.append(
            f"no completion counts as correct: {correct['reward']} gives at most {top!s}, and correct means "
            f"{correct['threshold']:g} or more, so pass@k is 0 however good they are; see evaluation.correct"
        )
    for name, reward in figures["rewards"].items():
        if told := [silence.text for silence in silences if silence.reward == name]:
            lines += told
        elif reward["missing"] == 1:
            lines.append(
                f"the reward {name} gives no value at all and takes no part: None is not 0. Does it look "
                "for a column or a format that does not exist?"
            )
        elif reward["missing"] >= 0.5:
            lines.append(f"the reward {name} gives no value for {reward['missing']:.0%} of the completions")
        elif reward["min"] == reward["max"] and len(figures["rewards"]) > 1:
            lines.append(f"the reward {name} is {reward['min']:.4g} for every completion: it teaches nothing")
    if figures["clipped_ratio"] >= 0.5:
        lines.append(
            f"{figures['clipped_ratio']:.0%} of the completions are cut off at max_new_tokens: raise "
            "sampling.max_new_tokens, check the prompt format, or say what ends a completion with "
            "sampling.eos_token_ids (tokens) or sampling.stop (texts)"
        )
    # The share at the run's G, or at the largest size that the samples allow.
    size = str(group_size) if str(group_size) in figures["dead_groups"] else list(figures["dead_groups"])[-1]
    dead = figures["dead_groups"][size]
    if dead >= 0.9:
        lines.append(f"{dead:.0%} of groups of {size} have equal rewards and teach nothing: {_cure(figures)}")
    return lines


def _cure(figures: dict[str, Any]) -> str:
    chances = list(figures["pass@k"].values())
    if chances[0] >= 0.9:
        return "the model can do this already; take harder prompts"
    if chances[-1] > 0 or _gives_other_values(figures):
        return (
            "a larger algorithm.group_size, algorithm.dynamic_sampling or prompts of medium difficulty help"
        )
    return (
        f"{figures['correct']['reward']} is 0 for every completion. First compare the completions with what "
        "it expects; if they are simply wrong, take easier prompts, a reward with more grades, or a model "
        "that knows the format"
    )


def _gives_other_values(figures: dict[str, Any]) -> bool:
    """Says whether the reward that decides what is correct gives any completion something other than 0."""
    reward = figures["rewards"][figures["correct"]["reward"]]
    return reward["missing"] < 1 and (reward["min"] != 0 or reward["max"] != 0)


def shown_samples(run: Run, rehearsal: Rehearsal, count: int) -> list[dict[str, Any]]:
    """Returns count samples, spread evenly over the prompts, as a human reads them."""
    per_prompt = rehearsal.num_samples

    def number(value: float, valid: bool) -> float | None:
        return float(value) if valid else None

    rows = []
    for row in spread(range(len(rehearsal.texts)), count):
        scores = zip(run.rewards, rehearsal.scores[row], strict=True)
        rows.append(
            {
                "prompt": rehearsal.examples[row // per_prompt].prompt,
                "completion": rehearsal.texts[row],
                "reward": number(rehearsal.rewards[row], rehearsal.valid[row]),
                **{f"rewards/{reward.name}": number(x, not np.isnan(x)) for reward, x in scores},
            }
        )
    return rows
