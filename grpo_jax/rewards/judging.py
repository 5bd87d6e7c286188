"""Judges completions by every reward function, and finds the functions that say nothing."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.extras import Extras, TrainerState
from grpo_jax.rewards.reward import Reward
from grpo_jax.rewards.silences import find_silences, lost_rows
from grpo_jax.types import Example, Verdict


def judge(
    rewards: Sequence[Reward],
    examples: Sequence[Example],
    texts: Sequence[str],
    extras: Extras | None = None,
) -> np.ndarray:
    """Judges completions by every reward function.

    Args:
        rewards: R reward functions.
        examples: B examples, one per completion.
        texts: B completions.
        extras: token ids and the state of the training, and a log, for functions that name them.

    Returns:
        scores [B,R] float32. NaN means that there is no reward.

    Raises:
        RewardError: a reward function failed. The message names the function and the row.
    """
    columns = {name: [example.columns[name] for example in examples] for name in examples[0].columns}
    prompts = [example.prompt for example in examples]
    return call_rewards(rewards, prompts, texts, columns, extras=extras)


def reach_verdict(
    rewards: Sequence[Reward],
    examples: Sequence[Example],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    trainer_state: TrainerState | None = None,
) -> Verdict:
    """Judges the completions of a rollout and looks for rewards that say nothing about them.

    Args:
        rewards: R reward functions.
        examples: B examples, one per completion.
        texts: B completions.
        completion_ids: token ids of the completions.
        trainer_state: how far the training is.

    Raises:
        RewardError: a reward function failed.
    """
    extras = Extras(completion_ids=completion_ids, trainer_state=trainer_state or TrainerState())
    scores = judge(rewards, examples, texts, extras)
    lost = lost_rows(rewards)
    return Verdict(
        scores=scores,
        silences=find_silences(rewards, examples, texts, scores, lost),
        num_lost={
            reward.name: len(rows)
            for reward, rows in zip(rewards, lost, strict=True)
            if reward.pool is not None
        },
        logged=extras.logged.metrics,
        columns=extras.logged.columns,
    )
