"""Calls reward functions on a batch, and checks what they return.

A reward function has the signature that users of TRL know, ``f(prompts, completions, **columns) ->
list[float | None]``. Everything is passed by keyword as a list with one entry per completion. The function
gets copies, so it may change them. A function without ``**columns`` gets only the columns that it names.
Completions are strings if the prompt is a string, and ``[{"role": "assistant", "content": text}]`` if the
prompt is a list of messages. None means that there is no reward for that completion, which is not the same
as 0. The function may be async, and all async functions of a batch wait at the same time. A function that
names `completion_ids`, `trainer_state`, `log_metric` or `log_extra` gets them, see `extras`.
"""

import contextlib
import copy
import inspect
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax.error_places import user_frame
from grpo_jax.rewards.awaiting import end_fork, is_async, start
from grpo_jax.rewards.completions import Completion, completion_text
from grpo_jax.rewards.endpoint_error import EndpointError
from grpo_jax.rewards.extras import Extras, is_number, wanted_extras
from grpo_jax.rewards.pool import WorkerError
from grpo_jax.rewards.reward import Reward, RewardError, named, takes

if TYPE_CHECKING:  # reward workers load this module without JAX
    from grpo_jax.types import Prompt

_IMMUTABLE = frozenset((str, int, float, bool, type(None)))  # the types that need no copy


@dataclass(frozen=True)
class _Batch:
    """What the functions are called with for B completions.

    Args:
        values: prompts, completions and columns by their keywords, each with B entries.
        extras: what some functions get besides.
    """

    values: Mapping[str, Sequence[Any]]
    extras: Extras

    @property
    def completions(self) -> Sequence[Completion]:
        return self.values["completions"]

    @property
    def columns(self) -> dict[str, Sequence[Any]]:
        return {name: v for name, v in self.values.items() if name not in ("prompts", "completions")}

    def alone(self, row: int) -> "_Batch":
        values = {name: values[row : row + 1] for name, values in self.values.items()}
        return _Batch(values, self.extras.alone(row))


def call_rewards(
    rewards: Sequence[Reward],
    prompts: "Sequence[Prompt]",
    completions: Sequence[Completion],
    columns: Mapping[str, Sequence[Any]],
    *,
    extras: Extras | None = None,
) -> np.ndarray:
    """Calls every reward function on a batch.

    Args:
        rewards: R reward functions.
        prompts: B strings or lists of messages.
        completions: B completions. A string under a prompt of messages is passed as a message.
        columns: the data's other columns, each with B entries.
        extras: token ids and the state of the training, and a log, for functions that name them.

    Returns:
        [B, R] float32. NaN means that a function returned None.

    Raises:
        RewardError: a function raised, or returned a wrong length or type, or a value that is not finite.
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
    batch = _Batch({**columns, "prompts": prompts, "completions": completions}, extras or Extras())
    scores = np.full((size, len(rewards)), np.nan, np.float32)
    begun = [_begin_call(reward, batch) for reward in rewards]
    try:
        for r in sorted(range(len(rewards)), key=lambda r: begun[r] is not None):  # async ones wait meanwhile
            scores[:, r] = _finish_call(rewards[r], batch, begun[r])
    finally:  # after an error, the other calls are not needed
        for call in filter(None, begun):
            call.cancel()
    return scores


# The name until version 0.2.
score = call_rewards


class _Failed(Exception):
    """A call raised `error`, which may also be SystemExit and its like."""

    def __init__(self, error: BaseException):
        super().__init__(repr(error))
        self.error = error


def _begin_call(reward: Reward, batch: _Batch) -> Future | None:
    """Starts the call of an async function, so that several of them wait at the same time.

    Args:
        reward: the reward function.
        batch: what it is called with.

    Returns:
        a future for `_finish_call`, or None for a function that is not async or has its own process.
    """
    if reward.pool is not None or not is_async(reward.function):
        return None
    return start(partial(_call, reward, batch))


def _finish_call(reward: Reward, batch: _Batch, begun: Future | None) -> list[float]:
    """Calls one reward function on a batch, or waits for the call that has begun.

    Args:
        reward: the reward function.
        batch: what it is called with.
        begun: what `_begin_call` returned.

    Returns:
        B floats. NaN means that the function returned None.

    Raises:
        RewardError: the call failed, for one of the reasons that `call_rewards` names.
    """
    try:
        if reward.pool is not None:
            wanted = {name: values for name, values in batch.columns.items() if takes(reward, name)}
            extras = batch.extras if wanted_extras(reward, batch.columns) else None
            return reward.pool.judge(batch.values["prompts"], batch.completions, wanted, extras)
        values = _finish(begun or partial(_call, reward, batch))
    except WorkerError as error:  # the worker has explained it
        raise RewardError(str(error)) from None
    except _Failed as failed:
        if isinstance(failed.error, EndpointError):  # no row is to blame
            raise RewardError(f"{named(reward)}: {failed.error}") from None
        raise _explain(reward, batch, failed.error) from failed.error
    return _checked(reward, values, batch.completions)


def _finish(call: Future | Callable[[], Any]) -> Any:
    """Makes a call, or waits for it.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C.
        _Failed: the function raised anything else, or raised SystemExit or KeyboardInterrupt itself.
    """
    process = os.getpid()
    signals: list[int] = []
    try:
        with _noted(signals):
            value = call if isinstance(call, Future) else call()
            if inspect.isawaitable(value):
                value = start(partial(_itself, value))
            if not isinstance(value, Future):
                return value
            value, error = value.result()
    except BaseException as raised:
        if isinstance(raised, KeyboardInterrupt) and signals:
            raise
        raise _Failed(raised) from None
    finally:
        end_fork(process)
    if error is not None:
        raise _Failed(error)
    return value


def _itself(value: Any) -> Any:
    return value


@contextlib.contextmanager
def _noted(signals: list[int]) -> Iterator[None]:
    """Notes the signals that ask the run to end, and still calls their handlers."""
    ours = {}
    theirs = {}
    if threading.current_thread() is threading.main_thread():  # other threads never get a signal
        for signum in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(signum)
            if callable(handler):
                ours[signum] = _noting(handler, signals)
                theirs[signum] = handler
                signal.signal(signum, ours[signum])
    try:
        yield
    finally:
        for signum, handler in ours.items():
            if signal.getsignal(signum) is handler:  # otherwise the function has set its own
                signal.signal(signum, theirs[signum])


def _noting(handler: Callable[..., Any], signals: list[int]) -> Callable[..., Any]:
    def note(signum, frame):
        signals.append(signum)
        return handler(signum, frame)

    return note


def _call(reward: Reward, batch: _Batch) -> Any:
    # Each row is copied for the function. If it sorts, pops or appends, it changes neither the data, nor the
    # row of a sibling, nor what the next function gets.
    passed = {name: own_copy(list(values)) for name, values in batch.values.items() if takes(reward, name)}
    extras = batch.extras.arguments(reward, batch.columns, len(batch.completions))
    return reward.function(**{**passed, **extras, **own_copy(dict(reward.arguments))})


def own_copy(value: Any) -> Any:
    """Copies a value deeply. Two parts of a copied list or mapping are never the same object.

    `copy.deepcopy` would keep objects that siblings share, and takes twice as long. A value that cannot be
    copied, such as a decoder of audio, is returned itself.
    """
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is list:
        return [own_copy(each) for each in value]
    if kind is dict:
        return {name: own_copy(each) for name, each in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:  # a foreign type that cannot be copied may raise anything
        return value


def _explain(reward: Reward, batch: _Batch, error: BaseException) -> RewardError:
    """Finds the first row that makes a function raise, by calling the function on single rows."""
    completions = batch.completions
    told = f"{named(reward)} raised {_raised(error)} on a batch of {len(completions)} rows"
    for row, completion in enumerate(completions):
        try:
            _finish(partial(_call, reward, batch.alone(row)))
        except _Failed as failed:
            same = repr(failed.error) == repr(error)
            again = "" if same else f" alone raises {_raised(failed.error)};"
            hint = _form_hint(reward, completion, failed.error)
            return RewardError(f"{told}; row {row}{again} {_shown(completion)}{hint}")
    return RewardError(f"{told}; no single row does so alone")


def _form_hint(reward: Reward, completion: Completion, error: BaseException) -> str:
    """Returns a hint on the type of a completion, if the function seems to expect another type."""
    if reward.source == "built in" or reward.one_of or not isinstance(error, (AttributeError, TypeError)):
        return ""
    text = str(error)
    is_text = isinstance(completion, str)
    if not is_text and any(word in text for word in ("list", "dict")):
        return (
            ". The prompts are messages (data.system_prompt makes them so), so a completion is a list of "
            'messages: its text is completion[0]["content"]'
        )
    if is_text and any(word in text for word in ("string", "'str'")):
        return ". The prompts are texts, so a completion is a text, not a list of messages"
    return ""


def _raised(error: BaseException) -> str:
    """Returns an error as text, with the place where it was raised unless that was the call itself."""
    frame = user_frame(error)
    if frame is None or frame.filename == __file__:
        return repr(error)
    return f"{error!r} at {Path(frame.filename).name}:{frame.lineno}"


def _shown(completion: Completion) -> str:
    return f"(completion {_short(completion_text(completion))})"


def _checked(reward: Reward, values: Any, completions: Sequence[Completion]) -> list[float]:
    """Converts what a function returned to B floats, where None becomes NaN."""
    who = named(reward)
    size = len(completions)
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
        if not is_number(value):
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


def _is_finite(value: Any) -> bool:
    try:
        return abs(float(value)) <= float(np.finfo(np.float32).max)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
