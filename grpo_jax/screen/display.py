"""One or two moving lines at the bottom of a terminal, and plain lines anywhere else."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TextIO

from grpo_jax.screen.lines import Figures, clock_text, fit_items, wrap_text

Level = Literal["quiet", "normal", "verbose"]
_BAR_WIDTH = 10
_WORTH_TELLING = 0.1  # seconds of a compilation
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
# What stands for the drawings where the terminal knows ASCII alone.
_PLAIN = str.maketrans({"━": "#", "─": "-", "…": "~", **dict.fromkeys(_SPINNER, "*")})


class Screen:
    """What is on the screen while a command works.

    On a terminal a bar moves from the first second on, with the phase, the time that has passed and the time
    that is left, and under it the figures of the last step. Anywhere else each new phase has a line until the
    first step is done, and there is never a control character.

    Args:
        stream: where it is shown. None means standard output.
        level: `quiet` shows nothing, `verbose` shows every phase and what was compiled.
        logs_phases: whether phases are lines where there is no terminal.
        stays: whether the last state of the bar stays when it is closed.
        clock: function that returns seconds.
    """

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        level: Level = "normal",
        logs_phases: bool = False,
        stays: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stream = sys.stdout if stream is None else stream
        self.level = level
        self.phase = ""
        self.step = 0
        self.total = 0  # number of steps of the run; 0 means that there are none
        self.figures: Figures = ()
        self.seconds_left: Callable[[], float | None] = lambda: None
        self._logs_phases = logs_phases
        self._stays = stays
        self._clock = clock
        self._started = clock()
        self._compiling = 0
        self._told: set[str] = set()
        self._lock = threading.RLock()
        self._live: Any = None
        self._console: Any = None
        self.is_terminal = self.stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")

    @property
    def console(self) -> Any:
        """The console of rich, which is imported when something is drawn."""
        if self._console is None:
            from rich.console import Console

            # rich is told, because FORCE_COLOR in a CI job would make it take the log for a terminal.
            self._console = Console(
                file=self.stream,
                force_terminal=self.is_terminal,
                color_system="auto" if self.is_terminal else None,
                width=None if self.is_terminal else 120,
                highlight=False,
            )
        return self._console

    @property
    def width(self) -> int:
        """Number of columns that a line may have."""
        return self.console.width if self.is_terminal else 120

    def open(self, name: str) -> None:
        """Shows the first line of a command.

        Args:
            name: name of the command.
        """
        self.phase = "loading"
        if self.is_terminal:
            self.draw()
        else:
            self._log_phase(f"{name}: loading")

    def draw(self) -> None:
        """Begins to draw the moving lines, which nothing but `close` ends."""
        with self._lock:
            if self._live is not None or not self.is_terminal or self.level == "quiet":
                return
            from rich.live import Live

            # What is printed meanwhile appears above, unless it goes to another stream.
            shares_stdout = self.stream is sys.stdout
            self._live = Live(
                console=self.console,
                get_renderable=self._render,
                refresh_per_second=4,
                transient=not self._stays,
                redirect_stdout=shares_stdout,
                redirect_stderr=self.stream in (sys.stdout, sys.stderr),
            )
            self._live.start(refresh=True)

    def enter(self, phase: str, detail: str = "") -> None:
        """Shows what is done from now on.

        Args:
            phase: the phase in one word, such as `sampling`.
            detail: what a log says about it as well.
        """
        self.phase = phase
        if not self.is_terminal or self.level == "verbose":
            self._log_phase(f"{phase} {detail}".strip())

    def _log_phase(self, text: str) -> None:
        if self.level == "quiet" or not self._logs_phases:
            return
        if self.level != "verbose" and (text in self._told or self.figures):
            return  # once is enough, and the lines of the steps follow
        if text in self._told and not text.startswith(("evaluating", "saving")):
            return  # every step has the others
        self._told.add(text)
        passed = clock_text(self._clock() - self._started)
        self.print_text(text if not self._told - {text} else f"{passed}  {text}")

    def begin_compilation(self) -> None:
        """Notes that a program begins to be traced or compiled."""
        self._compiling += 1

    def end_compilation(self, name: str, seconds: float) -> None:
        """Notes that a program is done.

        Args:
            name: name of a program that was compiled or read from the cache; empty if it was traced only.
            seconds: how long it took.
        """
        self._compiling = max(0, self._compiling - 1)
        if name and self.level == "verbose" and seconds >= _WORTH_TELLING:
            self.print_text(f"compiled {name} in {seconds:.1f} s, or read it from the cache")

    def message(self, text: str) -> None:
        """Prints lines that belong to the log of a command, unless it is quiet."""
        if self.level != "quiet":
            self.print_text(text)

    def print_text(self, text: str) -> None:
        """Prints a text above the bar. On a terminal lines are broken between words."""
        # A log in ASCII shows other characters as escapes.
        encoding = self.stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        if not self.is_terminal:
            self.stream.write(text + "\n")
            self.stream.flush()
            return
        from rich.text import Text

        if self._live is not None:
            self._live.refresh()  # the bar that is drawn again under the text is that of now
        # soft_wrap keeps what is longer than a line, such as a path, in one piece that can be copied.
        self.console.print(Text(wrap_text(text, self.width)), soft_wrap=True)

    def print_table(self, table: Any) -> None:
        """Prints a table of rich above the bar."""
        if self.level == "quiet":
            return
        if self.is_terminal:
            self.console.print(table)
            return
        with self.console.capture() as capture:
            self.console.print(table)
        self.print_text(capture.get().rstrip("\n"))

    def close(self) -> None:
        """Ends the moving lines and gives the cursor back."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _render(self) -> Any:
        from rich.text import Text

        lines = "\n".join([self._progress_line(self.width), *self._figures_lines(self.width)])
        encoding = self.stream.encoding or "utf-8"
        if not encoding.lower().startswith("utf"):
            lines = lines.translate(_PLAIN)
        return Text(lines, no_wrap=True, overflow="crop", end="")

    def _progress_line(self, width: int) -> str:
        passed = clock_text(self._clock() - self._started)
        phase = "compiling" if self._compiling else self.phase
        if not self.total:
            return fit_items([f"{_spinner(self._clock())} {phase} …", passed], width)
        left = self.seconds_left()
        filled = _BAR_WIDTH * self.step // self.total
        bar = "━" * filled + "─" * (_BAR_WIDTH - filled)
        parts = [f"{bar} step {self.step}/{self.total}", f"{phase:<10}", passed]
        return fit_items([*parts, f"{'-' if left is None else clock_text(left)} left"], width)

    def _figures_lines(self, width: int) -> Sequence[str]:
        return [fit_items([f"{name} {value}" for name, value in self.figures], width)] if self.figures else []


def _spinner(now: float) -> str:
    return _SPINNER[int(now * 4) % len(_SPINNER)]
