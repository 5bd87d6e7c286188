"""The reward functions that come with the package. Columns are positional, arguments keyword-only."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from grpo_jax.expressions import reaches_target
from grpo_jax.http_scores import http_score
from grpo_jax.tasks.reasoning_gym import score_entry
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


def _check_place(where: str | None) -> None:
    if where is not None and where not in PLACES:
        raise ValueError(f"where={where!r}: choose one of {', '.join(PLACES)}")


def _expected_answer(answer: Any, *, where: Where | None, tag: str = "answer") -> str:
    """Returns a column's answer: what is behind GSM8K's `####`, else at the place, else all of the text."""
    text = str(answer)
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
        target = _expected_answer(expected, where=where, tag=tag)
        equal = found is not None and answers_equal(found, target, tolerance=tolerance)
        rewards.append(float(equal))
    return rewards


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
        equal = False if text is None else math_equal(text, _expected_answer(expected, where=None))
        rewards.append(None if equal is None else float(equal))
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


def think_format(
    completions: Sequence[Completion], *, tags: Sequence[str] = ("think", "answer"), opened: bool = False
) -> list[float]:
    """Rewards 1 for ``<think>...</think><answer>...</answer>`` and nothing else, else 0.

    Every tag opens and closes once, in order, with white space at most outside.

    Args:
        completions: B completions.
        tags: names of the tags, at least one.
        opened: the prompt ends with the first tag, so completions start inside it.
    """
    if isinstance(tags, str) or not tags or any(not isinstance(t, str) or not t for t in tags):
        raise ValueError(f"tags={tags!r}: give a list of at least one name")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    pattern = re.compile(r"\s*" + r"\s*".join(rf"<{re.escape(t)}>(.*?)</{re.escape(t)}>" for t in tags), re.S)
    rewards = []
    for completion in completions:
        text = (marks[0] if opened else "") + completion_text(completion).rstrip()
        once = all(text.count(mark) == 1 for mark in marks)  # so that the pattern never goes back
        rewards.append(float(once and pattern.fullmatch(text) is not None))
    return rewards


def length_penalty(
    completions: Sequence[Completion],
    *,
    target: int,
    window: int | None = None,
    unit: Literal["characters", "words"] = "characters",
) -> list[float]:
    """Penalises every character or word beyond a target: -min(1, max(0, length - target) / window).

    In [-1, 0]. A reward function sees strings; a token is about 4 characters in English.

    Args:
        completions: B completions.
        target: characters or words that are free, 0 or more.
        window: how many beyond the target until the penalty is full; None: as many as the target.
        unit: `characters`, or `words` between white space.
    """
    if unit not in ("characters", "words"):
        raise ValueError(f"unit={unit!r}: choose 'characters' or 'words'")
    window = target if window is None else window
    if target < 0 or window < 1:
        raise ValueError(f"target={target}, window={window}: target is 0 or more, window at least 1")
    texts = [completion_text(c) for c in completions]
    lengths = [len(text) if unit == "characters" else len(text.split()) for text in texts]
    return [-min(1.0, max(0, length - target) / window) for length in lengths]


def repetition_penalty(completions: Sequence[Completion], *, ngram: int = 3) -> list[float]:
    """Penalises n-grams of words that were there before: distinct n-grams / n-grams - 1, in [-1, 0].

    The penalty of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (https://arxiv.org/abs/2502.03373,
    appendix C.2) as open-r1 computes it (`get_repetition_penalty_reward`, whose max_penalty is minus our
    weight): words are what white space separates, in lower case; 0 for fewer than n words.

    Args:
        completions: B completions.
        ngram: n, words in a row.
    """
    if ngram < 1:
        raise ValueError(f"ngram={ngram}: at least 1 word")
    rewards = []
    for completion in completions:
        words = completion_text(completion).lower().split()
        grams = list(zip(*(words[i:] for i in range(ngram)), strict=False))
        rewards.append(len(set(grams)) / len(grams) - 1.0 if grams else 0.0)
    return rewards


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


def reward_model(
    prompts: Sequence[Completion],
    completions: Sequence[Completion],
    *,
    model: str,
    label: int | str = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> list[float | None]:
    """Rewards the logit that a sequence classifier, such as a trained reward model, gives the text.

    Computed by our decoder, on the device that trains. The text is prompt + completion, or what the
    classifier's chat template makes of the messages, without further special tokens, as TRL has it.

    Args:
        prompts: B prompts.
        completions: B completions.
        model: directory or hub id of a `...ForSequenceClassification`.
        label: number, or name in the model's id2label, of the logit.
        batch_size: texts scored at once.
        max_length: tokens at most; a longer text has no reward. None: the model's positions.
        dtype: compute dtype.
    """
    from grpo_jax.reward_models import load_classifier, score_texts  # loads JAX, which others here never do

    classifier = load_classifier(model, dtype)
    settings = {"label": label, "batch_size": batch_size, "max_length": max_length}
    return score_texts(classifier, prompts, completions, **settings)


REWARDS: dict[str, Callable[..., list[float]]] = {
    function.__name__: function
    for function in (
        exact_match,
        numeric_answer,
        answer_match,
        math_answer,
        regex_format,
        think_format,
        length_penalty,
        repetition_penalty,
        required_words,
        distinct_words,
        countdown,
        reasoning_gym,
        http_score,
        reward_model,
    )
}
