"""Prompts: built-in tasks, files and data sets, and their order as a function of (seed, step)."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain

from grpo_jax.data_config import DEFAULT_TASK, DataConfig
from grpo_jax.hub_data import read_dataset
from grpo_jax.prompts import Prompt, PromptForm, complete_prompt, make_prompt_form, row_prompt
from grpo_jax.row_files import Rows, read_rows
from grpo_jax.tasks import ROW_TASKS, Example, RowTask, Task, check_arguments, check_name, load_task

__all__ = ["Example", "Task", "batch", "load_data", "load_task"]

RESERVED_COLUMNS = ("prompts", "completions")  # a reward function's own arguments


def load_data(data: DataConfig) -> Task:
    """Loads the examples that the configuration names, and makes the prompts as it says.

    Returns:
        the task; one made of files has no default rewards, and no held-out examples unless the
        configuration says where they come from.

    Raises:
        ValueError, OSError, ImportError: something in the section or in the data is wrong, in one line.
    """
    check_name(data.task)
    form = make_prompt_form(
        prompt_template=data.prompt_template,
        system_prompt=data.system_prompt,
        few_shot=[shot | _rename(shot, data.columns, strict=False) for shot in data.few_shot],
        few_shot_separator=data.few_shot_separator,
    )
    if data.task in ROW_TASKS:
        task = _load_rows(data, ROW_TASKS[data.task], form)
    elif data.has_source:
        if data.task != DEFAULT_TASK:
            raise ValueError(
                f"data.task: {data.task} makes its own problems; leave out "
                f"data.{'train_file' if data.train_file else 'dataset'}, or the task"
            )
        name = Path(data.train_file).stem if data.train_file else data.dataset.rstrip("/").rpartition("/")[2]
        task = _load_rows(data, _plain(name), form)
    else:
        for name in ("columns", "eval_fraction"):
            if getattr(data, name):
                raise ValueError(
                    f"data.{name} is for a train_file or dataset; {data.task} has its own prompts"
                )
        task = _templated(load_task(data.task, data.task_arguments), form)
    return _completed(task, form)


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


def _plain(name: str) -> RowTask:
    """Returns the task of a file whose rows are examples as they stand."""
    return RowTask(name=name, make_rows=_as_it_stands, rewards=(), hub=None, eval_fraction=0.0)


def _as_it_stands(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row]


def _load_rows(data: DataConfig, task: RowTask, form: PromptForm) -> Task:
    """Loads a task of rows, its held-out examples from wherever the configuration has them."""
    check_arguments(task.name, task.make_rows, data.task_arguments)
    if not data.has_source:
        if task.hub is None:
            raise ValueError(f"data.task: {task.name} needs data.train_file or data.dataset")
        hub = task.hub
        data = replace(
            data,
            dataset=hub.dataset,
            dataset_config=hub.config,
            train_split=hub.train_split,
            eval_split=hub.eval_split if data.eval_fraction is None else None,
        )

    def examples(source: str, rows: Rows) -> list[Example]:
        return _examples(source, rows, data, task, form)

    def split(name: str) -> list[Example]:
        rows = read_dataset(data.dataset, config=data.dataset_config, split=name)
        return examples(f"{data.dataset} [{name}]", rows)

    if data.train_file is not None:
        train = examples(data.train_file, read_rows(data.train_file))
    else:
        train = split(data.train_split)
    evaluation: list[Example] = []
    if data.eval_file is not None:
        evaluation = examples(data.eval_file, read_rows(data.eval_file))
    elif data.eval_split is not None:
        evaluation = split(data.eval_split)
    elif fraction := task.eval_fraction if data.eval_fraction is None else data.eval_fraction:
        train, evaluation = _split(train, fraction)
    return Task(task.name, train, evaluation, task.rewards)


def _examples(
    source: str | Path, rows: Rows, data: DataConfig, task: RowTask, form: PromptForm
) -> list[Example]:
    """Turns rows into examples, without solved examples and system message."""
    examples: list[Example] = []
    first_place = ""
    for place, row in rows:
        try:
            renamed = _rename(row, data.columns, strict=True)
            for made in task.make_rows(renamed, **data.task_arguments):
                # A template may call a column by its name in the file as well.
                example = _example(form, made, {**row, **renamed, **made})
                example = replace(example, place=f"{source}, {place}")
                if examples:
                    _check_columns(example, examples[0], first_place)
                first_place = first_place or place
                examples.append(example)
        except ValueError as error:
            raise ValueError(f"{source}, {place}: {error}") from error
    if not examples:
        raise ValueError(
            f"{source}: the file has no examples; each row is one, with a `prompt` or what makes it"
            if task.make_rows is _as_it_stands
            else f"{source}: there is no row of which {task.name} makes a prompt"
        )
    return examples


def _rename(row: Mapping[str, Any], columns: Mapping[str, str], *, strict: bool) -> dict[str, Any]:
    """Gives columns their new names; strict: each one must be there."""
    missing = [name for name in columns.values() if name not in row]
    if missing and strict:
        raise ValueError(
            f"data.columns: there is no column `{missing[0]}`; the columns are: {', '.join(row) or 'none'}"
        )
    new = {name: row[old] for name, old in columns.items() if old in row}
    return {name: value for name, value in row.items() if name not in columns.values()} | new


def _example(form: PromptForm, row: Mapping[str, Any], known: Mapping[str, Any]) -> Example:
    """Makes an example of a row; known: every name that a template may use."""
    for name in RESERVED_COLUMNS:
        if name in row:
            raise ValueError(f"column `{name}` would hide a reward function's own argument; rename it")
    prompt = row_prompt(form, row if form.template is None else known)
    return Example(prompt, {name: value for name, value in row.items() if name != "prompt"})


def _split(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Holds out a share of the prompts, each by its own text: (train, held out).

    Equal prompts (white space aside) are on one side, and a prompt stays where it is when rows are added.
    """
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        digest = hashlib.sha256(_text_of(example.prompt).encode(errors="surrogatepass")).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(example)
    for side, what in zip(sides, ("to train on", "held out"), strict=True):
        if not side:
            raise ValueError(
                f"data.eval_fraction {fraction} of {len(examples)} prompts leaves none {what}; change it, or "
                "give the held-out prompts in data.eval_file"
            )
    return sides


def _text_of(prompt: Prompt) -> str:
    """Returns one text for equal prompts, white space aside."""
    parts = (
        [prompt] if isinstance(prompt, str) else [part for m in prompt for part in (m["role"], m["content"])]
    )
    return "\0".join(" ".join(part.split()) for part in parts)


def _templated(task: Task, form: PromptForm) -> Task:
    """Applies a template to a task that makes its own problems."""
    if form.template is None:
        return task

    def made(examples: Iterable[Example]) -> list[Example]:
        rows = ({**example.columns, "prompt": example.prompt} for example in examples)
        return [_example(form, row, row) for row in rows]

    return replace(task, train=made(task.train), evaluation=made(task.evaluation))


def _completed(task: Task, form: PromptForm) -> Task:
    """Puts solved examples and system message before every prompt."""
    if form.system_prompt is None and not form.shots:
        return task

    def completed(examples: Iterable[Example]) -> list[Example]:
        return [replace(example, prompt=complete_prompt(form, example.prompt)) for example in examples]

    return replace(task, train=completed(task.train), evaluation=completed(task.evaluation))


def _check_columns(example: Example, first: Example, first_place: str) -> None:
    """Raises unless the example has the columns of the first example."""
    for name in first.columns:
        if name not in example.columns:
            raise ValueError(f"column `{name}` is missing; {first_place} has it")
    for name in example.columns:
        if name not in first.columns:
            raise ValueError(f"column `{name}` is new; {first_place} does not have it")
