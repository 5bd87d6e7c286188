"""Prompts that a Python program has in memory: lists, or a table of `datasets` or pandas."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_jax.types import Example

_WANTED = (
    "give a list of texts, of lists of messages, of dicts with a `prompt` and columns, or of Example, or one "
    "split of a data set"
)


@dataclass(frozen=True)
class PromptRows:
    """Rows in place of files, each with its place, such as `row 3`.

    Args:
        train: rows to train on.
        evaluation: held-out rows. `None` means that the config says where they come from, if there are any.
    """

    train: Sequence[tuple[str, dict[str, Any]]]
    evaluation: Sequence[tuple[str, dict[str, Any]]] | None = None


def rows_of(prompts: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Turns prompts into rows with a `prompt` and the columns of the rewards.

    Args:
        prompts: texts, lists of messages, dicts, `Example`s, a split of a data set of `datasets`, or a table
            of pandas.
        name: name of the argument in messages.

    Raises:
        ValueError: they are none of these, or there are none.

    >>> rows_of(["1+1=", {"prompt": "1+2=", "answer": 3}], "prompts")
    [('row 1', {'prompt': '1+1='}), ('row 2', {'prompt': '1+2=', 'answer': 3})]
    """
    if hasattr(prompts, "to_dict") and hasattr(prompts, "columns"):  # a table of pandas
        prompts = prompts.to_dict("records")
    if isinstance(prompts, Mapping):
        splits = ", ".join(map(repr, list(prompts)[:5]))
        raise ValueError(f"{name} is a {type(prompts).__name__} of {splits}; {_WANTED}")
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        hint = ". A file is data={'train_file': ...}" if isinstance(prompts, str) else ""
        raise ValueError(f"{name} is {prompts!r:.60}; {_WANTED}{hint}")
    rows = [(f"row {number}", row) for number, row in enumerate(_each_row(prompts, name), start=1)]
    if not rows:
        raise ValueError(f"{name} is empty; {_WANTED}")
    if all(row.keys() == {"role", "content"} for _, row in rows):
        raise ValueError(f"{name} is one conversation, a list of messages; give a list of conversations")
    return rows


def _each_row(prompts: Iterable[Any], name: str) -> Iterator[dict[str, Any]]:
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, Mapping):
            yield dict(prompt)
        elif isinstance(prompt, Example):
            yield {**prompt.columns, "prompt": prompt.prompt}
        elif isinstance(prompt, (str, list)):
            yield {"prompt": prompt}
        else:
            raise ValueError(
                f"{name}, row {number} is {prompt!r:.60} of type {type(prompt).__name__}; {_WANTED}"
            )
