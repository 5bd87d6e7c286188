"""Reward functions on strings: loading them, calling them, adding them up.

A reward function has the signature that users of TRL know, ``f(prompts, completions, **columns) ->
list[float | None]``. Everything is passed by keyword as a list with one entry per completion; a function
without ``**columns`` gets only what it names. Completions are strings where the prompt is a string, and
``[{"role": "assistant", "content": text}]`` where the prompt is a list of messages. None means that there
is no reward for that completion, which is not the same as 0.
"""

import difflib
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax.http_scores import EndpointError
from grpo_jax.reward_functions import REWARDS, Completion, completion_text
from grpo_jax.reward_pool import RewardPool, WorkerError
from grpo_jax.reward_sources import find_function
from grpo_jax.verl_scores import PREFIX, TRUTHS, adapt_compute_score

if TYPE_CHECKING:
    from grpo_jax.config import RewardConfig

Prompt = str | list[dict[str, Any]]


class RewardError(ValueError):
    """A reward function failed or returned what is no reward; the message names function and row."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One reward function of a run.

    Args:
        name: unique in the run; metrics are called `rewards/<name>/...`.
        function: f(prompts, completions, **columns) -> list of B numbers or None.
        weight: factor in the sum.
        arguments: fixed keyword arguments of the function.
        source: where the function comes from, for messages.
        pool: processes that call it, with a timeout; None: it is called here.
        one_of: columns of which the data must have at least one.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source: str = "built in"
    pool: RewardPool | None = None
    one_of: tuple[str, ...] = ()


def load_rewards(specs: "Sequence[RewardConfig]") -> tuple[Reward, ...]:
    """Loads the reward functions of a config.

    Args:
        specs: function (a name in REWARDS, `package.module:function`, `path/file.py:function`, or one of
            these two for verl's compute_score as `verl:...`), weight and arguments of each. A name that
            comes twice gets `_2`, `_3`, ... One with a timeout gets processes of its own, which start with
            the first batch and end with `close_rewards`, or with this process.

    Returns:
        R rewards in the order given.

    Raises:
        ValueError: a function that cannot be loaded, or arguments that it does not take, in one line.
    """
    rewards: list[Reward] = []
    for spec in specs:
        reward = _load(spec)
        taken, name = {reward.name for reward in rewards}, reward.name
        unique = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(specs) + 2))) if n not in taken)
        reward = replace(reward, name=unique)
        _check_reward(reward)
        rewards.append(replace(reward, pool=_make_pool(reward, spec)))
    return tuple(rewards)


def _load(spec: "RewardConfig") -> Reward:
    weight, arguments = float(spec.weight), dict(spec.arguments)
    if spec.function in REWARDS:
        function = REWARDS[spec.function]
        return Reward(name=spec.function, function=function, weight=weight, arguments=arguments)
    own = spec.function.removeprefix(PREFIX)
    name, function, source = find_function(own, built_in=tuple(REWARDS))
    if own == spec.function:
        return Reward(name=name, function=function, weight=weight, arguments=arguments, source=source)
    try:
        adapted = adapt_compute_score(function, arguments)
    except ValueError as error:
        raise ValueError(f"reward `{name}` ({source}): {error}") from None
    return Reward(name=name, function=adapted, weight=weight, source=source, one_of=TRUTHS)


def _make_pool(reward: Reward, spec: "RewardConfig") -> RewardPool | None:
    if spec.timeout is None:
        return None
    if reward.function is REWARDS["reward_model"]:
        raise ValueError(f"{_named(reward)} computes on the device that trains; it takes no timeout")
    return RewardPool(
        who=_named(reward),
        function=spec.function,
        arguments=spec.arguments,
        timeout=spec.timeout,
        workers=spec.workers,
        rows_per_call=spec.rows_per_call,
    )


def close_rewards(rewards: Sequence[Reward]) -> None:
    """Ends the processes of those rewards that have some."""
    for reward in rewards:
        if reward.pool is not None:
            reward.pool.close()


def _named(reward: Reward) -> str:
    return f"reward `{reward.name}` ({reward.source})"


def _parameters(reward: Reward) -> tuple[dict[str, inspect.Parameter], bool]:
    """Returns (parameters by name, whether it takes any keyword)."""
    parameters = inspect.signature(reward.function).parameters.values()
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (
        {p.name: p for p in parameters if p.kind in keywords},
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
    )


def _check_reward(reward: Reward) -> None:
    who, arguments = _named(reward), reward.arguments
    if not math.isfinite(reward.weight):
        raise ValueError(f"{who}: weight {reward.weight} is not a finite number")
    try:
        parameters, takes_any = _parameters(reward)
    except (ValueError, TypeError):
        raise ValueError(f"{who}: its signature cannot be read; wrap it in a Python function") from None
    if inspect.iscoroutinefunction(reward.function):
        raise ValueError(f"{who} is async; a reward function is called, not awaited")
    if "completions" not in parameters and not takes_any:
        raise ValueError(
            f"{who} has no parameter `completions`; the signature is f(prompts, completions, **columns)"
        )
    for name in arguments:
        if name in ("prompts", "completions"):
            raise ValueError(f"{who}: `{name}` cannot be given in its arguments")
        if name not in parameters and (not takes_any or reward.source == "built in"):
            known = [p for p in parameters if p not in ("prompts", "completions")]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(known) or 'none'}"
            raise ValueError(f"{who} takes no argument `{name}`; {hint}")
    if reward.source == "built in":
        _try_arguments(reward, parameters)


def _try_arguments(reward: Reward, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Checks the arguments of a built-in: its columns are positional, its arguments keyword-only."""
    who = _named(reward)
    own = {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for name, parameter in own.items():
        if parameter.default is inspect.Parameter.empty and name not in reward.arguments:
            raise ValueError(f"{who} needs the argument `{name}`: add arguments: {{{name}: ...}}")
    for name in reward.arguments:
        if name not in own:
            raise ValueError(f"{who}: `{name}` is a column of the data, not an argument")
    columns = {name: [] for name in parameters if name not in own}
    try:  # a batch of no rows checks the values
        reward.function(**columns, **reward.arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{who}: {error}") from None


def check_columns(rewards: Sequence[Reward], columns: Iterable[str]) -> None:
    """Checks that the data has the columns that the reward functions need, before anything runs.

    Args:
        rewards: R reward functions.
        columns: names of the data's columns, without `prompt`.

    Raises:
        ValueError: names the function, the missing column and the columns there are.
    """
    columns = list(columns)
    there = ", ".join(f"`{column}`" for column in columns) or "none"
    for name in ("prompts", "completions"):
        if name in columns:
            raise ValueError(f"the data has a column `{name}`, which is what reward functions get; rename it")
    for reward in rewards:
        parameters, takes_any = _parameters(reward)
        if reward.one_of and not set(reward.one_of) & {*columns}:
            wanted = ", ".join(f"`{column}`" for column in reward.one_of)
            raise ValueError(f"{_named(reward)} needs one of the columns {wanted}; columns: {there}")
        for name, parameter in parameters.items():
            given = name in ("prompts", "completions") or name in columns or name in reward.arguments
            if parameter.default is inspect.Parameter.empty and not given:
                raise ValueError(
                    f"{_named(reward)} needs `{name}`, which is neither a column of the data nor in its "
                    f"arguments; columns: {there}"
                )
        for name in reward.arguments:
            if name in columns and (name in parameters or takes_any):
                raise ValueError(
                    f"{_named(reward)}: its argument `{name}` hides the column `{name}`; drop one"
                )


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    """Calls every reward function on a batch.

    Args:
        rewards: R reward functions.
        prompts: B strings or lists of messages.
        completions: B completions; a string under a prompt of messages is handed over as a message.
        columns: the data's other columns, each with B entries.

    Returns:
        [B, R] float32, NaN where a function returned None.

    Raises:
        RewardError: a function raised, or returned the wrong length, type, or a value that is not finite.
        ValueError: prompts, completions and columns differ in length.
    """
    size = len(prompts)
    for name, values in {"completions": completions, **columns}.items():
        if len(values) != size:
            raise ValueError(f"{size} prompts, but `{name}` has {len(values)} entries")
    completions = [
        [{"role": "assistant", "content": completion}]
        if isinstance(completion, str) and not isinstance(prompt, str)
        else completion
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    batch = {**columns, "prompts": prompts, "completions": completions}
    scores = np.full((size, len(rewards)), np.nan, np.float32)
    for r, reward in enumerate(rewards):
        try:
            if reward.pool is not None:
                wanted = {name: values for name, values in columns.items() if _takes(reward, name)}
                scores[:, r] = reward.pool.score(prompts, completions, wanted)
                continue
            values = _call(reward, batch)
        except WorkerError as error:  # the worker has explained it
            raise RewardError(str(error)) from None
        except EndpointError as error:  # no row is to blame
            raise RewardError(f"{_named(reward)}: {error}") from None
        except Exception as error:
            raise _explain(reward, batch, size, error) from error
        scores[:, r] = _checked(reward, values, completions)
    return scores


def _takes(reward: Reward, name: str) -> bool:
    """Says whether a function is called with a column; what is keyword-only in a built-in is an argument."""
    parameters, takes_any = _parameters(reward)
    if name not in parameters:
        return takes_any
    is_argument = parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    return not (is_argument and reward.function in REWARDS.values())


def _call(reward: Reward, batch: Mapping[str, Sequence[Any]]) -> Any:
    # A list of its own for every function: one that sorts or pops must not hurt the next.
    passed = {name: list(values) for name, values in batch.items() if _takes(reward, name)}
    return reward.function(**{**passed, **reward.arguments})


def _explain(reward: Reward, batch: Mapping[str, Sequence[Any]], size: int, error: Exception) -> RewardError:
    """Finds the first row that makes a function raise, by calling it on single rows."""
    told = f"{_named(reward)} raised {error!r}{_place(error)} on a batch of {size} rows"
    for row in range(size):
        try:
            _call(reward, {name: values[row : row + 1] for name, values in batch.items()})
        except Exception as alone:
            again = "" if repr(alone) == repr(error) else f" alone raises {alone!r}{_place(alone)};"
            return RewardError(f"{told}; row {row}{again} {_shown(batch['completions'][row])}")
    return RewardError(f"{told}; no single row does so alone")


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)[2:]  # beyond `score` (or `_explain`) and `_call`
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _shown(completion: Completion) -> str:
    return f"(completion {_short(completion_text(completion))})"


def _checked(reward: Reward, values: Any, completions: Sequence[Completion]) -> list[float]:
    """Turns what a function returned into B floats, NaN for None."""
    who, size = _named(reward), len(completions)
    is_list = isinstance(values, Iterable) and isinstance(values, Sized)
    if not is_list or isinstance(values, (str, bytes, Mapping, set, frozenset)):
        raise RewardError(f"{who} returned {type(values).__name__}, not a list of {size} numbers")
    if len(values) != size:
        raise RewardError(f"{who} returned {len(values)} values for {size} completions")
    floats = []
    for row, value in enumerate(values):
        if value is None:
            floats.append(math.nan)
            continue
        if not _is_number(value):
            raise RewardError(
                f"{who} returned {_short(value)} of type {type(value).__name__} for row {row}, not a number "
                f"or None {_shown(completions[row])}"
            )
        if not _is_finite(value):
            raise RewardError(
                f"{who} returned {_short(value)} for row {row}; a reward is a finite float32, and a missing "
                f"one is None {_shown(completions[row])}"
            )
        floats.append(float(value))
    return floats


def _is_number(value: Any) -> bool:
    if isinstance(value, numbers.Real):
        return True
    try:  # scalars of NumPy and of whatever it understands
        array = np.asarray(value)
    except Exception:  # whatever the foreign type raises: no number
        return False
    return array.ndim == 0 and array.dtype.kind in "biuf"


def _is_finite(value: Any) -> bool:
    try:
        return abs(float(value)) <= float(np.finfo(np.float32).max)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def reward_means(rewards: Sequence[Reward], scores: np.ndarray) -> dict[str, float]:
    """Returns rewards/<name>/mean and /std (ddof 1) over the values each function gave, absent if none; and
    rewards/<name>/missing, the share of the rows without one. For a function with a timeout also
    rewards/<name>/timeouts, the share of the rows whose call ran over it or killed its worker, of those
    scored since the last time.
    """
    metrics = {}
    for reward, column in zip(rewards, scores.astype(np.float64).T, strict=True):
        name, values = f"rewards/{reward.name}", column[~np.isnan(column)]
        if values.size:
            metrics[f"{name}/mean"] = float(values.mean())
            metrics[f"{name}/std"] = float(values.std(ddof=1)) if values.size > 1 else 0.0
        metrics[f"{name}/missing"] = 1.0 - values.size / column.size
        if reward.pool is not None:
            metrics[f"{name}/timeouts"] = reward.pool.take_lost() / column.size
    return metrics
