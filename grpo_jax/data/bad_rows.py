"""Handles rows that cannot be used: an error names them, or a line counts them."""

from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN = 3  # bad rows that a message names


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Args:
        place: place of the row, such as `train.jsonl, line 3`.
        reason: reason why it cannot be used.
    """

    place: str
    reason: str


def settle(bad: Sequence[BadRow], num_rows: int, *, on_bad_row: str, what: str) -> str | None:
    """Refuses bad rows, or says that they are left out.

    Args:
        bad: the rows that cannot be used.
        num_rows: number of all rows.
        on_bad_row: `error` or `drop`.
        what: `training` or `evaluation`.

    Returns:
        a line for the user, or None if no row is bad.

    Raises:
        ValueError: a row is bad and on_bad_row is `error`, or no row is left.
    """
    if not bad:
        return None
    shown = _listed(bad)
    if on_bad_row == "error":
        if len(bad) * 2 > num_rows:  # a setting is wrong, rather than a row
            share = "" if num_rows == 1 else f" ({len(bad)} of {num_rows} rows)"
            raise ValueError(f"{_listed(bad[:1])}{share}")
        them = "it" if len(bad) == 1 else "them"
        raise ValueError(
            f"{shown} ({len(bad)} of {num_rows} {what} rows; data.on_bad_row: drop leaves {them} out)"
        )
    if len(bad) == num_rows:
        raise ValueError(f"all {num_rows} {what} rows are bad, so none is left to use: {shown}")
    share = f"{len(bad)} of {num_rows} {what} rows are left out (data.on_bad_row: drop)"
    if len(bad) * 2 > num_rows:
        share = f"WARNING: more than half of the data is unusable; {share}"
    return f"{share}: {shown}"


def _listed(bad: Sequence[BadRow]) -> str:
    """Returns the first bad rows with their reasons."""
    first = bad[0]
    source, comma, _ = first.place.rpartition(", ")
    listed = [f"{first.place}: {first.reason}"]
    for row in bad[1:_SHOWN]:
        reason = "the same" if row.reason == first.reason else row.reason
        listed.append(f"{row.place.removeprefix(source + comma)}: {reason}")
    return "; ".join([*listed, "..."] if len(bad) > _SHOWN else listed)
