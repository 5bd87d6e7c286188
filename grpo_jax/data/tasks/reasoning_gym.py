"""The tasks of reasoning-gym (an extra), each with its own scorer: `reasoning_gym:<name>`."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.data.tasks.task import Example, Task, require
from grpo_jax.rewards.answers.extraction import tag_answer
from grpo_jax.spelling import nearest

PREFIX = "reasoning_gym:"


def _library() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise ImportError(
            f'data.task: {PREFIX}<name> needs reasoning-gym: pip install "grpo-jax[reasoning-gym]" ({error})'
        ) from None
    return reasoning_gym


def make_reasoning_gym(name: str, arguments: Mapping[str, Any]) -> Task:
    """Builds a task of reasoning-gym: prompt `question`, columns `answer` and the whole `entry`.

    Equal questions are one problem. The first held_out different ones are held out, the rest are trained on.

    Args:
        name: such as `leg_counting`.
        arguments: `size` (training problems, 2000), `held_out` (200), and those of the library's task.

    Raises:
        ImportError: the library is missing. ValueError: an unknown name, or arguments it does not take.
    """
    library = _library()
    known = sorted(library.factory.DATASETS)
    if name not in known:
        near = nearest(name, known, likeness=0.4)
        hint = f"did you mean {PREFIX + near!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"data.task: reasoning-gym has no task {name!r}; {hint}")
    settings = {"size": 2000, "held_out": 200, **arguments}
    size, held_out = settings.pop("size"), settings.pop("held_out")
    require(type(size) is int and size >= 1, f"size: {size!r}; a whole number, at least 1")
    require(type(held_out) is int and held_out >= 0, f"held_out: {held_out!r}; a whole number, 0 or more")
    try:
        entries = list(library.create_dataset(name, **{"seed": 0, **settings, "size": size + held_out}))
    except Exception as error:  # its configurations are checked by TypeErrors and assertions
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(f"data.task_arguments: {name}: {type(error).__name__}: {reason}") from error
    by_question: dict[str, Any] = {}
    for entry in entries:
        by_question.setdefault(entry["question"], entry)
    different = list(by_question.values())
    if len(different) <= held_out:
        raise ValueError(
            f"data.task_arguments: {name} has only {len(different)} different questions here; lower "
            f"held_out {held_out}"
        )
    examples = [Example(e["question"], {"answer": e["answer"], "entry": e}) for e in different]
    return Task(PREFIX + name, examples[held_out:], examples[:held_out], ("reasoning_gym",))


@functools.cache
def _scorer(name: str) -> Callable[..., float]:
    return _library().get_score_answer_fn(name)


def read_entry(value: Any) -> Mapping[str, Any]:
    """Reads the column `entry` of one row: a problem as reasoning-gym made it, or its JSON text.

    Raises:
        ValueError: it is neither, or it does not say which task it is of.
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
        raise ValueError(
            f"`entry` {shown if len(shown) <= 80 else shown[:77] + '...'} is no problem of reasoning-gym: it "
            "needs metadata with a source_dataset"
        )
    return entry


def check_entry(value: Any) -> None:
    """Checks the column `entry` of one row.

    Raises:
        ValueError: it is no problem of reasoning-gym, or of a task that the library does not have.
        ImportError: the library is missing.
    """
    source = read_entry(value)["metadata"]["source_dataset"]
    if source not in _library().factory.DATASETS:
        raise ValueError(f"`entry` is of the task {source!r}, which reasoning-gym does not have")


def score_entry(text: str, entry: Mapping[str, Any]) -> float:
    """Scores a completion by the scorer of the task that the entry is from.

    Args:
        text: a completion; in it the last `<answer>...</answer>` counts, else all of it.
        entry: as reasoning-gym made it.
    """
    tagged = tag_answer(text)
    answer = (text if tagged is None else tagged).strip()
    return float(_scorer(entry["metadata"]["source_dataset"])(answer, entry))
