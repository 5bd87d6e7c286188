"""run.json in the directory of a run: what it ran with, on what, for how long, and how it ended."""

import contextlib
import contextvars
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from grpo_jax.error_text import one_line
from grpo_jax.run.whole_files import write_whole
from grpo_jax.trackers.redaction import redact, redact_command
from grpo_jax.version import __version__, version_of

FILE = "run.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


class RunRecord:
    """The record of one attempt. Nothing is written before `start`.

    Attributes:
        exit_code: the code that the command ends with, if the run returns.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._path: Path | None = None
        self._content: dict[str, Any] = {}
        self._clock = time.monotonic()
        self._started = _now()

    def start(self, run_dir: str | Path | None) -> None:
        """Writes what is known when the run starts. Records of earlier attempts are kept in `earlier`.

        Args:
            run_dir: directory of the run, which exists. `None` means that nothing is written.
        """
        if run_dir is None:
            return
        self._path = Path(run_dir) / FILE
        earlier = _read(self._path)
        before = [] if earlier is None else [earlier, *earlier.pop("earlier", [])]
        self._content = {
            "command": redact_command(sys.orig_argv),
            "directory": os.getcwd(),
            "versions": _versions(),
            "commits": {"directory": _commit(Path.cwd()), "grpo_jax": _commit(Path(__file__).parent)},
            "platform": platform.platform(),
            "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
            "started": self._started,
            "ended": None,
            "seconds": None,
            "exit_code": None,
            "error": None,
            "earlier": before,
        }
        self._write()

    def finish(self, error: BaseException | None = None) -> None:
        """Writes how the run ended: with the exit code, or with an error."""
        if self._path is None:
            return
        said = None if error is None else redact(f"{type(error).__name__}: {one_line(error, limit=None)}")
        self._content |= {
            "ended": _now(),
            "seconds": round(time.monotonic() - self._clock, 1),
            "exit_code": self.exit_code if error is None else _code_of(error),
            "error": said,
        }
        with contextlib.suppress(OSError):  # a full disk must not hide what ended the run
            self._write()

    def _write(self) -> None:
        write_whole(self._path, json.dumps(self._content, indent=1) + "\n")


_current: contextvars.ContextVar[RunRecord | None] = contextvars.ContextVar("run record", default=None)


@contextlib.contextmanager
def recording() -> Iterator[RunRecord]:
    """Yields the record of a run, and completes it when the run ends, also with an error.

    Inside, `start_record` starts it.
    """
    record = RunRecord()
    token = _current.set(record)
    try:
        yield record
    except BaseException as error:
        record.finish(error)
        raise
    finally:
        _current.reset(token)
    record.finish()


def start_record(run_dir: str | Path) -> None:
    """Starts the record of this run, if it has one: the run has a directory now."""
    record = _current.get()
    if record is not None:
        record.start(run_dir)


def _code_of(error: BaseException) -> int:
    """Returns the exit code of a command that ends with an error, as `cli.run_command` has it."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 2 if isinstance(error, ValueError | OSError | ImportError | RuntimeError) else 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path) -> dict[str, Any] | None:
    """Returns an earlier record, or None if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _versions() -> dict[str, str | None]:
    ours = {"python": platform.python_version(), "grpo_jax": __version__}
    return ours | {package: version_of(package) for package in _PACKAGES}


def _commit(directory: Path) -> str | None:
    """Returns the git commit of a directory, with `+changes` if files differ from it, or None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # A package that is installed inside of a repository, such as in .venv, is not part of it.
        if not git("ls-files", "--", "."):
            return None
        commit = git("rev-parse", "HEAD")
        return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None
