"""Runs reward functions in processes of their own, with a time limit for every call.

A call that hangs or dies costs its own rows and nothing else: its worker is killed with all processes that it
started, and replaced. Neither concurrent.futures (which cannot kill a worker) nor pebble (which can) is used.
Both start workers by multiprocessing, which imports the main module and our package there, and JAX with
them. This works on POSIX systems only.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

_PROGRAM = Path(__file__).with_name("worker.py")
_START_SECONDS = 120.0  # time for importing what the function needs
_DEAD = "the worker process died in the call"
_END_SECONDS = 2.0  # time for an idle worker to end when it is told to
# Nothing in a worker may take a device from the run.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


class WorkerError(RuntimeError):
    """A worker could not start, or its function failed as it would have failed in this process."""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    deadline: float  # deadline of what the worker is doing: starting, or a call
    call: int | None = None
    busy: bool = True

    def end(self) -> None:
        """Ends the process. Unless it is idle and ends on request, it is killed with all that it started."""
        self.connection.close()
        if not self.busy:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_SECONDS)
                return
        # The process was not waited for yet, so its id is still its own, even if it is dead.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class RewardPool:
    """The worker processes of one reward function. They start with the first call.

    Args:
        who: name of the reward in messages.
        function: the function, as in RewardConfig.
        arguments: keyword arguments of the function.
        timeout: seconds that a call may take.
        workers: number of processes.
        rows_per_call: number of rows in a call. None gives every worker an equal part of the batch.
    """

    def __init__(
        self,
        *,
        who: str,
        function: str,
        arguments: Mapping[str, Any],
        timeout: float,
        workers: int = 1,
        rows_per_call: int | None = None,
    ):
        if os.name != "posix":
            raise ValueError(f"{who}: worker processes need Linux or macOS; remove its timeout here")
        self.who = who
        self.timeout = timeout
        self.workers = workers
        self.rows_per_call = rows_per_call
        self._setup = {"function": function, "arguments": dict(arguments), "path": list(sys.path)}
        try:
            self._setup = json.dumps(self._setup).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{who}: its arguments cannot go to a worker process: {error}") from None
        self._directory = os.getcwd()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._lost_calls: dict[int, str] = {}
        self.last_lost: dict[int, str] = {}  # row that the last batch lost -> reason
        weakref.finalize(self, _end_all, self._workers, os.getpid())

    def judge(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        extras: Any = None,
    ) -> list[float]:
        """Judges a batch, which is split into calls of consecutive rows.

        Args:
            prompts: B prompts.
            completions: B completions.
            columns: the columns that the function takes, each with B entries.
            extras: an `Extras`, which the function may use and log to. `None` if it names none of them.

        Returns:
            B numbers. A number is NaN if the function gave None, its call took too long, or its worker died.

        Raises:
            WorkerError: as `call_rewards` raises RewardError, in one line.
        """
        size = len(prompts)
        rows = self.rows_per_call or max(1, -(-size // self.workers))
        parts = [slice(start, min(start + rows, size)) for start in range(0, size, rows)]
        calls = [
            {
                "prompts": list(prompts[part]),
                "completions": list(completions[part]),
                "columns": {name: list(values[part]) for name, values in columns.items()},
                "completion_ids": list(extras.completion_ids[part])
                if extras and extras.completion_ids
                else None,
                "trainer_state": vars(extras.trainer_state) if extras else {},
            }
            for part in parts
        ]
        with self._lock:
            self._lost_calls.clear()
            try:
                answers = self._run(calls)
            except BaseException:
                self.close()  # so that a late answer to this batch never counts for the next batch
                raise
        rewards: list[float] = []
        self.last_lost = {
            row: self._lost_calls[call]
            for call, part in enumerate(parts)
            if answers[call] is None
            for row in range(part.start, part.stop)
        }
        for part, answer in zip(parts, answers, strict=True):
            count = part.stop - part.start
            rewards += [float("nan")] * count if answer is None else answer["rewards"]
            if answer is not None and extras is not None:
                _keep_log(extras, answer, part, size)
        return rewards

    def close(self) -> None:
        """Ends the workers. Another call starts new ones."""
        _end_all(self._workers, os.getpid())

    def _run(self, calls: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
        """Returns the answers to calls in order, with None for lost calls."""
        answers: list[dict[str, Any] | None] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        unfinished = len(calls)
        while len(self._workers) < min(self.workers, len(calls)):
            self._workers.append(self._start())
        while unfinished:
            for index, worker in enumerate(self._workers):
                # If there is a call for each worker, it gets the same rows of every batch.
                call = index if len(calls) <= len(self._workers) else next(iter(waiting), None)
                if worker.busy or call not in waiting:
                    continue
                waiting.remove(call)
                worker.call = call
                worker.busy = True
                worker.deadline = time.monotonic() + self.timeout
                if not self._sent(worker.connection, calls[worker.call]):
                    unfinished -= 1
                    self._lost_calls[worker.call] = _DEAD
                    self._replace(index)
            for index in self._finished():
                worker = self._workers[index]
                answer = _received(worker.connection)
                starting = worker.call is None
                if answer is not None and "error" in answer:
                    before = sum(len(call["prompts"]) for call in calls[: worker.call or 0])
                    counted = f"; its row 0 is row {before} of the batch" if before else ""
                    raise WorkerError(answer["error"] + counted)
                if answer is None and starting:
                    raise WorkerError(f"{self.who}: a worker process ended, or did not start in time")
                if not starting:
                    unfinished -= 1
                if answer is None:
                    late = worker.deadline <= time.monotonic()
                    reason = f"the call ran over its timeout of {self.timeout:g} s" if late else _DEAD
                    self._lost_calls[worker.call] = reason
                    self._replace(index)
                    continue
                if not starting:
                    answers[worker.call] = answer
                worker.call = None
                worker.busy = False
        return answers

    def _finished(self) -> list[int]:
        """Waits for the workers, and returns the indices of those that answered, died or ran late."""
        busy = [worker for worker in self._workers if worker.busy]
        soonest = min((worker.deadline for worker in busy), default=0.0)
        ready = wait([worker.connection for worker in busy], max(0.0, soonest - time.monotonic()))
        now = time.monotonic()
        return [
            index
            for index, worker in enumerate(self._workers)
            if worker.busy and (worker.connection in ready or worker.deadline <= now)
        ]

    def _sent(self, connection: Connection, call: dict[str, Any]) -> bool:
        """Sends a call to a worker, and returns whether the worker is alive."""
        try:
            connection.send(call)
        except OSError:
            return False
        except Exception as error:  # a value that cannot be pickled may raise anything
            raise WorkerError(f"{self.who}: a column cannot go to a worker process: {error!r}") from None
        return True

    def _replace(self, index: int) -> None:
        self._workers[index].end()
        self._workers[index] = self._start()

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd=self._directory,
                env={**os.environ, **_ENVIRONMENT},
                # Ctrl-C then goes to the run alone, which saves first, and there is one group to kill.
                start_new_session=True,
            )
        worker = _Worker(process, ours, deadline=time.monotonic() + _START_SECONDS)
        with contextlib.suppress(OSError):  # it has ended already, which is noticed at its first call
            ours.send_bytes(self._setup)
        return worker


def _received(connection: Connection) -> dict[str, Any] | None:
    """Returns the message of a worker, or None if it is dead or has not sent one yet."""
    try:
        return json.loads(connection.recv_bytes()) if connection.poll() else None
    except (EOFError, OSError, ValueError):
        return None


def _keep_log(extras: Any, answer: Mapping[str, Any], rows: slice, size: int) -> None:
    """Keeps what a call has logged. Rows whose call was lost have None in the columns."""
    for name, values in answer["logged"].items():
        extras.logged.metrics.setdefault(name, []).extend(values)
    for name, values in answer["columns"].items():
        extras.logged.columns.setdefault(name, [None] * size)[rows] = values


def _end_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a fork has copies of the workers, which are not its own
        return
    for worker in workers:
        worker.end()
    workers.clear()
