"""How fast a run goes, and the time that it still takes, evaluations included."""

from collections.abc import Callable


class Pace:
    """Measures steps and evaluations apart. The first of each compiles, so it says little of the others.

    Args:
        total: number of steps of the run.
        eval_every: number of steps between two evaluations. 0 means that there is one at the end.
        clock: function that returns seconds.
    """

    def __init__(self, total: int, eval_every: int, clock: Callable[[], float]):
        self._total = total
        self._eval_every = eval_every
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step and time of the first step
        self._last = (0, 0.0)  # step, and the time after it and its evaluation
        self._measured_at = -1  # last step that was evaluated
        self._entered: float | None = None  # time at which the evaluation in progress began
        self._eval_seconds: list[float] = []
        self._between = 0.0  # seconds of evaluations since the first step

    def enter(self, phase: str) -> None:
        """Notes that a phase begins."""
        self._entered = self._clock() if phase == "evaluating" else None

    def evaluated(self) -> None:
        """Notes that an evaluation is done."""
        if self._entered is None:
            return
        seconds = self._clock() - self._entered
        self._entered = None
        self._eval_seconds.append(seconds)
        self._measured_at = self._last[0]
        if self._first is not None:
            self._between += seconds
            self._last = (self._measured_at, self._clock())

    def stepped(self, step: int) -> None:
        """Notes that a step is done."""
        self._last = (step, self._clock())
        if self._first is None:
            self._first = self._last

    def seconds_left(self) -> float | None:
        """Returns the seconds until the last step and its evaluation. None means that it is too early."""
        step, now = self._last
        if self._first is None or step == self._first[0]:
            return None
        first, started = self._first
        per_step = (now - started - self._between) / (step - first)
        measured = self._eval_seconds[1:] or self._eval_seconds
        per_evaluation = sum(measured) / len(measured) if measured else 0.0
        left = per_step * (self._total - step) + per_evaluation * self._evaluations_left(step)
        return max(0.0, left - (self._clock() - now))

    def _evaluations_left(self, step: int) -> int:
        """Returns how many evaluations are still to come, that of this step included if it is not done."""
        if not self._eval_every:
            return int(self._measured_at < self._total)
        due = self._total // self._eval_every - (step - 1) // self._eval_every
        due += self._total % self._eval_every > 0  # the last step is always evaluated
        return due - (self._measured_at == step and self._is_due(step))

    def _is_due(self, step: int) -> bool:
        return step == self._total or step % self._eval_every == 0
