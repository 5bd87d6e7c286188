"""Hears a signal at once, even while the main thread is in one long call."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable


def in_main_thread() -> bool:
    """Says whether signals may be handled here. Python allows it in the main thread alone."""
    return threading.current_thread() is threading.main_thread()


class SignalWatch:
    """Calls a function in a thread of its own when a signal arrives that has a handler in Python.

    Python runs a handler between two instructions of the main thread, and a compilation or a large
    computation is one instruction that takes minutes. The operating system writes the signal's number to the
    wake-up socket at once, and the thread reads it there.

    Args:
        arrived: function that takes the number of the signal.
    """

    def __init__(self, arrived: Callable[[int], None]):
        self._arrived = arrived

    def __enter__(self) -> "SignalWatch":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous)
        self._writer.close()  # the thread reads what is left, and ends
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1)

    def _read(self) -> None:
        with contextlib.closing(self._reader):
            while received := self._reader.recv(64):
                for signum in received:
                    self._arrived(signum)
