"""Prompts: built-in tasks and JSONL files, and their order as a function of (seed, step)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain

from grpo_jax.config import DataConfig
from grpo_jax.tasks import Example, Task, load_task

__all__ = ["Example", "Task", "batch", "load_data", "load_jsonl", "load_task"]

RESERVED_COLUMNS = ("prompts", "completions")  # a reward function's own arguments


def load_data(data: DataConfig) -> Task:
    """Loads the examples that the configuration names: its files, or else its built-in task.

    Returns:
        the task; one made of files has no default rewards, and no held-out examples without eval_file.
    """
    if data.train_file is None:
        return load_task(data.task)
    evaluation = load_jsonl(data.eval_file) if data.eval_file is not None else []
    return Task(Path(data.train_file).stem, load_jsonl(data.train_file), evaluation, ())


def load_jsonl(path: str | Path) -> list[Example]:
    """Reads one example per line: an object with `prompt`, every other key a column for the rewards.

    All lines must have the same keys, since a reward function receives whole columns. Empty lines are
    skipped.

    Raises:
        ValueError: a line is broken, named with its number and what is wrong; or there are no examples.
        FileNotFoundError: there is no such file.
    """
    examples: list[Example] = []
    first_line = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                example = _parse_line(line)
                if examples:
                    _check_columns(example, examples[0], first_line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            first_line = first_line or number
            examples.append(example)
    if not examples:
        raise ValueError(f"{path}: the file has no examples; write one JSON object with a `prompt` per line")
    return examples


def batch(examples: Sequence[Example], *, seed: int, step: int, num_prompts: int) -> list[Example]:
    """Picks the prompts of one step: a pure function of its arguments, so that a resumed run skips nothing.

    Consecutive steps walk through a shuffle of the examples, then through another one, and so on: every
    epoch holds every example once. A step may lie across the border of two epochs. The cost is that of
    `num_prompts` look-ups: the shuffle is computed per index and never stored.

    Args:
        examples: what to pick from; not empty.
        seed: chooses the shuffles.
        step: counted from 0.
        num_prompts: N, examples to pick.
    """
    if len(examples) == 0:
        raise ValueError("there are no examples to make a batch of")
    if step < 0 or num_prompts < 1:
        raise ValueError(f"step {step} must be at least 0 and num_prompts {num_prompts} at least 1")
    # `seed()` hashes, where `shuffle(seed=...)` adds the epoch: runs with seeds 0 and 1 would share shuffles.
    order = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    return [order[index] for index in range(step * num_prompts, (step + 1) * num_prompts)]


def _parse_line(line: bytes) -> Example:
    """Turns one line into an example, or says what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object with a `prompt`, not {type(row).__name__}")
    if "prompt" not in row:
        raise ValueError(f"`prompt` is missing; the keys are: {', '.join(row) or 'none'}")
    for name in RESERVED_COLUMNS:
        if name in row:
            raise ValueError(f"column `{name}` would hide a reward function's own argument; rename it")
    prompt = row.pop("prompt")
    _check_prompt(prompt)
    return Example(prompt, row)


def _check_prompt(prompt: Any) -> None:
    """Raises unless the prompt is a non-empty string or a non-empty list of chat messages."""
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("`prompt` is empty")
        return
    if not isinstance(prompt, list):
        raise ValueError(f"`prompt` must be a string or a list of messages, not {type(prompt).__name__}")
    if not prompt:
        raise ValueError("`prompt` is an empty list of messages")
    for i, message in enumerate(prompt):
        if not isinstance(message, dict):
            raise ValueError(f"`prompt[{i}]` must be an object with role and content, not {message!r}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"`prompt[{i}]` needs a string `{key}`, got {message.get(key)!r}")


def _check_columns(example: Example, first: Example, first_line: int) -> None:
    """Raises unless the example has the columns of the file's first example."""
    for name in first.columns:
        if name not in example.columns:
            raise ValueError(f"column `{name}` is missing; line {first_line} has it")
    for name in example.columns:
        if name not in first.columns:
            raise ValueError(f"column `{name}` is new; line {first_line} does not have it")
