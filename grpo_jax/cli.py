"""What the commands share: the compilation cache, JSON on standard output, one-line errors, exit codes."""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from grpo_jax.cpu_tuning import use_huge_pages
from grpo_jax.error_text import one_line
from grpo_jax.screen.start import catch_interrupts, current_screen, end, say_interrupted


def enable_compilation_cache() -> Path:
    """Keeps compiled programs between processes, in the user's cache directory.

    JAX_COMPILATION_CACHE_DIR overrides the place.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo_jax" / "xla"
    directory = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or default)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return directory  # a read-only home costs compile time, nothing else
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


@contextlib.contextmanager
def json_alone(wanted: bool, *, at_once: bool = False) -> Iterator[Callable[[Any], None]]:
    """Keeps standard output for JSON documents. Everything else that is printed goes to standard error.

    Reward functions print: in a call, when their file is imported, from C, from processes that they start,
    and when the process ends.

    Args:
        wanted: False leaves standard output as it is.
        at_once: whether each document is a line that is printed when it is given.

    Yields:
        a function that takes a document, which is printed at the end if it is not printed at once.
    """
    documents: list[Any] = []
    if not wanted:
        yield documents.append
        return
    stream = sys.stdout
    stream.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield (lambda document: _write_line(kept, document)) if at_once else documents.append
    finally:
        stream.flush()
        _flush_c()
        os.dup2(kept, 1)
        os.close(kept)
    for document in documents:
        print(json.dumps(document), file=stream, flush=True)
    atexit.unregister(_end_of_output)
    atexit.register(_end_of_output)  # before the functions that reward files have registered


def _write_line(descriptor: int, document: Any) -> None:
    left = (json.dumps(document) + "\n").encode()
    while left:
        left = left[os.write(descriptor, left) :]


@functools.cache
def _watch_compilations() -> None:
    """Lets the screen of the command know when a program is compiled."""
    # JAX records a scalar with the name of the event when it begins, and a duration when it ends.
    events = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration")

    def began(event: str, value: float | int, **kwargs: str | int) -> None:
        screen = current_screen()
        if screen is not None and event in events:
            screen.begin_compilation()

    def ended(event: str, duration_secs: float, **kwargs: str | int) -> None:
        screen = current_screen()
        if screen is not None and event in events:
            screen.end_compilation(
                str(kwargs.get("fun_name", "")) if event == events[-1] else "", duration_secs
            )

    jax.monitoring.register_scalar_listener(began)
    jax.monitoring.register_event_duration_secs_listener(ended)


def _flush_c() -> None:
    """Flushes what C code has printed and the C library still holds."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # where there is no such library
        ctypes.CDLL(None).fflush(None)


def _end_of_output() -> None:
    with contextlib.suppress(OSError, ValueError):  # a stream that is closed
        sys.stdout.flush()
        _flush_c()
        os.dup2(2, 1)


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command and exits: an error in what the user gave becomes one line, and exit code 2.

    GRPO_JAX_TRACEBACK=1 shows the traceback instead.
    """
    catch_interrupts()
    _watch_compilations()
    use_huge_pages()
    try:
        code = main() or 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if (screen := current_screen()) is not None:
            screen.close()
        if os.environ.get("GRPO_JAX_TRACEBACK"):
            raise
        # Several problems of a config have a line each. Any other message is one line.
        problems = getattr(error, "lines", None)
        text = str(error) if problems else one_line(error, limit=None)
        if not isinstance(error, (ValueError, ImportError)):
            text = f"{type(error).__name__}: {text}"
        print(f"error: {text}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:  # before training has anything to save, or for the second time
        say_interrupted("interrupted")
        code = 130
    finally:
        end()
    sys.stdout.flush()
    sys.exit(code)
