"""Sends metrics by one `log` to JSONL and the console, and to TensorBoard and Weights & Biases if wanted.

The JSONL files are the record of a run (see jsonl.py). The others are views of it. When one of them
fails, the run says so once and carries on.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpo_jax.config.in_memory import label_of
from grpo_jax.named_objects import find_object
from grpo_jax.trackers.console import ConsoleTracker, describe_error
from grpo_jax.trackers.jsonl import JsonlTracker, LogRow, Metrics
from grpo_jax.trackers.redaction import redact
from grpo_jax.trackers.tensorboard import TensorBoardTracker
from grpo_jax.trackers.wandb import WandbTracker

if TYPE_CHECKING:
    from grpo_jax.config.run import TrackingConfig

__all__ = [
    "ConsoleTracker",
    "JsonlTracker",
    "TensorBoardTracker",
    "Tracker",
    "Trackers",
    "WandbTracker",
    "is_timing",
    "make_trackers",
    "redact",
]


class Tracker(Protocol):
    """A place where metrics go."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step. It may be called again for the same step with other names."""

    def log_completions(self, step: int, rows: Sequence[LogRow]) -> None:
        """Takes samples, each with prompt, completion, reward, advantage and rewards/<name>."""

    def close(self) -> None:
        """Writes what is left."""


def is_timing(name: str) -> bool:
    """Says whether a metric measures the process, so that it differs between two equal runs."""
    return name.startswith("time/") or name in ("step_time", "compilations")


class _Own:
    """A tracker of the user's own, of which only `log` is sure to be there."""

    def __init__(self, tracker: Any):
        self.tracker = tracker

    def __getattr__(self, name: str) -> Callable[..., None]:
        return getattr(self.tracker, name, _do_nothing)


def _do_nothing(*_: Any) -> None:
    pass


def own_tracker(named: Any) -> Tracker:
    """Returns the tracker that an entry of `tracking.trackers` stands for.

    Args:
        named: `package.module:name`, `path/file.py:name`, a tracker, or a class or function that makes one.

    Raises:
        ValueError: it cannot be loaded, or it is no tracker.
    """
    label = label_of(named)
    found = find_object(named, kind="tracker")[1] if isinstance(named, str) else named
    if inspect.isclass(found) or (callable(found) and not hasattr(found, "log")):
        try:
            found = found()
        except Exception as error:  # whatever somebody's class raises
            raise ValueError(f"tracking.trackers: {label} raised {describe_error(error)}") from error
    if not callable(getattr(found, "log", None)):
        raise ValueError(
            f"tracking.trackers: {label} is of type {type(found).__name__}; it must have a method "
            "log(step, metrics), or be a class or function without arguments that makes such an object"
        )
    return _Own(found)


class Trackers:
    """Several trackers as one, and a context manager that closes them.

    An error of the JSONL record, which a resumed run relies on, is raised. An error of another tracker
    is printed once, in one line, and the run carries on.

    Args:
        record: the JSONL tracker. `None` keeps no record.
        console: the tracker that prints the messages.
        others: other trackers, such as TensorBoard and W&B.
        num_completions: number of rows of a `log_completions` that are kept.
    """

    def __init__(
        self,
        record: JsonlTracker | None,
        console: ConsoleTracker,
        others: Sequence[Tracker] = (),
        *,
        num_completions: int,
    ):
        self._record = record
        self._console = console
        self._others = list(others)
        self._num_completions = num_completions
        self._failed: set[str] = set()
        self._step = 0
        self._phase = ""

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def log(self, step: int, metrics: Metrics) -> None:
        """Hands the metrics of a step to every tracker. Nothing happens without metrics."""
        self._step = step
        if metrics:
            if self._record is not None:
                self._record.log(step, metrics)
            for tracker in (self._console, *self._others):
                self._guard(tracker, tracker.log, step, metrics)

    def log_completions(self, step: int, rows: Sequence[LogRow]) -> None:
        """Hands the first num_completions rows to every tracker."""
        rows = list(rows)[: self._num_completions]
        if rows:
            if self._record is not None:
                self._record.log_completions(step, rows)
            for tracker in (self._console, *self._others):
                self._guard(tracker, tracker.log_completions, step, rows)

    def enter(self, phase: str, detail: str = "") -> None:
        """Shows the phase that begins, such as `sampling`, and what a log says about it."""
        self._phase = phase
        self._guard(self._console, self._console.enter, phase, detail)

    def doing(self) -> str:
        """Says what an interrupted run has to finish."""
        if self._phase == "evaluating":
            return f"the evaluation after step {self._step}"
        if self._phase in ("sampling", "rewarding", "scoring"):
            return f"the rollout of step {self._step + 1}"
        return f"step {self._step + 1}"

    def message(self, text: str) -> None:
        """Prints a notice without breaking the progress bar."""
        self._guard(self._console, self._console.message, text)
        for tracker in self._others:
            if isinstance(tracker, _Own):
                self._guard(tracker, tracker.message, text)

    def close(self) -> None:
        """Closes every tracker, the console last, because the others may have something to say."""
        if self._record is not None:
            self._record.close()
        for tracker in (*self._others, self._console):
            self._guard(tracker, tracker.close)

    def _guard(self, tracker: Tracker, method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception as error:
            name = type(getattr(tracker, "tracker", tracker)).__name__
            if name in self._failed:
                return
            self._failed.add(name)
            line = f"{name} failed, and the run goes on without it: {describe_error(error)}"
            if tracker is self._console:
                print(line, file=sys.stderr)
            else:
                self.message(line)


def make_trackers(
    tracking: "TrackingConfig",
    *,
    run_dir: str | Path | None,
    config: Mapping[str, Any],
    total_steps: int,
    resume_step: int | None = None,
    own: Sequence[Tracker] = (),
    quiet: bool = False,
) -> Trackers:
    """Opens the trackers that a config asks for.

    Args:
        tracking: the part of the config that says which ones.
        run_dir: directory of the run. `None` keeps no record.
        config: the resolved config, logged without secrets.
        total_steps: number of steps of the whole run.
        resume_step: step of the checkpoint that the run continues from. Later rows of an earlier attempt are
            dropped. None means a fresh run, whose files start empty.
        own: further trackers, from `own_tracker`.
        quiet: whether nothing is printed.

    Raises:
        ImportError: an option is on whose package is missing. The message says what to install.
    """
    console: Any = _Own(None)
    if not quiet:
        console = ConsoleTracker(total_steps, resume_step, eval_every=_evaluation_pace(config))
    others: list[Tracker] = [*own]
    if run_dir is not None and tracking.tensorboard:
        others.append(TensorBoardTracker(run_dir, config, resume_step))
    if run_dir is not None and tracking.wandb:
        others.append(
            WandbTracker(
                run_dir,
                config,
                project=tracking.wandb_project,
                name=tracking.wandb_name,
                resume_step=resume_step,
                message=console.message,
            )
        )
    # This comes last, because it rewinds the files, and a missing package must not cost anybody's record.
    record = None if run_dir is None else JsonlTracker(run_dir, resume_step)
    return Trackers(record, console, others, num_completions=tracking.num_completions)


def _evaluation_pace(config: Mapping[str, Any]) -> int:
    """Returns the number of steps between two evaluations, or 0 if the config names none."""
    return (config.get("evaluation") or {}).get("every") or 0
