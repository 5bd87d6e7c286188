"""The built-in rewards that compare a completion with the column `answer`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from grpo_jax.rewards.answers.equality import answers_equal, compare_answers, numbers_equal, texts_equal
from grpo_jax.rewards.answers.extraction import (
    PLACES,
    Where,
    as_number,
    extract_answer,
    extract_number,
    find_numbers,
    has_open_mark,
    marked_answer,
)
from grpo_jax.rewards.answers.gold import MissingAnswerError, accepted_answers
from grpo_jax.rewards.answers.mathematics import load_math_verify, math_equal
from grpo_jax.rewards.answers.quantities import read_quantity
from grpo_jax.rewards.answers.text import clean_answer, for_math, stated_answer, without_lead
from grpo_jax.rewards.completions import Completion, completion_text

_HEDGES = re.compile(r"\b(?:or|maybe|perhaps|possibly|either|could|might)\b", re.I)
_LIST_AT_END = re.compile(r"[0-9], (?:and )?[-+$]{0,2}[0-9][0-9.,]*\W*$")


def exact_match(completions: Sequence[Completion], answer: Sequence[Any]) -> list[float]:
    """Rewards 1 if the completion equals the answer, apart from white space around them, and 0 otherwise.

    Args:
        completions: B completions.
        answer: column of texts, numbers, bools, UTF-8 bytes, or lists of accepted ones. A float that is whole
            is read as that integer. A row without an answer (null, NaN, an empty text) gives 0.

    Raises:
        ValueError: an answer has another type.
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        text = completion_text(completion)
        rewards.append(float(any(texts_equal(text, accepted) for accepted in _accepted(expected))))
    return rewards


def _accepted(value: Any) -> tuple[str, ...]:
    """Returns the accepted answers of a row. The tuple is empty if the row has no answer."""
    try:
        return accepted_answers(value)
    except MissingAnswerError:
        return ()


def check_answer(columns: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Checks the column `answer` of one row for a reward that compares texts.

    Raises:
        ValueError: there is no answer, or its type cannot be read.
    """
    accepted_answers(columns.get("answer"))


def numeric_answer(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    which: Literal["last", "first"] = "last",
    tolerance: float = 1e-6,
) -> list[float]:
    r"""Rewards 1 if the completion's number equals the answer's, and 0 otherwise.

    If a ``\boxed{}`` or ``####`` marks the answer, it must be one number, with or without a unit. Without a
    mark, the last or first number of the text counts. Whole numbers are compared exactly, and others by
    |a - b| <= tolerance * |b|. The unit is not compared, but answer_match compares it.

    Args:
        completions: B completions.
        answer: column of numbers, of texts that are one number (`42`, `1,250.5`, `3/4`, `18 dollars`) or that
            mark one (`... #### 18`), or of lists of these, of which any is right.
        which: number that counts in a text without a mark, the `last` or the `first`.
        tolerance: relative tolerance of numbers that are not whole, in [0, 1). 0 means exactly equal.

    Raises:
        ValueError: an answer is not a number, or more than one, such as `\sqrt{2}` or `17 or 18`.
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
        ValueError: there is no answer, or it is not a number.
    """
    for accepted in accepted_answers(columns.get("answer")):
        as_number(accepted)


def _check_place(where: str | None) -> None:
    if where is not None and where not in PLACES:
        raise ValueError(f"where={where!r}: choose one of {', '.join(PLACES)}")


def _expected_answer(text: str, *, where: Where | None, tag: str = "answer") -> str:
    """Returns the answer in a gold text.

    The first of these that the text has counts: the text after GSM8K's `####`, the content of the tag or box,
    what a solution states at its end, and the whole text.
    """
    if where == "text":
        return text
    for place in ("hashes", "tag" if where == "tag" else "boxed", "boxed"):
        if (found := extract_answer(text, where=place, tag=tag)) is not None:
            return found
    stated = stated_answer(text) if len(text.split()) > 3 else None
    return without_lead(text) if stated is None else stated


def answer_match(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    where: Where,
    tag: str = "answer",
    tolerance: float = 1e-6,
) -> list[float]:
    r"""Rewards 1 if the answer is in the right place and equals the expected one, and 0 otherwise.

    Formatting does not count (``\text{}``, ``$``, ``**``, thin spaces). Numbers are compared as numbers, and
    units only if both answers have one. It understands lists, intervals, simple expressions and words.
    `docs/rewards.md` has the rules. math_answer knows more mathematics, so use it if its extra is installed.

    Args:
        completions: B completions.
        answer: column of texts, numbers, or lists of these, of which any is right. A text may mark its answer
            by ``####`` (GSM8K), by a box, or by the tag. A row without an answer gives 0.
        where: place of the answer: `boxed` (the last complete ``\boxed{}``), `hashes` (the line after the
            last ``####``), `tag` (the last complete ``<answer>...</answer>``), `last_number`, `first_number`,
            or `text` (the whole completion).
        tag: name of the tag that `where: tag` looks for.
        tolerance: relative tolerance of numbers that are not whole, in [0, 1). 0 means exactly equal.
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
        ValueError: there is no answer, or it cannot be in the place where the reward looks.
    """
    where = arguments["where"]
    tag = arguments.get("tag", "answer")
    for accepted in accepted_answers(columns.get("answer")):
        target = _expected_answer(accepted, where=where, tag=tag)
        if where in ("last_number", "first_number"):
            as_number(target)
        elif not target.strip():
            raise MissingAnswerError("the expected answer has an empty mark")


def math_answer(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    where: Where | None = None,
    tag: str = "answer",
) -> list[float | None]:
    r"""Rewards 1 if the completion's answer equals the expected one as mathematics, and 0 otherwise.

    The rules of answer_match decide first. If they cannot decide, as for `(x^2-1)/(x+1)` and `x-1`,
    math-verify does (extra `math`). That sometimes takes seconds, so give the reward a `timeout`.

    Args:
        completions: B completions.
        answer: column as in answer_match. The reward is None for a row without an answer, or without
            mathematics.
        where: place of the completion's answer, see answer_match. None means the last mark of any kind (box,
            tag or ``####``), or what math-verify finds in a completion without a mark. An open mark is not an
            answer, and neither is a last sentence that offers several numbers (`17 or 18`).
        tag: name of the tag.

    Raises:
        ImportError: math-verify is not installed.
    """
    _check_place(where)
    load_math_verify()
    rewards: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        text = completion_text(completion)
        found = marked_answer(text, tag=tag) if where is None else extract_answer(text, where=where, tag=tag)
        targets = [_expected_answer(accepted, where=where, tag=tag) for accepted in _accepted(expected)]
        if found is None and (where is not None or has_open_mark(text, tag=tag)):
            rewards.append(_best([False for _ in targets]))
        else:
            rewards.append(_best([_same_mathematics(text, found, target) for target in targets]))
    return rewards


def _same_mathematics(text: str, found: str | None, target: str) -> bool | None:
    """Compares two answers, by math-verify if our own rules cannot decide."""
    if found is None:  # there is no mark, so the whole text counts, or what math-verify finds in it
        if compare_answers(text, target):
            return True
        is_number = read_quantity(clean_answer(target)) is not None
        return False if is_number and _is_hedged(text) else math_equal(text, target)
    decided = compare_answers(found, target)
    return math_equal(f"\\boxed{{{for_math(found)}}}", target) if decided is None else decided


def _is_hedged(text: str) -> bool:
    """Says whether the last sentence with a number offers several numbers as answers."""
    sentences = [part for part in re.split(r"[.!?]\s|\n", text) if find_numbers(part)]
    if not sentences:
        return False
    last = sentences[-1]
    return len(find_numbers(last)) > 1 and (_HEDGES.search(last) or _LIST_AT_END.search(last)) is not None


def _best(verdicts: Sequence[bool | None]) -> float | None:
    """Returns 1 if any verdict is True, 0 if none is but one is False, and None without a verdict."""
    return max((float(verdict) for verdict in verdicts if verdict is not None), default=None)
