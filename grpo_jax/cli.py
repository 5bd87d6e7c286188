"""What the commands share: the compilation cache, JSON on standard output, one-line errors, exit codes."""

import atexit
import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from grpo_jax.cpu_tuning import use_huge_pages
from grpo_jax.error_text import one_line


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
def json_alone(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """Keeps standard output for one JSON document. Everything else that is printed goes to standard error.

    Reward functions print: in a call, when their file is imported, from C, from processes that they start,
    and when the process ends.

    Args:
        wanted: False leaves standard output as it is.

    Yields:
        a function that takes the document, which is printed at the end.
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
            yield documents.append
    finally:
        stream.flush()
        _flush_c()
        os.dup2(kept, 1)
        os.close(kept)
    for document in documents:
        print(json.dumps(document), file=stream, flush=True)
    atexit.unregister(_end_of_output)
    atexit.register(_end_of_output)  # before the functions that reward files have registered


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
    use_huge_pages()
    try:
        code = main() or 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
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
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)
