"""Adapts reward functions of verl: compute_score(data_source, solution_str, ground_truth, extra_info).

A config names one as `verl:path/file.py:compute_score`. It is called for one completion at a time, with the
columns of verl's data sets: `data_source`, `extra_info`, and the truth in
`reward_model: {ground_truth: ...}`.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from grpo_jax.rewards.awaiting import is_async
from grpo_jax.rewards.builtin import Completion, completion_text
from grpo_jax.rewards.calling import own_copy
from grpo_jax.spelling import suggest

PREFIX = "verl:"
# The data must have one of these columns. If it has several, the first counts.
TRUTHS = ("ground_truth", "reward_model", "answer")
_GIVEN = ("data_source", "solution_str", "ground_truth", "extra_info")


def adapt_compute_score(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Makes a reward function from a compute_score.

    Args:
        function: a compute_score. It returns a number, or a mapping with the number as `score`.
        arguments: its further keyword arguments.

    Returns:
        f(completions, ...) with the columns `ground_truth`, `reward_model` or `answer`, and with
        `data_source` and `extra_info`. Where the last two are missing or null, compute_score gets "" and {}.
        An async compute_score is awaited for all rows of a batch at the same time.

    Raises:
        ValueError: the function does not take the keywords that verl passes, or these arguments.
    """
    _check(function, arguments)

    def verl_score(
        completions: Sequence[Completion],
        ground_truth: Sequence[Any] | None = None,
        reward_model: Sequence[Any] | None = None,
        answer: Sequence[Any] | None = None,
        data_source: Sequence[Any] | None = None,
        extra_info: Sequence[Any] | None = None,
    ) -> Any:
        nested = None if reward_model is None else [row["ground_truth"] for row in reward_model]
        truths = next(column for column in (ground_truth, nested, answer) if column is not None)
        size = len(completions)
        rows = zip(
            completions, truths, data_source or [None] * size, extra_info or [None] * size, strict=True
        )
        calls = [
            partial(
                function,
                data_source="" if source is None else source,
                solution_str=completion_text(completion),
                ground_truth=truth,
                extra_info={} if info is None else info,
                **own_copy(dict(arguments)),
            )
            for completion, truth, source, info in rows
        ]
        return _all_at_once(calls) if is_async(function) else [_number(call()) for call in calls]

    return verl_score


def check_truth(columns: Mapping[str, Any]) -> None:
    """Checks that one row has a ground truth.

    Args:
        columns: the columns of the row, one of which is in TRUTHS.

    Raises:
        ValueError: the truth is null, or the value that should hold it is not a mapping.
    """
    name = next(name for name in TRUTHS if name in columns)
    truth = columns[name]
    if name == "reward_model":
        if not isinstance(truth, Mapping) or "ground_truth" not in truth:
            raise ValueError(f"column `reward_model` is {truth!r:.60}, not a mapping with `ground_truth`")
        name = "reward_model.ground_truth"
        truth = truth["ground_truth"]
    if truth is None:
        raise ValueError(f"`{name}` is null; write an empty text if compute_score needs no truth")


async def _all_at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    return [_number(value) for value in await asyncio.gather(*(call() for call in calls))]


def _number(returned: Any) -> Any:
    if not isinstance(returned, Mapping):
        return returned
    if "score" not in returned:
        raise ValueError(f"compute_score returned a mapping without `score`: it has {', '.join(returned)}")
    return returned["score"]


def _check(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not takes_any and (lacking := [name for name in _GIVEN if name not in names]):
        raise ValueError(
            f"it has no parameter `{lacking[0]}`; verl calls compute_score({', '.join(_GIVEN)}) by keyword"
        )
    for name in arguments:
        if name in _GIVEN:
            raise ValueError(f"`{name}` cannot be given in its arguments")
        if name not in names and not takes_any:
            own = [n for n in names if n not in _GIVEN]
            hint = suggest(name, own, f"it takes {', '.join(own) or 'none'}")
            raise ValueError(f"it takes no argument `{name}`; {hint}")
