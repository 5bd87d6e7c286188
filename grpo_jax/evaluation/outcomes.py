"""Samples, judges, summarizes and compares what a model makes of prompts, with k samples of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from grpo_jax.data.encoded_examples import tokens_of
from grpo_jax.evaluation.statistics import doublings, paired_bootstrap, pass_at_k
from grpo_jax.evaluation.verdicts import Correct, choose_correct
from grpo_jax.models.completing import complete
from grpo_jax.models.loading import Model
from grpo_jax.policy.shapes import padded_length, token_lists
from grpo_jax.rewards.extras import Extras, TrainerState
from grpo_jax.rewards.judging import judge
from grpo_jax.rewards.loading import Reward
from grpo_jax.training.experience import combine
from grpo_jax.training.metrics import reward_means
from grpo_jax.types import Example, Params

# Evaluation noise must not repeat that of a training step. Steps count up from 0 and never get here.
_NOISE_STEP = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """B completions."""

    texts: list[str]
    ids: list[list[int]]  # token ids without padding
    finished: np.ndarray  # [B] bool

    @property
    def lengths(self) -> np.ndarray:
        """The lengths [B] in tokens."""
        return np.array([len(ids) for ids in self.ids])


def sample_completions(
    model: Model,
    params: Params,
    examples: Sequence[Example],
    *,
    group_size: int,
    prompt_length: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    sampling: Mapping[str, float],
) -> Sampled:
    """Samples group_size completions of each example, a fixed number of prompts at a time.

    Returns:
        N*G completions, prompt-major.
    """
    key = jax.random.fold_in(jax.random.key(seed), _NOISE_STEP)
    sequences = tokens_of(model, examples)
    size = min(max(1, batch_size // group_size), len(sequences))
    texts: list[str] = []
    ids: list[list[int]] = []
    finished = []
    for start in range(0, len(sequences), size):
        part = sequences[start : start + size]
        rows = len(part) * group_size
        # The last part is filled up to the one compiled shape. Its extra rows are dropped.
        filled = part + [part[0]] * (size - len(part))
        found, rollout = complete(
            model,
            params,
            filled,
            key,
            prompt_length=prompt_length,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            first_row=start * group_size,
            **sampling,
        )
        texts += found[:rows]
        ids += token_lists(np.asarray(rollout.tokens)[:rows], np.asarray(rollout.mask)[:rows])
        finished.append(np.asarray(rollout.finished)[:rows])
    return Sampled(texts=texts, ids=ids, finished=np.concatenate(finished))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a model made of N held-out prompts, with k samples of each."""

    greedy: np.ndarray  # [N] bool, whether the greedy completion is correct
    correct: np.ndarray  # [N,k] bool, whether each sample is correct
    scores: np.ndarray  # [N*k,R] float32, NaN where missing; rewards of evaluation only are last
    totals: np.ndarray  # [N,k] float32, weighted sums of the training rewards
    valid: np.ndarray  # [N,k] bool, True where totals count
    lengths: np.ndarray  # [N*k] tokens
    finished: np.ndarray  # [N*k] bool
    # means of what reward functions logged about the samples, by name
    logged: Mapping[str, float] = field(default_factory=dict)


def observe(
    model: Model,
    params: Params,
    examples: Sequence[Example],
    rewards: Sequence[Reward],
    *,
    num_samples: int,
    max_new_tokens: int,
    sampling: Mapping[str, float],
    batch_size: int = 256,
    prompt_length: int | None = None,
    seed: int = 0,
    eval_rewards: Sequence[Reward] = (),
    correct: Correct | None = None,
    trainer_state: TrainerState | None = None,
) -> Outcome:
    """Completes held-out prompts, greedily and with num_samples samples each, and judges the completions.

    The noise depends on the seed alone, so outcomes of two models, or of two steps of one run, are paired.

    Args:
        model: functions and tokenizer.
        params: parameters to evaluate.
        examples: held-out prompts with their columns, at least one.
        rewards: reward functions of the training. Their weighted sum is the total.
        num_samples: k.
        max_new_tokens: T.
        sampling: temperature, top_k, top_p and min_p of the sampled part.
        batch_size: number of completions decoded at once.
        prompt_length: length of the longest prompt in tokens. None means that it is computed.
        seed: seed of the sampling noise.
        eval_rewards: reward functions that take no part in the total.
        correct: rule that says when a completion is correct. None means that `choose_correct` decides.
        trainer_state: how far the training is, for reward functions that ask. None means its start.

    Raises:
        ValueError: there are no examples.
        RewardError: a reward function failed.
    """
    if not examples:
        raise ValueError("evaluation needs at least one held-out prompt; there are none")
    if prompt_length is None:
        prompt_length = max(len(s) for s in tokens_of(model, examples))
    settings = {
        "prompt_length": padded_length(prompt_length, max_new_tokens, model.max_positions),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
    }
    functions = [*rewards, *eval_rewards]
    if correct is None:
        correct = choose_correct(rewards, eval_rewards, columns=examples[0].columns)
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    state = trainer_state or TrainerState()
    one = sample_completions(model, params, examples, group_size=1, sampling=greedy, **settings)
    extras = Extras(completion_ids=one.ids, trainer_state=state)
    greedy_scores = judge([functions[correct.index]], examples, one.texts, extras)[:, 0]

    sampled = sample_completions(
        model, params, examples, group_size=num_samples, sampling=sampling, **settings
    )
    extras = Extras(completion_ids=sampled.ids, trainer_state=state)
    repeated = [example for example in examples for _ in range(num_samples)]
    scores = judge(functions, repeated, sampled.texts, extras)
    totals, valid = combine(
        scores[:, : len(rewards)], [reward.weight for reward in rewards], group_size=num_samples
    )
    groups = (len(examples), num_samples)
    return Outcome(
        greedy=correct.judge(greedy_scores),
        correct=correct.judge(scores[:, correct.index]).reshape(groups),
        scores=scores,
        totals=totals.reshape(groups),
        valid=valid.reshape(groups),
        lengths=sampled.lengths,
        finished=sampled.finished,
        logged={name: float(np.mean(values)) for name, values in extras.logged.metrics.items()},
    )


def summarize(
    outcome: Outcome, rewards: Sequence[Reward], categories: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Turns an outcome into metrics, which `grpo_jax.training.metrics` defines.

    Args:
        outcome: outcome on N prompts.
        rewards: the R reward functions of its scores.
        categories: category -> rows of its prompts.
    """
    k = outcome.correct.shape[1]
    valid = outcome.valid
    # Rewards that were lost to a timeout are missing as well.
    figures = {
        f"eval/{name}": value
        for name, value in reward_means([reward.name for reward in rewards], outcome.scores).items()
        if name.endswith("/mean") or (name.endswith("/missing") and value > 0)
    }
    results = {
        **{f"eval/{name}": value for name, value in outcome.logged.items()},
        "eval/greedy_accuracy": float(outcome.greedy.mean()),
        f"eval/mean@{k}": float(outcome.correct.mean()),
        # pass@1 is mean@k.
        **{f"eval/pass@{j}": pass_at_k(outcome.correct, j) for j in doublings(k) if j > 1 or k == 1},
        "eval/reward": float(outcome.totals[valid].mean()) if valid.any() else 0.0,
        **figures,
        "eval/mean_length": float(outcome.lengths.mean()),
        "eval/clipped_ratio": float(1.0 - outcome.finished.mean()),
    }
    for category, rows in categories.items():
        correct = outcome.correct[list(rows)]
        results[f"eval/{category}/greedy_accuracy"] = float(outcome.greedy[list(rows)].mean())
        results[f"eval/{category}/mean@{k}"] = float(correct.mean())
        results[f"eval/{category}/pass@{k}"] = pass_at_k(correct, k)
    return results


def compare(outcome: Outcome, baseline: Outcome, *, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Compares two outcomes on the same prompts.

    Returns:
        metric -> (difference, low, high). The difference is the outcome's value minus the baseline's. Low and
        high are the 95 % interval of a paired bootstrap over prompts.
    """
    k = outcome.correct.shape[1]
    pairs = {
        "eval/greedy_accuracy": [(one.greedy, None) for one in (outcome, baseline)],
        f"eval/mean@{k}": [(one.correct.mean(axis=1), None) for one in (outcome, baseline)],
        "eval/reward": [
            ((one.totals * one.valid).sum(axis=1, dtype=np.float64), one.valid.sum(axis=1))
            for one in (outcome, baseline)
        ],
    }
    return {
        name: paired_bootstrap(mine, theirs, counts=my_counts, baseline_counts=their_counts, seed=seed)
        for name, ((mine, my_counts), (theirs, their_counts)) in pairs.items()
    }
