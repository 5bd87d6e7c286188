"""Writes event files for TensorBoard, by tensorboardX (an extra)."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.trackers.jsonl import LogRow, Metrics, plain
from grpo_jax.trackers.redaction import redact


class TensorBoardTracker:
    """Writes event files under run_dir/tensorboard. On resume the rows after resume_step are purged.

    Events are written at once, in this thread. tensorboardX's SummaryWriter hands them to another thread
    through a queue. When that thread dies because the disk is full, the queue blocks `log`, or else the exit
    of the process.
    """

    def __init__(self, run_dir: str | Path, config: Mapping[str, Any], resume_step: int | None = None):
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError:
            raise ImportError(
                'tracking.tensorboard needs tensorboardX: pip install "grpo-jax[tensorboard]"'
            ) from None
        self._summary = summary
        self._event = Event
        directory = Path(run_dir) / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # Names end with the second, so writers opened within the same second would overwrite one file.
        # TensorBoard reads files in the order of their names, so the rest of the name has to be a time as
        # well.
        self._writer = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
        first = 0 if resume_step is None else resume_step + 1
        self._write(first, session_log=SessionLog(status=SessionLog.START))  # purges from there on
        self._write_text("config", json.dumps(redact(config), indent=1), 0)
        self._writer.flush()

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **what))

    def _write_text(self, tag: str, text: str, step: int) -> None:
        # Indentation makes it a code block, so that a model's text is not read as Markdown.
        block = "".join(f"    {line}\n" for line in text.split("\n"))
        self._write(step, summary=self._summary.text(tag, block))

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._write(step, summary=self._summary.scalar(name, float(value)))
        self._writer.flush()

    def log_completions(self, step: int, rows: Sequence[LogRow]) -> None:
        self._write_text("completions", "\n".join(json.dumps(plain(row)) for row in rows), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
