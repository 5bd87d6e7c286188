"""The event loop of all async reward functions of a process, in a thread of its own.

`asyncio.run` would not do. It refuses to work where a loop runs already, as in Jupyter. And it makes a new
loop for every batch, but a client that a reward file keeps belongs to the loop in which it was used first.
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
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork does not inherit the thread


def is_async(function: Callable[..., Any]) -> bool:
    """Says whether a function is defined by `async def`, also one in a partial, or the call of an object."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def start(call: Callable[[], Any]) -> Future:
    """Starts a call in the loop's thread.

    Args:
        call: returns an awaitable, or the value itself.

    Returns:
        a future of (the value, None), or of (None, what the call or the awaitable raised).
    """
    return asyncio.run_coroutine_threadsafe(_outcome(call, os.getpid()), _loop())


async def _outcome(call: Callable[[], Any], process: int) -> tuple[Any, BaseException | None]:
    # Returned, not raised: SystemExit would end the loop, and KeyboardInterrupt look like one of the user's.
    try:
        value = call()
        return (await value if inspect.isawaitable(value) else value), None
    except GeneratorExit:  # the interpreter ends
        raise
    except BaseException as error:
        return None, error
    finally:
        end_fork(process)


def end_fork(process: int) -> None:
    """Ends this process if it is not the given one: a reward function has forked, and came back twice."""
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
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # of a task of the function's own
            loop.run_forever()
