"""What a task is: examples to train on, examples held out, and the rewards that go with them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One prompt and what the reward functions may know about it.

    Args:
        prompt: text, or a list of chat messages `{"role": ..., "content": ...}`.
        columns: everything else, by name; handed to the reward functions, never to the model.
    """

    prompt: str | list[dict[str, str]]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Prompts to learn from, held-out prompts to measure on, and the default rewards.

    Args:
        name: the task's name in the registry, or the stem of the training file.
        train: examples of the optimizer steps.
        evaluation: held-out examples; may be empty.
        rewards: names of the reward functions used when the configuration names none.
    """

    name: str
    train: Sequence[Example]
    evaluation: Sequence[Example]
    rewards: tuple[str, ...]
