"""Runs all async reward functions of a process on one event loop, in a thread of its own.

`asyncio.run` is not enough. It refuses to work where a loop is running already, as in Jupyter. It also makes
a new loop for every batch, but a client that a reward file keeps belongs to the loop that used it first.
"""

import asyncio
import contextlib
import inspect
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

_lock = threading.Lock()
# process id -> loop, because a fork does not inherit the thread
_loops: dict[int, asyncio.AbstractEventLoop] = {}


def is_async(function: Callable[..., Any]) -> bool:
    """Says whether a function is defined by `async def`. It may be in a partial, or a `__call__`."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def start(call: Callable[[], Any]) -> Future:
    """Starts a call in the loop's thread.

    Args:
        call: function that returns an awaitable, or the value itself.

    Returns:
        a future of (the value, None), or of (None, what the call or the awaitable raised).
    """
    return asyncio.run_coroutine_threadsafe(_outcome(call, os.getpid()), _loop())


async def _outcome(call: Callable[[], Any], process: int) -> tuple[Any, BaseException | None]:
    # The error is returned, not raised. SystemExit would end the loop, and KeyboardInterrupt would look like
    # the user's.
    try:
        value = call()
        return (await value if inspect.isawaitable(value) else value), None
    except GeneratorExit:  # the interpreter is ending
        raise
    except BaseException as error:
        return None, error
    finally:
        end_fork(process)


def end_fork(process: int) -> None:
    """Ends this process if it is not the given one. A reward function has then forked and returned twice."""
    if os.getpid() != process:
        os._exit(0)


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        if os.getpid() not in _loops:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(loop,), name="async rewards", daemon=True).start()
        return _loops[os.getpid()]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # raised by a task that the function started
            loop.run_forever()
