"""Decides what counts as correct in evaluation."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from grpo_jax.rewards.loading import Reward

# Built-in rewards that look at form alone. They decide only if there is nothing else.
_FORM = (
    "regex_format",
    "think_format",
    "length_penalty",
    "repetition_penalty",
    "required_words",
    "distinct_words",
)


@dataclass(frozen=True, kw_only=True)
class Correct:
    """The rule that a completion is correct if one reward gives it at least a threshold.

    Args:
        name: name of the reward that decides.
        index: index of that reward among all rewards, those of training first.
        threshold: least value of a correct completion.
    """

    name: str
    index: int = 0
    threshold: float = 1.0

    def judge(self, scores: np.ndarray) -> np.ndarray:
        """Says which completions are correct.

        Args:
            scores: values of the deciding reward, any shape, NaN where it gave none.

        Returns:
            bool of the same shape, False where the value is missing.
        """
        # The threshold is a float64 and rewards are float32, but 0.9 has to reach 0.9.
        return np.nan_to_num(scores, nan=-np.inf) >= np.float32(self.threshold)

    def __str__(self) -> str:
        return f"{self.name} gives {self.threshold:g} or more"


def choose_correct(
    rewards: Sequence[Reward],
    eval_rewards: Sequence[Reward] = (),
    *,
    columns: Iterable[str] = (),
    name: str | None = None,
    threshold: float = 1.0,
) -> Correct:
    """Chooses the reward that decides what is correct.

    Without a name the first of eval_rewards decides. If there are none, it is the first training reward that
    reads a column of the data, as a checker of answers does. If there is none either, it is the first that is
    no built-in check of form, or else the first of all. A reward of negative weight is a penalty and comes
    last as well.

    Args:
        rewards: training rewards.
        eval_rewards: rewards of evaluation only.
        columns: names of the data's columns.
        name: value of `evaluation.correct.reward`. None means that the reward is chosen as above.
        threshold: value of `evaluation.correct.threshold`.

    Raises:
        ValueError: no reward has that name.
    """
    everything = [*rewards, *eval_rewards]
    names = [reward.name for reward in everything]
    if name is not None:
        if name not in names:
            raise ValueError(
                f"evaluation.correct.reward: there is no reward {name!r}; the rewards are {', '.join(names)}"
            )
        index = names.index(name)
    elif eval_rewards:
        index = len(rewards)
    else:
        known = set(columns)
        index = min(range(len(names)), key=lambda i: (_likelihood(rewards[i], known), i))
    return Correct(name=names[index], index=index, threshold=threshold)


def _likelihood(reward: Reward, columns: set[str]) -> int:
    """Returns 0 for what reads like a checker of answers, 1 for what may be one, 2 for form and penalties."""
    built_in = reward.source == "built in"
    if reward.weight < 0 or (built_in and reward.name.rstrip("_0123456789") in _FORM):
        return 2
    if reward.one_of:  # verl's compute_score
        return 0
    parameters = set(inspect.signature(reward.function).parameters)
    return 0 if (parameters - set(reward.arguments)) & columns else 1


def note_on_choice(correct: Correct, rewards: Sequence[Reward], eval_rewards: Sequence[Reward]) -> str | None:
    """Returns a line that says which of several rewards was chosen, or None if there is only one."""
    if len(eval_rewards or rewards) < 2:
        return None
    return (
        f"a completion is correct in evaluation where {correct}; evaluation.correct, such as "
        f"{{reward: {correct.name}, threshold: {correct.threshold:g}}}, decides otherwise"
    )
