"""Judges completions by every reward function, and finds the functions that say nothing."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.reward import Reward
from grpo_jax.rewards.silences import find_silences, lost_rows
from grpo_jax.types import Example, Verdict


def judge(rewards: Sequence[Reward], examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
    """Judges completions by every reward function.

    Args:
        rewards: R reward functions.
        examples: B examples, one per completion.
        texts: B completions.

    Returns:
        scores [B,R] float32. NaN means that there is no reward.

    Raises:
        RewardError: a reward function failed. The message names the function and the row.
    """
    columns = {name: [example.columns[name] for example in examples] for name in examples[0].columns}
    return call_rewards(rewards, [example.prompt for example in examples], texts, columns)


def reach_verdict(rewards: Sequence[Reward], examples: Sequence[Example], texts: Sequence[str]) -> Verdict:
    """Judges the completions of a rollout and looks for rewards that say nothing about them.

    Args:
        rewards: R reward functions.
        examples: B examples, one per completion.
        texts: B completions.

    Raises:
        RewardError: a reward function failed.
    """
    scores = judge(rewards, examples, texts)
    lost = lost_rows(rewards)
    return Verdict(
        scores=scores,
        silences=find_silences(rewards, examples, texts, scores, lost),
        num_lost={
            reward.name: len(rows)
            for reward, rows in zip(rewards, lost, strict=True)
            if reward.pool is not None
        },
    )
