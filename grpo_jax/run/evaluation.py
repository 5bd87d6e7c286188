"""Evaluates a run on its held-out prompts, as its config says."""

from collections.abc import Callable

from grpo_jax.evaluation.outcomes import Outcome, observe, summarize
from grpo_jax.evaluation.standstill import remarks
from grpo_jax.run.build import Parts
from grpo_jax.types import Params


def observe_parts(parts: Parts, params: Params) -> Outcome:
    """Observes params on a run's held-out prompts, as its config says."""
    evaluation, sampling = parts.config.evaluation, parts.sampling
    if evaluation.temperature is not None:
        sampling = {**sampling, "temperature": evaluation.temperature}
    return observe(
        parts.model,
        params,
        parts.task.evaluation,
        parts.rewards,
        num_samples=evaluation.num_samples,
        max_new_tokens=parts.config.sampling.max_new_tokens,
        sampling=sampling,
        batch_size=evaluation.batch_size,
        prompt_length=parts.eval_prompt_length,
        seed=parts.config.training.seed,
        eval_rewards=parts.eval_rewards,
        correct=parts.correct,
    )


def summarize_parts(parts: Parts, outcome: Outcome) -> dict[str, float]:
    """Summarizes an outcome on a run's held-out prompts, as its config says."""
    return summarize(outcome, [*parts.rewards, *parts.eval_rewards], parts.categories)


def evaluate_parts(
    parts: Parts, params: Params, say: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Evaluates params on a run's held-out prompts, as its config says.

    Args:
        parts: the run.
        params: parameters of the policy.
        say: a function that takes each line on what these figures cannot tell. `None` says nothing.

    Returns:
        the figures by name; {} if the run has no held-out prompts.
    """
    if not parts.task.evaluation:
        return {}
    outcome = observe_parts(parts, params)
    for line in remarks_parts(parts, outcome) if say is not None else ():
        say(line)
    return summarize_parts(parts, outcome)


def remarks_parts(parts: Parts, outcome: Outcome) -> list[str]:
    """Returns a line for each figure of an outcome that cannot tell one model from another."""
    return remarks(
        outcome,
        [*parts.rewards, *parts.eval_rewards],
        parts.correct,
        categories=parts.categories,
        best_metric=parts.config.checkpoints.best_metric,
    )
