"""Loads the reward functions of a config, and checks them against the data.

`grpo_jax/rewards/calling.py` has their signature and calls them.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from grpo_jax.named_objects import find_function
from grpo_jax.rewards.builtin import REWARDS, ROW_CHECKS
from grpo_jax.rewards.extras import EXTRAS
from grpo_jax.rewards.pool import RewardPool
from grpo_jax.rewards.reward import Reward, RewardError, named, parameters_of
from grpo_jax.rewards.verl import PREFIX, TRUTHS, adapt_compute_score, check_truth
from grpo_jax.spelling import suggest

if TYPE_CHECKING:  # reward workers load this module without JAX
    from grpo_jax.config.run import RewardConfig
    from grpo_jax.types import Example

__all__ = [
    "REWARDS",
    "Reward",
    "RewardError",
    "check_columns",
    "check_rows",
    "close_rewards",
    "load_rewards",
]


# Arguments that TRL passes to reward functions and we do not.
_ONLY_TRL = ("environments",)


def load_rewards(specs: "Sequence[RewardConfig]") -> tuple[Reward, ...]:
    """Loads the reward functions of a config.

    Args:
        specs: function, weight and arguments of each reward. A function is itself, a name in REWARDS,
            `package.module:function`, `path/file.py:function`, or `verl:` and one of the last two, for a
            compute_score of verl. A name that occurs again becomes `<name>_2`, `<name>_3` and so on. A reward
            with a timeout has processes of its own, which start with the first batch and end with
            `close_rewards` or with this process.

    Returns:
        R rewards in the order given.

    Raises:
        ValueError: a function cannot be loaded, or does not take its arguments. The message is one line.
    """
    rewards: list[Reward] = []
    for spec in specs:
        reward = _load(spec)
        taken = {reward.name for reward in rewards}
        name = reward.name
        unique = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(specs) + 2))) if n not in taken)
        reward = replace(reward, name=unique)
        _check_reward(reward)
        rewards.append(replace(reward, pool=_make_pool(reward, spec)))
    return tuple(rewards)


def _load(spec: "RewardConfig") -> Reward:
    weight = float(spec.weight)
    arguments = dict(spec.arguments)
    if not isinstance(spec.function, str):  # from Python
        return _of_object(spec.function, weight, arguments)
    if spec.function in REWARDS:
        function = REWARDS[spec.function]
        check = ROW_CHECKS.get(spec.function)
        check_row = None if check is None else partial(check, arguments=arguments)
        return Reward(
            name=spec.function, function=function, weight=weight, arguments=arguments, check_row=check_row
        )
    own = spec.function.removeprefix(PREFIX)
    name, function, source = find_function(own, built_in=tuple(REWARDS))
    if own == spec.function:
        return Reward(name=name, function=function, weight=weight, arguments=arguments, source=source)
    try:
        adapted = adapt_compute_score(function, arguments)
    except ValueError as error:
        raise ValueError(f"reward `{name}` ({source}): {error}") from None
    return Reward(
        name=name, function=adapted, weight=weight, source=source, one_of=TRUTHS, check_row=check_truth
    )


def _of_object(function: Any, weight: float, arguments: dict[str, Any]) -> Reward:
    """Makes the reward of a function that is given as itself."""
    if inspect.isclass(function) or not callable(function):
        what = f"the class {function.__name__}" if inspect.isclass(function) else f"{function!r:.60}"
        raise ValueError(f"rewards: {what} is no function; give f(prompts, completions, **columns)")
    name = getattr(function, "__name__", None) or type(function).__name__
    if isinstance(function, partial):
        name = getattr(function.func, "__name__", name)
    code = getattr(inspect.unwrap(function), "__code__", None)
    source = f"{code.co_filename}:{code.co_firstlineno}" if code else "from Python"
    return Reward(name=name, function=function, weight=weight, arguments=arguments, source=source)


def _make_pool(reward: Reward, spec: "RewardConfig") -> RewardPool | None:
    if spec.timeout is None:
        return None
    if reward.function is REWARDS["reward_model"]:
        raise ValueError(f"{named(reward)} computes on the device that trains; it takes no timeout")
    if not isinstance(spec.function, str):
        raise ValueError(
            f"{named(reward)} is an object of this process, and a timeout needs a process of its own; name "
            "the function as package.module:function or path/file.py:function"
        )
    return RewardPool(
        who=named(reward),
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


def _check_reward(reward: Reward) -> None:
    who = named(reward)
    arguments = reward.arguments
    if not math.isfinite(reward.weight):
        raise ValueError(f"{who}: weight {reward.weight} is not a finite number")
    try:
        parameters, takes_any = parameters_of(reward)
    except (ValueError, TypeError):
        raise ValueError(f"{who}: its signature cannot be read; wrap it in a Python function") from None
    if "completions" not in parameters and not takes_any:
        raise ValueError(
            f"{who} has no parameter `completions`; the signature is f(prompts, completions, **columns)"
        )
    for name in arguments:
        if name in ("prompts", "completions"):
            raise ValueError(f"{who}: `{name}` cannot be given in its arguments")
        if name not in parameters and (not takes_any or reward.source == "built in"):
            known = [p for p in parameters if p not in ("prompts", "completions")]
            hint = suggest(name, known, f"it takes {', '.join(known) or 'none'}")
            raise ValueError(f"{who} takes no argument `{name}`; {hint}")
    if reward.source == "built in":
        _try_arguments(reward, parameters)


def _try_arguments(reward: Reward, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Checks the arguments of a built-in: its columns are positional, its arguments keyword-only."""
    who = named(reward)
    own = {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for name, parameter in own.items():
        if parameter.default is inspect.Parameter.empty and name not in reward.arguments:
            raise ValueError(f"{who} needs the argument `{name}`: add arguments: {{{name}: ...}}")
    for name in reward.arguments:
        if name not in own:
            raise ValueError(f"{who}: `{name}` is a column of the data, not an argument")
    columns: dict[str, list] = {name: [] for name in parameters if name not in own}
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
        ValueError: the message names the function, the missing column and the columns of the data.
    """
    columns = list(columns)
    available = ", ".join(f"`{column}`" for column in columns) or "none"
    for name in ("prompts", "completions"):
        if name in columns:
            raise ValueError(f"the data has a column `{name}`, which is what reward functions get; rename it")
    for reward in rewards:
        parameters, takes_any = parameters_of(reward)
        if reward.one_of and not set(reward.one_of) & {*columns}:
            wanted = ", ".join(f"`{column}`" for column in reward.one_of)
            raise ValueError(f"{named(reward)} needs one of the columns {wanted}; columns: {available}")
        for name in _named_columns(reward):
            if name not in columns:
                raise ValueError(
                    f"{named(reward)}: its argument `columns` names `{name}`; columns: {available}"
                )
        for name, parameter in parameters.items():
            given = name in ("prompts", "completions", *EXTRAS) or name in {*columns, *reward.arguments}
            required = parameter.default is inspect.Parameter.empty and not given
            if required and name in _ONLY_TRL:
                raise ValueError(
                    f"{named(reward)} needs `{name}`, which TRL passes and grpo_jax does not; give it a "
                    f"default, such as {name}=None"
                )
            if required:
                raise ValueError(
                    f"{named(reward)} needs `{name}`, which is neither a column of the data nor in its "
                    f"arguments; columns: {available}"
                )
        for name in reward.arguments:
            if name in columns and (name in parameters or takes_any):
                raise ValueError(
                    f"{named(reward)}: its argument `{name}` hides the column `{name}`; drop one"
                )


def _named_columns(reward: Reward) -> Sequence[str]:
    """Returns the columns that the arguments of a reward name."""
    return reward.arguments.get("columns") or () if reward.function is REWARDS["http_score"] else ()


def check_rows(rewards: Sequence[Reward], examples: Iterable["Example"]) -> list[tuple[int, str]]:
    """Finds the rows that a reward cannot use, before anything runs.

    `check_columns` has checked that the columns exist. Here, built-in rewards check the values in them.

    Args:
        rewards: R reward functions.
        examples: N rows of the data.

    Returns:
        (index, reason) of every such row, in order, such as (29, "reward `numeric_answer`: the expected
        answer is null (None)"). If several rewards cannot use a row, it has the reason of the first.
    """
    checks = [(reward.name, reward.check_row) for reward in rewards if reward.check_row is not None]
    found = []
    for index, example in enumerate(examples):
        for name, check in checks:
            try:
                check(example.columns)
            except ValueError as error:
                found.append((index, f"reward `{name}`: {error}"))
                break
    return found
