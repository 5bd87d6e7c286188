"""The tasks of reasoning-gym (an extra), each with its own scorer: `reasoning_gym:<name>`."""

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.tasks.task import Example, Task, require
from grpo_jax.verifiers import tag_answer

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
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {PREFIX + near[0]!r}?" if near else f"there are {', '.join(known)}"
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


def score_entry(text: str, entry: Mapping[str, Any]) -> float:
    """Scores a completion by the scorer of the task that the entry is from.

    Args:
        text: a completion; in it the last `<answer>...</answer>` counts, else all of it.
        entry: as reasoning-gym made it.
    """
    tagged = tag_answer(text)
    answer = (text if tagged is None else tagged).strip()
    return float(_scorer(entry["metadata"]["source_dataset"])(answer, entry))
