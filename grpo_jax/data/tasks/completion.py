"""The task of continuing a text. The column `text` of the rows is split at word borders."""

import re
from typing import Any

from grpo_jax.data.tasks.task import RowTask, check_argument_ranges


def make_rows(row: dict[str, Any], *, num_words: int = 16) -> list[dict[str, Any]]:
    """Splits a text into blocks of 2 * num_words words, each a prompt and its continuation of equal length.

    Blocks do not overlap, so no held-out text is part of a training row. A last block is left out if no word
    follows its prompt, and so is a text that is too short.

    Args:
        row: a row with the column `text`.
        num_words: number of words of every prompt.

    Returns:
        rows with `prompt` and `continuation`, both exactly as in the text, and the row's other columns.

    Raises:
        ValueError: the column is missing, or is not text.
    """
    check_argument_ranges({"num_words": num_words}, [("num_words", lambda x: x >= 1, "at least 1")])
    if "text" not in row:
        raise ValueError(
            f"completion needs the column `text`; there are: {', '.join(row) or 'none'} (data.columns names "
            "it: {text: ...})"
        )
    text = row["text"]
    if not isinstance(text, str):
        raise ValueError(f"`text` must be text, not {type(text).__name__}")
    columns = {name: value for name, value in row.items() if name not in ("text", "prompt")}
    words = [match.span() for match in re.finditer(r"\S+", text)]
    rows = []
    for start in range(0, len(words) - num_words, 2 * num_words):
        border = words[start + num_words - 1][1]
        end = words[min(start + 2 * num_words, len(words)) - 1][1]
        prompt = text[words[start][0] : border]
        continuation = text[border:end]
        rows.append({**columns, "prompt": prompt, "continuation": continuation})
    return rows


COMPLETION = RowTask(
    name="completion", make_rows=make_rows, rewards=("distinct_words",), hub=None, eval_fraction=0.1
)
