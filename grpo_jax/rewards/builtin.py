"""The built-in reward functions. Their columns are positional and their arguments keyword-only."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from grpo_jax.rewards.answer_rewards import (
    answer_match,
    check_answer,
    check_match,
    check_number,
    exact_match,
    math_answer,
    numeric_answer,
)
from grpo_jax.rewards.answers.gold import whole_number, whole_numbers
from grpo_jax.rewards.completions import Completion, completion_text
from grpo_jax.rewards.expressions import reaches_target
from grpo_jax.rewards.http_endpoint import check_sent, http_score
from grpo_jax.rewards.reasoning_gym import check_entry, judge_entry, read_entry


def regex_format(completions: Sequence[Completion], *, pattern: str, search: bool = False) -> list[float]:
    """Rewards 1 if the completion matches a regular expression, and 0 otherwise.

    Args:
        completions: B completions.
        pattern: Python regular expression. Flags go inside, such as `(?s)` to let a dot match newlines.
        search: whether the pattern may match anywhere. Otherwise it must match the whole completion.
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
    """Rewards 1 for exactly ``<think>...</think><answer>...</answer>``, and 0 otherwise.

    Every tag must open and close once, in order, and only white space may be outside.

    Args:
        completions: B completions.
        tags: names of the tags, at least one.
        opened: whether the prompt ends with the first tag, so that completions start inside it.
    """
    if isinstance(tags, str) or not tags or any(not isinstance(t, str) or not t for t in tags):
        raise ValueError(f"tags={tags!r}: give a list of at least one name")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    pattern = re.compile(r"\s*" + r"\s*".join(rf"<{re.escape(t)}>(.*?)</{re.escape(t)}>" for t in tags), re.S)
    rewards = []
    for completion in completions:
        text = (marks[0] if opened else "") + completion_text(completion).rstrip()
        once = all(text.count(mark) == 1 for mark in marks)  # so that the pattern never backtracks
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

    The value is in [-1, 0]. A reward function sees strings, and in English a token has about 4 characters.

    Args:
        completions: B completions.
        target: number of characters or words without a penalty, 0 or more.
        window: number of characters or words beyond the target at which the penalty reaches -1. None means as
            many as the target.
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
    """Penalises n-grams of words that occur again: distinct n-grams / n-grams - 1, in [-1, 0].

    This is the penalty of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (https://arxiv.org/abs/2502.03373,
    appendix C.2) as open-r1 computes it (`get_repetition_penalty_reward`, whose max_penalty is minus our
    weight). Words are separated by white space and lower-cased. Fewer than n words give 0.

    Args:
        completions: B completions.
        ngram: n, the number of words in a row.
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

    Whole words are compared, without regard to case. Combine it with other rewards, because alone it teaches
    the model to recite the list.

    Args:
        completions: B completions.
        words: the words, at least one.
    """
    if isinstance(words, str) or not words or any(not isinstance(w, str) for w in words):
        raise ValueError(f"words={words!r}: give a list of at least one word")
    bad = [w for w in words if _words(w) != [w.casefold()]]
    if bad:
        raise ValueError(f"words={list(words)!r}: {bad[0]!r} is not a single word")
    wanted = {w.casefold() for w in words}
    return [len(wanted.intersection(_words(completion_text(c)))) / len(wanted) for c in completions]


def distinct_words(completions: Sequence[Completion]) -> list[float]:
    """Rewards variety: different words / words of the completion, in [0, 1]. Without a word it is 0."""
    counts = [(len(set(words)), len(words)) for words in (_words(completion_text(c)) for c in completions)]
    return [different / total if total else 0.0 for different, total in counts]


def countdown(
    completions: Sequence[Completion], numbers: Sequence[Any], target: Sequence[Any]
) -> list[float]:
    r"""Rewards 1 if the completion's expression equals the target and uses each number at most once.

    All others give 0. The expression is the content of the last ``<answer>...</answer>`` or ``\boxed{}``, or
    without these the first line. An equals sign ends it. It may have only whole numbers and ``+ - * / ( )``,
    and is evaluated exactly.

    Args:
        completions: B completions.
        numbers: column of the numbers that may be used: a list of whole numbers, or a text such as `[12,
            34]`.
        target: column of whole numbers.

    Raises:
        ValueError: a row has another value in one of these columns.
    """
    rewards = []
    for completion, given, goal in zip(completions, numbers, target, strict=True):
        reached = reaches_target(completion_text(completion), whole_numbers(given), whole_number(goal))
        rewards.append(float(reached))
    return rewards


def _check_countdown(columns: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    for name, read in (("numbers", whole_numbers), ("target", whole_number)):
        try:
            read(columns.get(name))
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from None


def reasoning_gym(completions: Sequence[Completion], entry: Sequence[Mapping[str, Any]]) -> list[float]:
    """Rewards the score that a reasoning-gym task gives (extra `reasoning-gym`), in [0, 1].

    Args:
        completions: B completions. The last ``<answer>...</answer>`` is the answer, or else the whole text.
        entry: column of the problems as reasoning-gym made them, or their JSON texts.

    Raises:
        ValueError: a row has no such problem.
    """
    problems = zip(completions, entry, strict=True)
    return [judge_entry(completion_text(c), read_entry(problem)) for c, problem in problems]


def _check_reasoning_gym(columns: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    check_entry(columns.get("entry"))


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

    Our decoder computes it on the device that trains. The text is prompt + completion, or what the
    classifier's chat template makes of the messages. As in TRL, no further special tokens are added.

    Args:
        prompts: B prompts.
        completions: B completions.
        model: directory or hub id of a `...ForSequenceClassification`.
        label: index of the logit, or its name in the model's id2label.
        batch_size: number of texts that are scored at once.
        max_length: largest number of tokens. A longer text has no reward. None means the model's positions.
        dtype: data type of the computation.
    """
    from grpo_jax.rewards.classifier import (  # loads JAX, which the other rewards never do
        judge_texts,
        load_classifier,
    )

    classifier = load_classifier(model, dtype)
    settings = {"label": label, "batch_size": batch_size, "max_length": max_length}
    return judge_texts(classifier, prompts, completions, **settings)


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

# name -> check(columns of one row, arguments of the reward), which raises ValueError with the reason why the
# reward cannot use that row
ROW_CHECKS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], None]] = {
    "exact_match": check_answer,
    "numeric_answer": check_number,
    "answer_match": check_match,
    "math_answer": check_answer,
    "countdown": _check_countdown,
    "reasoning_gym": _check_reasoning_gym,
    "http_score": check_sent,
}
