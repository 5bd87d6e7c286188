"""Event files for TensorBoard, by tensorboardX (an extra)."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.trackers.jsonl import Metrics, Row, plain
from grpo_jax.trackers.redaction import redact


class TensorBoardTracker:
    """Writes event files under run_dir/tensorboard; on resume the rows after resume_step are purged."""

    def __init__(self, run_dir: str | Path, config: Mapping[str, Any], resume_step: int | None = None):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError(
                'tracking.tensorboard needs tensorboardX: pip install "grpo-jax[tensorboard]"'
            ) from None
        # max_queue 0 is unbounded: with a bound, `add_scalar` hangs for good once the writing thread died
        self._writer = SummaryWriter(
            str(Path(run_dir) / "tensorboard"),
            max_queue=0,
            flush_secs=5,
            purge_step=0 if resume_step is None else resume_step + 1,
            # Names end with the second: writers opened within one would overwrite one file. TensorBoard
            # reads files in the order of their names, so the rest of the name has to be a time as well.
            filename_suffix=f".{time.time_ns()}",
        )
        self._add_text("config", json.dumps(redact(config), indent=1), 0)

    def _add_text(self, tag: str, text: str, step: int) -> None:
        # indented: a code block, so that a model's text is not read as Markdown
        self._writer.add_text(tag, "".join(f"    {line}\n" for line in text.split("\n")), step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()  # here, where an error can be seen: the thread's own go nowhere

    def log_completions(self, step: int, rows: Sequence[Row]) -> None:
        self._add_text("completions", "\n".join(json.dumps(plain(row)) for row in rows), step)

    def close(self) -> None:
        self._writer.close()
