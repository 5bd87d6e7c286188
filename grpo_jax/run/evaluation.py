"""Evaluates a run on its held-out prompts, as its config says."""

from collections.abc import Callable

from grpo_jax.evaluation.outcomes import Outcome, observe, summarize
from grpo_jax.evaluation.standstill import remarks
from grpo_jax.rewards.extras import TrainerState
from grpo_jax.run.build import Run
from grpo_jax.types import Params


def observe_run(run: Run, params: Params, trainer_state: TrainerState | None = None) -> Outcome:
    """Observes params on a run's held-out prompts, as its config says.

    Args:
        run: the run.
        params: parameters of the policy.
        trainer_state: how far the training is, for reward functions that ask. `None` means its start.
    """
    evaluation = run.config.evaluation
    sampling = run.sampling
    if evaluation.temperature is not None:
        sampling = {**sampling, "temperature": evaluation.temperature}
    return observe(
        run.model,
        params,
        run.task.evaluation,
        run.rewards,
        num_samples=evaluation.num_samples,
        max_new_tokens=run.config.sampling.max_new_tokens,
        sampling=sampling,
        batch_size=evaluation.batch_size,
        prompt_length=run.eval_prompt_length,
        seed=run.config.training.seed,
        eval_rewards=run.eval_rewards,
        correct=run.correct,
        trainer_state=trainer_state or TrainerState(max_steps=run.num_steps),
    )


def summarize_run(run: Run, outcome: Outcome) -> dict[str, float]:
    """Summarizes an outcome on a run's held-out prompts, as its config says."""
    return summarize(outcome, [*run.rewards, *run.eval_rewards], run.categories)


def evaluate_run(
    run: Run,
    params: Params,
    say: Callable[[str], None] | None = None,
    *,
    trainer_state: TrainerState | None = None,
) -> dict[str, float]:
    """Evaluates params on a run's held-out prompts, as its config says.

    Args:
        run: the run.
        params: parameters of the policy.
        say: a function that is called with each line on what these figures cannot tell. `None` says nothing.
        trainer_state: how far the training is, for reward functions that ask. `None` means its start.

    Returns:
        the figures by name, or {} if the run has no held-out prompts.
    """
    if not run.task.evaluation:
        return {}
    outcome = observe_run(run, params, trainer_state)
    if say is not None:
        for line in remarks_on_run(run, outcome):
            say(line)
    return summarize_run(run, outcome)


def remarks_on_run(run: Run, outcome: Outcome) -> list[str]:
    """Returns a line for each figure of an outcome that cannot tell one model from another."""
    return remarks(
        outcome,
        [*run.rewards, *run.eval_rewards],
        run.correct,
        categories=run.categories,
        best_metric=run.config.checkpoints.best_metric,
    )
