"""Ctrl-C is acknowledged at once, whatever the main thread is doing."""

import hashlib
import os
import signal
import threading

import pytest

from grpo_jax.run.interrupts import Interrupts
from grpo_jax.screen.signals import SignalWatch
from grpo_jax.trackers import ConsoleTracker, JsonlTracker, Trackers


def long_call():
    """One call into C that gives other threads their turn, as a computation of XLA does."""
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 4_000_000)


def test_a_signal_is_heard_while_the_main_thread_is_in_one_long_call():
    events = []
    before = signal.signal(signal.SIGINT, lambda *_: events.append("handled"))
    try:
        with SignalWatch(lambda signum: events.append(("heard", signum))):
            timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            long_call()
            timer.join()
            events.append("call done")
    finally:
        signal.signal(signal.SIGINT, before)
    # Python's own handler had to wait for the call.
    assert events == [("heard", signal.SIGINT), "handled", "call done"]


@pytest.mark.parametrize(
    ("signum", "line"),
    [
        (
            signal.SIGINT,
            "interrupted: finishing the rollout of step 3, then saving; Ctrl-C again stops at once",
        ),
        (signal.SIGTERM, "terminated: finishing the rollout of step 3, then saving"),
    ],
)
def test_what_an_interrupt_says(signum, line):
    said = []
    before = signal.getsignal(signum)
    with Interrupts(lambda: "the rollout of step 3", said.append) as interrupts:
        os.kill(os.getpid(), signum)
    assert said == [line] and interrupts.signum == signum
    assert signal.getsignal(signum) is before and signal.set_wakeup_fd(-1) == -1


def test_the_second_one_interrupts_and_says_no_more():
    said = []
    with pytest.raises(KeyboardInterrupt), Interrupts(say=said.append):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert said == ["interrupted: finishing the step, then saving; Ctrl-C again stops at once"]


def test_another_thread_gets_no_signals():
    found = []

    def run():
        with Interrupts() as interrupts:
            found.append(interrupts.signum)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None] and signal.getsignal(signal.SIGINT) is before


def test_what_is_finished_follows_the_phase(tmp_path):
    trackers = Trackers(JsonlTracker(tmp_path), ConsoleTracker(9), num_completions=0)
    with trackers:
        assert trackers.doing() == "step 1"
        trackers.log(4, {"reward": 1.0})
        for phase, words in [
            ("evaluating", "the evaluation after step 4"),
            ("sampling", "the rollout of step 5"),
            ("rewarding", "the rollout of step 5"),
            ("updating", "step 5"),
        ]:
            trackers.enter(phase)
            assert trackers.doing() == words
