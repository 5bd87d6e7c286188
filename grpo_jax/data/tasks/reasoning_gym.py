"""The tasks of reasoning-gym (an extra): `reasoning_gym:<name>`."""

from collections.abc import Mapping
from typing import Any

from grpo_jax.config.checks import require
from grpo_jax.data.tasks.task import Task
from grpo_jax.rewards.reasoning_gym import PREFIX, load_library
from grpo_jax.spelling import nearest
from grpo_jax.types import Example


def make_reasoning_gym(name: str, arguments: Mapping[str, Any]) -> Task:
    """Builds a task of reasoning-gym. `question` is the prompt, `answer` and `entry` are columns.

    Equal questions are one problem. Of the different ones, the first `held_out` are held out and the others
    are trained on.

    Args:
        name: name of the library's task, such as `leg_counting`.
        arguments: `size` (number of training problems, 2000), `held_out` (200), and the arguments of the
            library's task.

    Raises:
        ImportError: the library is missing.
        ValueError: the name is unknown, or the task does not take these arguments.
    """
    library = load_library()
    known = sorted(library.factory.DATASETS)
    if name not in known:
        near = nearest(name, known, likeness=0.4)
        hint = f"did you mean {PREFIX + near!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"data.task: reasoning-gym has no task {name!r}; {hint}")
    settings = {"size": 2000, "held_out": 200, **arguments}
    size = settings.pop("size")
    held_out = settings.pop("held_out")
    for argument, value, least in (("size", size, 1), ("held_out", held_out, 0)):
        require(
            type(value) is int and value >= least,
            f"data.task_arguments: {argument}: {value!r}; it must be a whole number of at least {least}",
        )
    try:
        entries = list(library.create_dataset(name, **{"seed": 0, **settings, "size": size + held_out}))
    except Exception as error:  # the library checks its configurations by TypeErrors and assertions
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
