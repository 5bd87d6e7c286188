"""Prints a progress bar on a terminal and plain lines anywhere else, and tables of samples."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from grpo_jax.error_text import one_line
from grpo_jax.screen.display import Screen
from grpo_jax.screen.lines import clock_text
from grpo_jax.screen.pace import Pace
from grpo_jax.screen.start import current_rows, current_screen
from grpo_jax.trackers.jsonl import LogRow, Metrics, plain


def printable(value: Any) -> str:
    """Makes a model's text safe for a terminal by escaping control and invisible characters."""
    text = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def turns(prompt: Any) -> str:
    """Shows a chat as its turns, a line each. Any other value is shown as it is.

    >>> print(turns([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]))
    user: 2+2?
    assistant: 4
    """
    is_chat = isinstance(prompt, (list, tuple)) and all(
        isinstance(message, Mapping) and "role" in message for message in prompt
    )
    if not is_chat:
        return printable(prompt)
    return "\n".join(f"{printable(m['role'])}: {printable(m.get('content') or '')}" for m in prompt)


def describe_error(error: Exception) -> str:
    """Describes an error by its type and its text, in one short line."""
    kind = type(error).__name__
    text = printable(one_line(error, limit=None))
    return kind if text == kind else f"{kind}: {text[:200]}"


def _figure(value: float | None, spec: str = ".4g") -> str:
    return "-" if value is None else format(float(value), spec)


_NARROW = 80  # columns
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


def samples_table(title: str, rows: Sequence[LogRow], *, width: int = 120) -> Table:
    """Makes a table of samples: prompt, completion, reward, rewards/<name> and, if given, the advantage.

    Below 80 columns only the texts and the reward are shown.
    """
    table = Table(title=Text(printable(title)), title_justify="left")
    names = [name for name in rows[0] if name.startswith("rewards/")] if rows else []
    for heading in ("prompt", "completion"):
        table.add_column(heading, overflow="fold", ratio=1)
    figures = ["reward"]
    if width >= _NARROW:
        figures += names if len(names) > 1 else []
        figures += ["advantage"] if rows and "advantage" in rows[0] else []
    for name in figures:
        heading = printable(name.removeprefix("rewards/"))
        table.add_column(Text(heading), justify="right", overflow="fold")
    for row in rows:
        prompt = turns(row["prompt"])
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
        eval_every: number of steps between two evaluations, which the time left counts. 0 means that there is
            one at the end.
        stream: stream to print to. None means the screen of the command, or else standard output.
        clock: function that returns seconds, for the time left and the pace of lines.
    """

    def __init__(
        self,
        total_steps: int,
        resume_step: int | None = None,
        *,
        eval_every: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        ours = None if stream is not None else current_screen()
        self._screen = ours or Screen(stream=stream, clock=clock)
        self._total = total_steps
        self._first = resume_step or 0
        self._tokens: float | None = None if resume_step else 0
        self._every = max(1, math.ceil(total_steps / 40))
        self._clock = clock
        self._pace = Pace(total_steps, eval_every, clock)
        self._line = (self._first - self._every, -math.inf)  # step and time of the last line
        self._held_out: float | None = None
        if total_steps:
            self._screen.step = self._first
            self._screen.total = total_steps
            self._screen.seconds_left = self._pace.seconds_left

    def enter(self, phase: str, detail: str = "") -> None:
        """Shows the phase that begins."""
        self._pace.enter(phase)
        self._screen.enter(phase, detail)

    def log(self, step: int, metrics: Metrics) -> None:
        if (print_row := current_rows()) is not None:
            print_row({"step": step, **plain(metrics)})
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if evaluation:
            self._pace.evaluated()
            self._held_out = evaluation.get("eval/greedy_accuracy", self._held_out)
            figures = "  ".join(f"{n.removeprefix('eval/')} {_figure(v)}" for n, v in evaluation.items())
            self.message(f"step {step}/{self._total}  evaluation: {figures}")
        if len(evaluation) < len(metrics):
            self._log_training(step, metrics)

    def _log_training(self, step: int, metrics: Metrics) -> None:
        speed = self._speed(metrics)
        self._pace.stepped(step)
        self._screen.step = step
        self._screen.figures = self._shown(metrics, speed)
        if self._screen.is_terminal:
            self._screen.draw()  # does nothing once it is drawn
            return
        now = self._clock()
        line_step, line_time = self._line
        if step - line_step >= self._every or now - line_time >= 10 or step == self._total:
            self._line = (step, now)
            length = metrics.get("completions/mean_length")
            figures = (
                f"reward {_figure(metrics.get('reward'), '.3f')}  kl {_figure(metrics.get('kl'), '.4f')}  "
                f"length {_figure(length, '.1f')}  {speed} tokens/s"
            )
            left = self._pace.seconds_left()
            self.message(f"step {step}/{self._total}  {figures}  {_duration(left)} left")

    def _shown(self, metrics: Metrics, speed: str) -> list[tuple[str, str]]:
        """Returns the figures under the bar, those first that count most."""
        figures = [("reward", _figure(metrics.get("reward"), ".3f"))]
        if self._held_out is not None:
            figures.append(("held-out", f"{self._held_out:.1%}"))
        figures += [
            ("kl", _figure(metrics.get("kl"), ".4f")),
            ("length", _figure(metrics.get("completions/mean_length"), ".1f")),
            (speed, "tokens/s"),
        ]
        more = {"frac_reward_zero_std": "no signal", "completions/clipped_ratio": "cut off"}
        figures += [(text, f"{metrics[name]:.0%}") for name, text in more.items() if name in metrics]
        return figures

    def _speed(self, metrics: Metrics) -> str:
        tokens = metrics.get("num_tokens")
        before = self._tokens
        seconds = metrics.get("step_time")
        self._tokens = tokens
        return "-" if None in (tokens, before) or not seconds else f"{(tokens - before) / seconds:.0f}"

    def log_completions(self, step: int, rows: Sequence[LogRow]) -> None:
        if rows:
            self.show(samples_table(f"step {step}: completions", rows, width=self.width))

    @property
    def width(self) -> int:
        """Number of columns that there are."""
        return self._screen.width

    def show(self, table: Table) -> None:
        """Prints a table, above the bar if there is one."""
        self._screen.print_table(table)

    def show_figures(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table of figures. If it is too wide, its rows become columns."""
        widths = [
            max(len(printable(cell)) for cell in column) + 3 for column in zip(headings, *rows, strict=True)
        ]
        if sum(widths) >= self._screen.width and len(rows) < len(headings):
            columns = [list(column) for column in zip(headings, *rows, strict=True)]
            headings = columns[0]
            rows = columns[1:]
        self.show(figures_table(title, headings, rows))

    def message(self, text: str) -> None:
        """Prints a text, above the bar if there is one."""
        self._screen.message("\n".join(printable(line) for line in text.split("\n")))

    def close(self) -> None:
        self._screen.close()


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else clock_text(seconds)
