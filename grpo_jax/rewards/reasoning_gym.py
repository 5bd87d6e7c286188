"""Judges answers by the scorers of reasoning-gym (an extra). Each of its tasks has its own."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.rewards.answers.extraction import tag_answer

PREFIX = "reasoning_gym:"  # prefix of the names of its tasks


def load_library() -> Any:
    """Imports reasoning-gym.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise ImportError(
            f'data.task: {PREFIX}<name> needs reasoning-gym: pip install "grpo-jax[reasoning-gym]" ({error})'
        ) from None
    return reasoning_gym


@functools.cache
def _scorer(name: str) -> Callable[..., float]:
    return load_library().get_score_answer_fn(name)


def read_entry(value: Any) -> Mapping[str, Any]:
    """Reads the column `entry` of one row: a problem as reasoning-gym made it, or its JSON text.

    Raises:
        ValueError: it is neither, or it does not name its task.
    """
    entry = value
    if isinstance(value, str):
        try:
            entry = json.loads(value)
        except ValueError:
            entry = None
    metadata = entry.get("metadata") if isinstance(entry, Mapping) else None
    source = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
    if not isinstance(source, str):
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(
            f"`entry` {shown} is not a problem of reasoning-gym: it needs metadata with a source_dataset"
        )
    return entry


def check_entry(value: Any) -> None:
    """Checks the column `entry` of one row.

    Raises:
        ValueError: it is not a problem of reasoning-gym, or the library does not have its task.
        ImportError: the library is missing.
    """
    source = read_entry(value)["metadata"]["source_dataset"]
    if source not in load_library().factory.DATASETS:
        raise ValueError(f"`entry` is of the task {source!r}, which reasoning-gym does not have")


def judge_entry(text: str, entry: Mapping[str, Any]) -> float:
    """Judges a completion by the scorer of the task that the entry is from.

    Args:
        text: a completion. Its last `<answer>...</answer>` counts, or else all of it.
        entry: a problem as reasoning-gym made it.
    """
    tagged = tag_answer(text)
    answer = (text if tagged is None else tagged).strip()
    return float(_scorer(entry["metadata"]["source_dataset"])(answer, entry))
