"""Held-out prompts by category, which a column of the data names."""

from collections.abc import Sequence

from grpo_jax.types import Example

MAX_CATEGORIES = 20  # each gets metrics of its own in every evaluation


def rows_by_category(examples: Sequence[Example], column: str | None) -> dict[str, list[int]]:
    """Groups examples by the value of a column.

    Args:
        examples: N held-out examples.
        column: name of the column. None means that there are no categories.

    Returns:
        category -> its rows. Categories are in the order of their first appearance.

    Raises:
        ValueError: the column does not exist, a value is no name, or there are over MAX_CATEGORIES values.
    """
    if column is None or not examples:
        return {}
    if column not in examples[0].columns:
        columns = ", ".join(f"`{name}`" for name in examples[0].columns) or "none"
        raise ValueError(
            f"evaluation.category: {column!r} is no column of the held-out prompts, which have {columns}"
        )
    rows: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
        value = example.columns[column]
        if not isinstance(value, str | int | float) or value == "":
            raise ValueError(
                f"evaluation.category: `{column}` of held-out prompt {row} is {value!r:.80}; a category is a "
                "text, a number or a bool"
            )
        # Slashes separate the parts of a metric's name.
        rows.setdefault(str(value).replace("/", "_"), []).append(row)
    if len(rows) > MAX_CATEGORIES:
        raise ValueError(
            f"evaluation.category: `{column}` has {len(rows)} values among {len(examples)} held-out "
            f"prompts; {MAX_CATEGORIES} at most are possible, because each has metrics of its own"
        )
    return rows
