"""What Ctrl-C and SIGTERM do to a run: they are acknowledged at once, and the run saves before it ends."""

import signal
import threading
from collections.abc import Callable

from grpo_jax.screen.signals import SignalWatch, in_main_thread
from grpo_jax.screen.start import end_process, is_a_command, say_interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 2.0  # seconds that the main thread has to end by itself


def _say(text: str) -> None:
    print(text, flush=True)


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a flag. A second one interrupts at once.

    The first one is acknowledged at once, also while the device computes. Only the main thread gets signals,
    so nothing is done in another one. A command that has made no step yet has nothing to save, so Ctrl-C ends
    it at once.

    Args:
        doing: function that says what the run has to finish, such as `the rollout of step 3`.
        say: function that prints a line.
    """

    def __init__(self, doing: Callable[[], str] | None = None, say: Callable[[str], None] = _say):
        self.signum: int | None = None
        self.has_work = False  # whether a step of this process would be lost
        self._doing = doing or (lambda: "the step")
        self._say = say
        self._count = 0
        self._left = threading.Event()
        self._watch: SignalWatch | None = None

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._note) for s in _SIGNALS} if in_main_thread() else {}
        if self._previous:
            self._watch = SignalWatch(self._arrived).__enter__()
        return self

    def __exit__(self, *_):
        self._left.set()
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if self._watch is not None:
            self._watch.__exit__()

    def _ends_at_once(self, signum: int) -> bool:
        return signum == signal.SIGINT and is_a_command() and not self.has_work

    def _note(self, signum, _frame):
        """Handles a signal in the main thread, between two instructions."""
        if self.signum is not None or self._ends_at_once(signum):
            raise KeyboardInterrupt
        self.signum = signum

    def _arrived(self, signum: int) -> None:
        """Says what happens, in the thread of the watch."""
        if signum not in _SIGNALS:
            return
        self._count += 1
        if self._count == 1 and not self._ends_at_once(signum):
            self._say(
                f"interrupted: finishing {self._doing()}, then saving; Ctrl-C again stops at once"
                if signum == signal.SIGINT
                else f"terminated: finishing {self._doing()}, then saving"
            )
            return
        if is_a_command():
            before = "" if self.has_work else " before the first step, so nothing is lost"
            say_interrupted(f"interrupted{before}")
            if not self._left.wait(_PATIENCE):  # the main thread is in a call that does not end
                end_process(128 + signum)
