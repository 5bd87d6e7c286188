"""Loads prompts from tasks, files and data sets. Their order is a function of (seed, step)."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grain

from grpo_jax.config.data import DEFAULT_TASK, IN_MEMORY, DataConfig
from grpo_jax.data.bad_rows import BadRow, settle
from grpo_jax.data.columns import rename
from grpo_jax.data.few_shot import note_on_few_shot
from grpo_jax.data.given_rows import PromptRows
from grpo_jax.data.hub import read_dataset
from grpo_jax.data.prompts import PromptForm, complete_prompt, make_prompt_form, prompt_text, row_prompt
from grpo_jax.data.rows import Rows, find_files, read_rows, stem
from grpo_jax.data.tasks import RowTask, Task, check_arguments, find_task, load_task, make_task
from grpo_jax.types import Example

__all__ = ["Example", "Task", "batch", "load_data", "load_task"]

RESERVED_COLUMNS = ("prompts", "completions")  # names of a reward function's own arguments


def load_data(data: DataConfig, given: PromptRows | None = None) -> Task:
    """Loads the examples that the configuration names, and makes their prompts.

    Args:
        data: the section of the configuration.
        given: rows in memory that are used instead.

    Returns:
        the task. A task that is made from files has no default rewards, and it has held-out examples only if
        the configuration says where they come from.

    Raises:
        ValueError, OSError, ImportError: something in the section or in the data is wrong. The message is one
            line.
    """
    in_memory = given is not None and data.task == IN_MEMORY
    found = _plain("prompts") if in_memory else find_task(data.task)
    form = make_prompt_form(
        prompt_template=data.prompt_template,
        system_prompt=data.system_prompt,
        few_shot=[shot | rename(shot, data.columns, strict=False) for shot in data.few_shot],
        few_shot_separator=data.few_shot_separator,
    )
    if isinstance(found, RowTask):
        task = _load_rows(data, found, form, given)
    elif given is not None:
        raise ValueError(
            f"data.task: {found.name} makes its own problems; leave out the prompts, or the task"
        )
    elif data.has_source:
        if data.task != DEFAULT_TASK:
            raise ValueError(
                f"data.task: {found.name} makes its own problems; leave out "
                f"data.{'train_file' if data.train_file else 'dataset'}, or the task"
            )
        task = _load_rows(data, _plain(_name_of_source(data)), form, None)
    else:
        for name in ("columns", "eval_fraction"):
            if getattr(data, name):
                raise ValueError(
                    f"data.{name} is for a train_file or dataset; {found.name} has its own prompts"
                )
        if data.on_bad_row != "error":
            raise ValueError(f"data.on_bad_row is for a train_file or dataset; {found.name} has no bad rows")
        task = _templated(make_task(found, data.task_arguments), form)
    return _completed(task, form)


def batch(examples: Sequence[Example], *, seed: int, step: int, num_prompts: int) -> list[Example]:
    """Picks the prompts of one step.

    It is a pure function of its arguments, so a resumed run skips nothing. Consecutive steps walk through a
    shuffle of the examples, then through another one, and so on, so that every epoch holds every example
    once. A step may cross the border of two epochs. The cost is that of `num_prompts` look-ups, because the
    shuffle is computed per index and never stored.

    Args:
        examples: examples to pick from, at least one.
        seed: seed of the shuffles.
        step: index of the step, counted from 0.
        num_prompts: N, the number of examples to pick.
    """
    if len(examples) == 0:
        raise ValueError("there are no examples to make a batch of")
    if step < 0 or num_prompts < 1:
        raise ValueError(f"step {step} must be at least 0 and num_prompts {num_prompts} at least 1")
    # `seed()` hashes, where `shuffle(seed=...)` adds the epoch: runs with seeds 0 and 1 would share shuffles.
    order = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    return [order[index] for index in range(step * num_prompts, (step + 1) * num_prompts)]


def _name_of_source(data: DataConfig) -> str:
    if data.train_file is not None:
        return stem(find_files(data.train_file)[0])
    assert data.dataset is not None  # the task has checked it
    return data.dataset.rstrip("/").rpartition("/")[2]


def _plain(name: str) -> RowTask:
    """Returns the task of a file whose rows are examples already."""
    return RowTask(name=name, make_rows=_unchanged, rewards=(), hub=None, eval_fraction=0.0)


def _unchanged(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row]


def _load_rows(data: DataConfig, task: RowTask, form: PromptForm, given: PromptRows | None) -> Task:
    """Loads a task of rows, with the held-out examples that the configuration asks for."""
    check_arguments(task.name, task.make_rows, data.task_arguments)
    if given is None and not data.has_source:
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

    def of_files(names: str | list[str], what: str) -> tuple[list[Example], list[str]]:
        return _examples([(name, read_rows(name)) for name in find_files(names)], data, task, form, what)

    def of_split(name: str, what: str) -> tuple[list[Example], list[str]]:
        rows = read_dataset(data.dataset, config=data.dataset_config, split=name)
        return _examples([(f"{data.dataset} [{name}]", rows)], data, task, form, what)

    def of_memory(rows: Rows | Any, name: str, what: str) -> tuple[list[Example], list[str]]:
        return _examples([(name, rows)], data, task, form, what)

    if given is not None:
        train, notes = of_memory(given.train, "prompts", "training")
    elif data.train_file is not None:
        train, notes = of_files(data.train_file, "training")
    else:
        train, notes = of_split(data.train_split, "training")
    evaluation: list[Example] = []
    about_evaluation: list[str] = []
    if given is not None and given.evaluation is not None:
        evaluation, about_evaluation = of_memory(given.evaluation, "eval_prompts", "evaluation")
    elif data.eval_file is not None:
        evaluation, about_evaluation = of_files(data.eval_file, "evaluation")
    elif data.eval_split is not None:
        evaluation, about_evaluation = of_split(data.eval_split, "evaluation")
    elif fraction := task.eval_fraction if data.eval_fraction is None else data.eval_fraction:
        train, evaluation = _split(train, fraction)
    return Task(task.name, train, evaluation, task.rewards, notes=(*notes, *about_evaluation))


def _examples(
    sources: Sequence[tuple[str, Rows]], data: DataConfig, task: RowTask, form: PromptForm, what: str
) -> tuple[list[Example], list[str]]:
    """Returns (examples made from rows, notes). Solved examples and system message are added later."""
    made: list[Example] = []
    bad: dict[str, str] = {}  # place -> reason
    num_rows = 0
    for source, rows in sources:
        for place, row in rows:
            num_rows += 1
            place = f"{source}, {place}"
            try:
                examples = _of_row(row, data, task, form)
            except ValueError as error:
                bad[place] = str(error)
                continue
            made += [replace(example, place=place) for example in examples]
    first_source = sources[0][0]
    if not num_rows or not (made or bad):
        raise ValueError(
            f"{first_source}: the file has no examples; each row is one, with a `prompt` or what makes it"
            if task.make_rows is _unchanged
            else f"{first_source}: the task {task.name} makes a prompt of none of its rows"
        )
    bad |= _odd_columns(made, short_places=len(sources) == 1)
    note = settle(
        [BadRow(place, reason) for place, reason in bad.items()],
        num_rows,
        on_bad_row=data.on_bad_row,
        what=what,
    )
    return [example for example in made if example.place not in bad], [note] if note else []


def _of_row(
    row: Mapping[str, Any] | ValueError, data: DataConfig, task: RowTask, form: PromptForm
) -> list[Example]:
    """Makes the examples of one row.

    Raises:
        ValueError: the row cannot be used. The message does not name its place.
    """
    if isinstance(row, ValueError):
        raise row
    renamed = rename(row, data.columns, strict=True)
    # A template may call a column by its name in the file as well.
    return [
        _example(form, made, {**row, **renamed, **made})
        for made in task.make_rows(renamed, **data.task_arguments)
    ]


def _odd_columns(examples: Sequence[Example], *, short_places: bool) -> dict[str, str]:
    """Returns {place: reason} of the examples whose columns are not those that most examples have."""
    kinds = Counter(frozenset(example.columns) for example in examples)
    if len(kinds) < 2:
        return {}
    usual, _ = kinds.most_common(1)[0]  # the first one wins a tie
    first = next(example.place for example in examples if usual == example.columns.keys())
    first = first.rpartition(", ")[2] if short_places else first
    odd: dict[str, str] = {}
    for example in examples:
        missing = [name for name in usual if name not in example.columns]
        new = [name for name in example.columns if name not in usual]
        if missing:
            odd[example.place] = f"column `{min(missing)}` is missing; {first} has it"
        elif new:
            odd[example.place] = f"column `{new[0]}` is new; {first} does not have it"
    return odd


def _example(form: PromptForm, row: Mapping[str, Any], known: Mapping[str, Any]) -> Example:
    """Makes an example from a row. `known` has every name that a template may use."""
    for name in RESERVED_COLUMNS:
        if name in row:
            raise ValueError(f"column `{name}` would hide a reward function's own argument; rename it")
    prompt = row_prompt(form, row if form.template is None else known)
    return Example(prompt, {name: value for name, value in row.items() if name != "prompt"})


def _split(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Returns (train, held out). The text of a prompt decides whether it is held out.

    Prompts that are equal apart from white space are in the same split, and a prompt stays in its split when
    rows are added.
    """
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        digest = hashlib.sha256(prompt_text(example.prompt).encode(errors="surrogatepass")).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(example)
    for side, what in zip(sides, ("to train on", "held out"), strict=True):
        if not side:
            raise ValueError(
                f"data.eval_fraction {fraction} of {len(examples)} prompts leaves none {what}; change it, or "
                "give the held-out prompts in data.eval_file"
            )
    return sides


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

    note = note_on_few_shot(form.shots, task.evaluation)
    return replace(
        task,
        train=completed(task.train),
        evaluation=completed(task.evaluation),
        notes=(*task.notes, note) if note else task.notes,
    )
