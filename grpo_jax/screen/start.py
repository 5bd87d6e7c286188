"""The start of a command: the first line is on the screen before anything heavy is imported."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from grpo_jax.screen.display import Level, Screen
from grpo_jax.screen.signals import SignalWatch, in_main_thread

_GRACE = 1.0  # seconds that the main thread has to end by itself after Ctrl-C


class _Command:
    """What the process knows of the command that it runs."""

    screen: Screen | None = None
    watch: SignalWatch | None = None
    print_row: Callable[[dict[str, Any]], None] | None = None
    catches = False  # whether somebody turns a KeyboardInterrupt into an exit code
    interrupted = False
    ended = threading.Event()
    previous: Any = None  # the handler of SIGINT before
    lock = threading.RLock()  # a second Ctrl-C may come while it is held


def current_screen() -> Screen | None:
    """Returns the screen of the command that this process runs. `None` means that Python runs a function."""
    return _Command.screen


def current_rows() -> Callable[[dict[str, Any]], None] | None:
    """Returns the function that takes the metrics of a step, for a command that prints them as JSON."""
    return _Command.print_row


@contextlib.contextmanager
def rows_printed_by(function: Callable[[dict[str, Any]], None], wanted: bool) -> Iterator[None]:
    """Hands the metrics of each step to a function, while the block runs.

    Args:
        function: function that takes a row.
        wanted: False leaves everything as it is.
    """
    before = _Command.print_row
    _Command.print_row = function if wanted else before
    try:
        yield
    finally:
        _Command.print_row = before


def is_a_command() -> bool:
    """Says whether this process runs a command, so that ending the process hurts nobody else."""
    return _Command.screen is not None


def is_given(argv: Sequence[str], name: str) -> bool:
    """Says whether a flag is among the arguments, before they are parsed.

    >>> [is_given(words, "quiet") for words in (["--quiet"], ["--quiet=false"], ["--quiet", "false"], [])]
    [True, False, False, False]
    """
    for argument, following in zip(argv, [*argv[1:], "--"], strict=False):
        option, equals, value = argument.partition("=")
        if option == f"--{name}":
            return (value if equals else "true" if following.startswith("-") else following) != "false"
    return False


def begin(command: str, argv: Sequence[str]) -> None:
    """Shows the first line of a command, and lets Ctrl-C end it at once with one line.

    Call it before the imports that take seconds.

    Args:
        command: name of the command.
        argv: its arguments.
    """
    if is_a_command() or {"--help", "-h"} & set(argv):
        return
    # The log of a training goes to standard output. The others print results there, so what moves
    # while they work is for the eyes alone: it goes to a terminal, or to a log that asks for it.
    trains = command == "train" and not is_given(argv, "json")
    level: Level = "verbose" if is_given(argv, "verbose") else "normal"
    if is_given(argv, "quiet"):
        level = "quiet"
    _Command.screen = Screen(
        stream=sys.stdout if trains else sys.stderr,
        level=level,
        logs_phases=command == "train" or level == "verbose",
        stays=command == "train",
    )
    # A job in the background of a script ignores Ctrl-C, which is meant for what is in the foreground.
    if in_main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        _Command.previous = signal.signal(signal.SIGINT, _interrupted)
        _Command.watch = SignalWatch(_heard)
        _Command.watch.__enter__()
    _Command.ended.clear()
    _Command.screen.open(f"grpo-jax {command}")


def end() -> None:
    """Takes the screen away."""
    if _Command.screen is not None:
        _Command.screen.close()
    _Command.ended.set()
    if _Command.watch is not None:
        _Command.watch.__exit__()
        signal.signal(signal.SIGINT, _Command.previous)
    _Command.print_row = None
    _Command.screen = None
    _Command.watch = None
    _Command.catches = False
    _Command.interrupted = False


def enter(phase: str, detail: str = "") -> None:
    """Shows the phase of a command that begins. Nothing is shown where Python runs a function."""
    if _Command.screen is not None:
        _Command.screen.enter(phase, detail)


def say(text: str) -> None:
    """Prints lines of a command's log, unless it is quiet."""
    if _Command.screen is None:
        print(text, flush=True)
    else:
        _Command.screen.message(text)


def say_aside(text: str) -> None:
    """Prints a line on standard error, unless the command is quiet."""
    if _Command.screen is None or _Command.screen.level != "quiet":
        print(text, file=sys.stderr, flush=True)


def say_more(text: str) -> None:
    """Prints lines for a command that is verbose."""
    if _Command.screen is not None and _Command.screen.level == "verbose":
        _Command.screen.print_text(text)


def say_result(text: str) -> None:
    """Prints the last lines of a command's log, also if it is quiet."""
    if _Command.screen is None:
        print(text, flush=True)
    else:
        _Command.screen.close()
        _Command.screen.print_text(text)


def clear() -> None:
    """Takes the moving lines away, before a command prints its results."""
    if _Command.screen is not None:
        _Command.screen.close()


def catch_interrupts() -> None:
    """Says that from now on a KeyboardInterrupt becomes an exit code."""
    _Command.catches = True


def say_interrupted(text: str) -> None:
    """Prints why the command ends, the first time only."""
    with _Command.lock:  # whoever comes second waits until it is printed, since it may end the process
        if _Command.interrupted:
            return
        _Command.interrupted = True
        if _Command.screen is not None:
            _Command.screen.close()
        print(text, file=sys.stderr, flush=True)


def end_process(code: int) -> None:
    """Ends the process without waiting for the main thread, which may be in a call that takes minutes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _interrupted(_signum: int, _frame: object) -> None:
    # Until somebody catches it, the thread of the watch ends the process. A handler must not wait for that
    # thread, which may need a lock that the main thread holds.
    if _Command.catches:
        raise KeyboardInterrupt


def _heard(signum: int) -> None:
    if signum != signal.SIGINT:
        return
    phase = "" if _Command.screen is None else _Command.screen.phase
    say_interrupted(f"interrupted while {phase}" if phase else "interrupted")
    if not _Command.catches or not _Command.ended.wait(_GRACE):
        end_process(130)
