"""The reward functions that come with the package. Columns are positional, arguments keyword-only."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from grpo_jax.expressions import reaches_target
from grpo_jax.tasks.reasoning_gym import score_entry
from grpo_jax.verifiers import as_number, extract_number, numbers_equal, texts_equal

Completion = str | list[dict[str, Any]]


def completion_text(completion: Completion) -> str:
    """Returns the text of a completion: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_match(completions: Sequence[Completion], answer: Sequence[Any]) -> list[float]:
    """Rewards 1 if the completion is the answer, white space around them aside, else 0.

    Args:
        completions: B completions.
        answer: column; anything but text is compared as `str(answer)`.
    """
    return [float(texts_equal(completion_text(c), str(a))) for c, a in zip(completions, answer, strict=True)]


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
        number, target = extract_number(completion_text(completion), which=which), as_number(expected)
        rewards.append(float(number is not None and numbers_equal(number, target, tolerance=tolerance)))
    return rewards


def regex_format(completions: Sequence[Completion], *, pattern: str, search: bool = False) -> list[float]:
    """Rewards 1 if the completion has the format of a regular expression, else 0.

    Args:
        completions: B completions.
        pattern: Python regular expression; flags go inside, such as `(?s)` to let a dot match newlines.
        search: the pattern may match anywhere; False: it must match the whole completion.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}") from None
    match = compiled.search if search else compiled.fullmatch
    return [float(match(completion_text(c)) is not None) for c in completions]


def length_penalty(
    completions: Sequence[Completion], *, target: int, window: int | None = None
) -> list[float]:
    """Penalises every character beyond a target: -min(1, max(0, characters - target) / window), in [-1, 0].

    Characters, as a reward function sees strings: for tokens divide by about 4 in English.

    Args:
        completions: B completions.
        target: characters that are free, 0 or more.
        window: characters beyond the target until the penalty is full; None: as many as the target.
    """
    window = target if window is None else window
    if target < 0 or window < 1:
        raise ValueError(f"target={target}, window={window}: target is 0 or more, window at least 1")
    return [-min(1.0, max(0, len(completion_text(c)) - target) / window) for c in completions]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*", text.casefold())


def required_words(completions: Sequence[Completion], *, words: Sequence[str]) -> list[float]:
    """Rewards the share of the given words that occur in the completion, in [0, 1].

    Whole words, upper and lower case alike. Alone it teaches a list of words: combine it.

    Args:
        completions: B completions.
        words: at least one word.
    """
    if isinstance(words, str) or not words or any(not isinstance(w, str) for w in words):
        raise ValueError(f"words={words!r}: give a list of at least one word")
    bad = [w for w in words if _words(w) != [w.casefold()]]
    if bad:
        raise ValueError(f"words={list(words)!r}: {bad[0]!r} is not a single word")
    wanted = {w.casefold() for w in words}
    return [len(wanted.intersection(_words(completion_text(c)))) / len(wanted) for c in completions]


def distinct_words(completions: Sequence[Completion]) -> list[float]:
    """Rewards variety: different words / words of the completion, in [0, 1]; 0 without a word."""
    counts = [(len(set(words)), len(words)) for words in (_words(completion_text(c)) for c in completions)]
    return [different / total if total else 0.0 for different, total in counts]


def countdown(
    completions: Sequence[Completion], numbers: Sequence[Sequence[int]], target: Sequence[int]
) -> list[float]:
    r"""Rewards 1 if the completion's expression equals the target, using each number at most once, else 0.

    The expression is the content of the last ``<answer>...</answer>`` or ``\boxed{}``, else the first line;
    what follows an equals sign is left out. It is evaluated exactly, whole numbers with ``+ - * / ( )`` only.

    Args:
        completions: B completions.
        numbers: column, the numbers that may be used.
        target: column.
    """
    rows = zip(completions, numbers, target, strict=True)
    return [float(reaches_target(completion_text(c), list(given), goal)) for c, given, goal in rows]


def reasoning_gym(completions: Sequence[Completion], entry: Sequence[Mapping[str, Any]]) -> list[float]:
    """Rewards what the scorer of a reasoning-gym task gives (extra `reasoning-gym`), in [0, 1].

    Args:
        completions: B completions; the last ``<answer>...</answer>`` is the answer, else the whole text.
        entry: column, the problem as reasoning-gym made it.
    """
    return [score_entry(completion_text(c), problem) for c, problem in zip(completions, entry, strict=True)]


REWARDS: dict[str, Callable[..., list[float]]] = {
    function.__name__: function
    for function in (
        exact_match,
        numeric_answer,
        regex_format,
        length_penalty,
        required_words,
        distinct_words,
        countdown,
        reasoning_gym,
    )
}
