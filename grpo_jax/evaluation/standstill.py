"""Finds figures of an evaluation that are the same for every completion, and says why."""

from collections.abc import Mapping, Sequence

import numpy as np

from grpo_jax.evaluation.outcomes import Outcome
from grpo_jax.evaluation.verdicts import Correct
from grpo_jax.rewards.loading import Reward


def remarks(
    outcome: Outcome,
    rewards: Sequence[Reward],
    correct: Correct,
    *,
    categories: Mapping[str, Sequence[int]] | None = None,
    best_metric: str | None = None,
) -> list[str]:
    """Says which figures of an evaluation cannot tell one model from another.

    Args:
        outcome: outcome on N held-out prompts.
        rewards: the R rewards of its scores.
        correct: the rule that said what is correct.
        categories: category -> rows of the prompts.
        best_metric: the metric of `summarize` that chooses the best model. None means that none does.

    Returns:
        lines for the user, most often none.
    """
    lines = [line for line in (_about_correct(outcome, correct),) if line is not None]
    if best_metric is None:
        return lines
    values = _values_behind(outcome, rewards, categories or {}, best_metric)
    if values.size and (values == values.flat[0]).all():
        lines.append(
            f"checkpoints.best_metric {best_metric} is {float(values.flat[0]):.4g} for every held-out "
            "completion of this evaluation and tells no model from another; until it moves, best/ holds the "
            "newest model that was evaluated"
        )
    return lines


def _about_correct(outcome: Outcome, correct: Correct) -> str | None:
    """Returns a line if every completion has the same verdict for a reason that is not the model."""
    column = outcome.scores[:, correct.index]
    values = column[~np.isnan(column)]
    k = outcome.correct.shape[1]
    verdicts = f"eval/greedy_accuracy, eval/mean@{k} and eval/pass@{k}"
    totals = outcome.totals[outcome.valid]
    varied = bool(totals.size and (totals != totals[0]).any())
    if outcome.correct.all() and outcome.greedy.all():
        if not varied:
            return None
        return (
            f"every held-out completion is correct ({correct}) although their rewards differ, so {verdicts} "
            "are 1 and cannot rise. A higher evaluation.correct.threshold or another "
            "evaluation.correct.reward tells them apart"
        )
    if outcome.correct.any() or outcome.greedy.any():
        return None
    if not values.size:
        return (
            f"the reward {correct.name}, which decides what is correct, gives no value for any held-out "
            f"completion, so {verdicts} are 0. Name another one in evaluation.correct.reward"
        )
    top = values.max()  # a float32, whose shortest text is read back as a threshold that it reaches
    if top == 0 and (values == 0).all():
        alone = "" if not varied else ", although other rewards differ"
        return (
            f"{correct.name} is 0 for every held-out completion{alone}, so {verdicts} are 0. If the model is "
            "not that bad, compare some completions with what the reward expects "
            "(python -m grpo_jax.score shows them)"
        )
    if top <= 0:
        return (
            f"no completion can count as correct: {correct.name} gives at most {top!s} and correct means "
            f"{correct.threshold:g} or more, so {verdicts} stay 0. It looks like a penalty: name the reward "
            "that checks the answer in evaluation.correct.reward"
        )
    return (
        f"no completion counts as correct: the largest value of {correct.name} is {top!s} and correct means "
        f"{correct.threshold:g} or more, so {verdicts} are 0. If that is the most it gives, set "
        f"evaluation.correct: {{reward: {correct.name}, threshold: {top!s}}}"
    )


def _values_behind(
    outcome: Outcome, rewards: Sequence[Reward], categories: Mapping[str, Sequence[int]], metric: str
) -> np.ndarray:
    """Returns the values that a metric averages. If all are equal, it tells nothing."""
    name = metric.removeprefix("eval/")
    rows = list(range(len(outcome.greedy)))
    for category, indices in categories.items():
        if name.startswith(f"{category}/"):
            name = name.removeprefix(f"{category}/")
            rows = list(indices)
            break
    if name.startswith(("mean@", "pass@")):
        return outcome.correct[rows]
    by_name = {
        "greedy_accuracy": outcome.greedy[rows],
        "reward": outcome.totals[outcome.valid],
        "mean_length": outcome.lengths,
        "clipped_ratio": ~outcome.finished,
    }
    for reward, column in zip(rewards, outcome.scores.T, strict=True):
        by_name[f"rewards/{reward.name}/mean"] = column[~np.isnan(column)]
        by_name[f"rewards/{reward.name}/missing"] = np.isnan(column)
    return by_name[name]
