"""Prints a progress bar on a terminal and plain lines anywhere else, and tables of samples."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from grpo_jax.error_text import one_line
from grpo_jax.trackers.jsonl import LogRow, Metrics, plain


def printable(value: Any) -> str:
    """Makes a model's text safe for a terminal by escaping control and invisible characters."""
    text = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe_error(error: Exception) -> str:
    """Describes an error by its type and its text, in one short line."""
    kind = type(error).__name__
    text = printable(one_line(error, limit=None))
    return kind if text == kind else f"{kind}: {text[:200]}"


def _figure(value: float | None, spec: str = ".4g") -> str:
    return "-" if value is None else format(float(value), spec)


_SHOWN_CHARACTERS = 160  # number of characters of a prompt (its end) and of a completion (its start)


def spread(rows: Sequence, count: int) -> list:
    """Picks count rows evenly from all, so that a table shows many prompts rather than one group."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def bars(counts: Sequence[int]) -> str:
    """Draws a histogram as one word. Each count is a block of up to eight eighths, or a dot if it is 0.

    >>> bars([8, 0, 1, 4])
    '█.▁▄'
    """
    highest = max(counts, default=0)
    return "".join("▁▂▃▄▅▆▇█"[-(-8 * count // highest) - 1] if count else "." for count in counts)


def samples_table(title: str, rows: Sequence[LogRow]) -> Table:
    """Makes a table of samples: prompt, completion, reward, rewards/<name> and, if given, the advantage."""
    table = Table(title=Text(printable(title)), title_justify="left")
    names = [name for name in rows[0] if name.startswith("rewards/")] if rows else []
    for heading in ("prompt", "completion"):
        table.add_column(heading, overflow="fold", ratio=1)
    figures = ["reward", *(names if len(names) > 1 else [])]
    figures += ["advantage"] if rows and "advantage" in rows[0] else []
    for name in figures:
        heading = printable(name.removeprefix("rewards/"))
        table.add_column(Text(heading), justify="right", overflow="fold")
    for row in rows:
        prompt = printable(row["prompt"])
        completion = printable(row["completion"])
        prompt = prompt if len(prompt) <= _SHOWN_CHARACTERS else "…" + prompt[-_SHOWN_CHARACTERS:]
        more = len(completion) > _SHOWN_CHARACTERS
        completion = completion[:_SHOWN_CHARACTERS] + ("…" if more else "")
        cells = [prompt, completion, *(_figure(row.get(name), ".3g") for name in figures)]
        table.add_row(*map(Text, cells))
    return table


def figures_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Makes a table whose first column is text and whose other columns are figures."""
    table = Table(title=Text(printable(title)), title_justify="left")
    for number, heading in enumerate(headings):
        justify = "right" if number else "left"
        table.add_column(Text(printable(heading)), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


class ConsoleTracker:
    """Shows a progress bar on a terminal. Anywhere else it prints a line of plain text now and then.

    Tokens per second are those of the last step, the growth of `num_tokens` over `step_time`.

    Args:
        total_steps: number of steps of the whole run.
        resume_step: number of steps done before.
        stream: stream to print to. None means standard output.
        clock: function that returns seconds, for the time left and the pace of lines.
    """

    def __init__(
        self,
        total_steps: int,
        resume_step: int | None = None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stdout if stream is None else stream
        self._total = total_steps
        self._first = resume_step or 0
        self._tokens: float | None = None if resume_step else 0
        self._every = max(1, math.ceil(total_steps / 40))
        self._clock = clock
        self._began: tuple[int, float] | None = None  # step and time of the first training metrics
        self._line = (self._first - self._every, -math.inf)  # step and time of the last line
        terminal = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        # rich is told, because FORCE_COLOR in a CI job would make it take the log for a terminal.
        self._console = Console(
            file=self._stream,
            force_terminal=terminal,
            color_system="auto" if terminal else None,
            width=None if terminal else 120,
        )
        self._progress = self._bar() if terminal else None

    def _bar(self) -> Progress:
        progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = progress.add_task("", total=self._total, completed=self._first, figures="")
        return progress

    def log(self, step: int, metrics: Metrics) -> None:
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if evaluation:
            figures = "  ".join(f"{n.removeprefix('eval/')} {_figure(v)}" for n, v in evaluation.items())
            self.message(f"step {step}/{self._total}  evaluation: {figures}")
        if len(evaluation) < len(metrics):
            self._log_training(step, metrics)

    def _log_training(self, step: int, metrics: Metrics) -> None:
        length = metrics.get("completions/mean_length")
        figures = (
            f"reward {_figure(metrics.get('reward'), '.3f')}  kl {_figure(metrics.get('kl'), '.4f')}  "
            f"length {_figure(length, '.1f')}  {self._speed(metrics)} tokens/s"
        )
        if self._progress is not None:
            self._progress.start()  # does nothing once started
            self._progress.update(self._task, completed=step, figures=figures)
            return
        now = self._clock()
        line_step, line_time = self._line
        if step - line_step >= self._every or now - line_time >= 10 or step == self._total:
            self._line = (step, now)
            self.message(f"step {step}/{self._total}  {figures}  {self._time_left(step, now)} left")

    def _time_left(self, step: int, now: float) -> str:
        if self._began is None:  # the first step compiles, so it says nothing about the others
            self._began = (step, now)
            return "-"
        first, started = self._began
        minutes, seconds = divmod(round((now - started) / (step - first) * (self._total - step)), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

    def _speed(self, metrics: Metrics) -> str:
        tokens = metrics.get("num_tokens")
        before = self._tokens
        seconds = metrics.get("step_time")
        self._tokens = tokens
        return "-" if None in (tokens, before) or not seconds else f"{(tokens - before) / seconds:.0f}"

    def log_completions(self, step: int, rows: Sequence[LogRow]) -> None:
        if rows:
            self._print(samples_table(f"step {step}: completions", rows))

    def show(self, table: Table) -> None:
        """Prints a table, above the bar if there is one."""
        self._print(table)

    def message(self, text: str) -> None:
        """Prints a text, above the bar if there is one."""
        self._print("\n".join(printable(line) for line in text.split("\n")))

    def _print(self, what: str | Table) -> None:
        if self._progress is not None:
            # soft_wrap keeps a command that a message shows on one line.
            is_text = isinstance(what, str)
            self._console.print(Text(what) if is_text else what, soft_wrap=is_text)
            return
        if not isinstance(what, str):
            with self._console.capture() as capture:
                self._console.print(what)
            what = capture.get().rstrip("\n")
        # A log in ASCII shows other characters as escapes.
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(what.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
