"""The built-in rewards that compare a completion with the column `answer`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from grpo_jax.completions import Completion, completion_text
from grpo_jax.gold_answers import MissingAnswerError, accepted_answers
from grpo_jax.verifiers import (
    PLACES,
    Where,
    answers_equal,
    as_number,
    extract_answer,
    extract_number,
    load_math_verify,
    math_equal,
    numbers_equal,
    texts_equal,
)


def exact_match(completions: Sequence[Completion], answer: Sequence[Any]) -> list[float]:
    """Rewards 1 if the completion is the answer, white space around them aside, else 0.

    Args:
        completions: B completions.
        answer: column of texts, numbers, bools, UTF-8 bytes, or lists of accepted ones. A float that is whole
            is that integer. A row without an answer (null, NaN, an empty text) pays nobody.

    Raises:
        ValueError: an answer of another type.
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        text = completion_text(completion)
        rewards.append(float(any(texts_equal(text, accepted) for accepted in _accepted(expected))))
    return rewards


def _accepted(value: Any) -> tuple[str, ...]:
    """Returns the accepted answers of a row, none where the row has no answer."""
    try:
        return accepted_answers(value)
    except MissingAnswerError:
        return ()


def check_answer(columns: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Checks the column `answer` of one row for a reward that compares texts.

    Raises:
        ValueError: there is no answer, or one of a type that cannot be read.
    """
    accepted_answers(columns.get("answer"))


def numeric_answer(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    which: Literal["last", "first"] = "last",
    tolerance: float = 1e-6,
) -> list[float]:
    r"""Rewards 1 if the completion's number equals the answer's, else 0 (also without a number).

    A number marked by ``\boxed{}`` or ``####`` counts, else the last or first of the text; commas,
    decimals, exponents and fractions are understood, and |a - b| <= tolerance * max(1, |b|) is equal.

    Args:
        completions: B completions.
        answer: column of numbers, or of texts with one (`42`, `1,250.5`, `3/4`, `... #### 18`).
        which: `last` or `first` number of a text without a mark.
        tolerance: 0 means exactly equal.

    Raises:
        ValueError: an answer without a number.
    """
    if which not in ("last", "first"):
        raise ValueError(f"which={which!r}: choose 'last' or 'first'")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: must be in [0, 1)")
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        number = extract_number(completion_text(completion), which=which)
        targets = [as_number(accepted) for accepted in accepted_answers(expected)]
        equal = number is not None and any(numbers_equal(number, t, tolerance=tolerance) for t in targets)
        rewards.append(float(equal))
    return rewards


def check_number(columns: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Checks the column `answer` of one row for a reward that compares numbers.

    Raises:
        ValueError: there is no answer, or one that is not a number.
    """
    for accepted in accepted_answers(columns.get("answer")):
        as_number(accepted)


def _check_place(where: str | None) -> None:
    if where is not None and where not in PLACES:
        raise ValueError(f"where={where!r}: choose one of {', '.join(PLACES)}")


def _expected_answer(text: str, *, where: Where | None, tag: str = "answer") -> str:
    """Returns a column's answer: what is behind GSM8K's `####`, else at the place, else all of the text."""
    for place in () if where == "text" else filter(None, ("hashes", where)):
        if (found := extract_answer(text, where=place, tag=tag)) is not None:
            return found
    return text


def answer_match(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    where: Where,
    tag: str = "answer",
    tolerance: float = 1e-6,
) -> list[float]:
    r"""Rewards 1 if the answer stands where it has to and equals the expected one, else 0.

    Two numbers are compared as numbers (`1,250` is `1250.0`), anything else as text.

    Args:
        completions: B completions.
        answer: column; a text may hold it at the same place, or behind `####` (GSM8K's `... #### 18`).
        where: `boxed` (the last ``\boxed{}``), `hashes` (behind the last ``####``), `tag` (in the last
            ``<answer>...</answer>``), `last_number`, `first_number`, or `text`, the whole completion.
        tag: name of the tag for `tag`.
        tolerance: |a - b| <= tolerance * max(1, |b|) is equal; 0 means exactly.
    """
    _check_place(where)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: must be in [0, 1)")
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        found = extract_answer(completion_text(completion), where=where, tag=tag)
        targets = [_expected_answer(a, where=where, tag=tag) for a in _accepted(expected)]
        equal = found is not None and any(answers_equal(found, t, tolerance=tolerance) for t in targets)
        rewards.append(float(equal))
    return rewards


def check_match(columns: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Checks the column `answer` of one row for `answer_match` with its arguments.

    Raises:
        ValueError: there is no answer, or one that cannot stand where the reward looks.
    """
    accepted_answers(columns.get("answer"))


def math_answer(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    where: Where | None = None,
    tag: str = "answer",
) -> list[float | None]:
    r"""Rewards 1 if the completion's answer equals the expected one as mathematics, else 0.

    Decided by math-verify (extra `math`), which knows LaTeX, fractions, sets, intervals and equations. Needs
    seconds now and then: give the reward a `timeout`.

    Args:
        completions: B completions.
        answer: column; plain, in ``$...$``, in ``\boxed{}``, or behind ``####``. Without mathematics: None.
        where: takes the answer from this place first, see answer_match; None: math-verify looks for it.
        tag: name of the tag for `tag`.

    Raises:
        ImportError: math-verify is not installed.
    """
    _check_place(where)
    load_math_verify()
    rewards: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        text = completion_text(completion)
        if where is not None:
            text = extract_answer(text, where=where, tag=tag)
            text = None if text is None else f"\\boxed{{{text}}}"
        targets = [_expected_answer(accepted, where=None) for accepted in _accepted(expected)]
        rewards.append(_best([False if text is None else math_equal(text, target) for target in targets]))
    return rewards


def _best(verdicts: Sequence[bool | None]) -> float | None:
    """Returns 1 if any verdict is True, 0 if any is False, None if there is no verdict at all."""
    return max((float(verdict) for verdict in verdicts if verdict is not None), default=None)
