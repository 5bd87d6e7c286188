"""Writes metrics.jsonl and completions.jsonl, the record of a run, which a resumed run continues.

Each line is one object, `{"step": n, ...}`. Floats are written so that equal floats give equal text. NaN and
infinities are null, because JSON has no other way to say them. A run that was killed and continued leaves the
same rows as one that was not, timings apart, if all rows of a step are written before its checkpoint is.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Metrics = Mapping[str, float | None]
LogRow = Mapping[str, Any]


def plain(value: Any) -> Any:
    """Turns a value into JSON's types. NumPy scalars become Python's, and NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "biufV":  # V: bfloat16
        raise TypeError(f"{value!r} is not a number, a text or a list of them")
    number = array.item() if array.dtype.kind in "biu" else float(array)
    return None if isinstance(number, float) and not math.isfinite(number) else number


def rewind(path: Path, step: int | None) -> None:
    """Drops the rows of a JSONL file that lie after a step, and a last line that is incomplete.

    The file is replaced in one move, so a crash leaves the old one or the new one.

    Args:
        path: file of rows with a `step`. It need not exist.
        step: last step to keep. None means that nothing is kept.
    """
    kept = []
    if step is not None and path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
                kept.append(line + b"\n")
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class JsonlTracker:
    """Writes metrics.jsonl and completions.jsonl, each line as soon as it is known."""

    def __init__(self, run_dir: str | Path, resume_step: int | None = None):
        self._files = {}
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        for name in ("metrics", "completions"):
            path = Path(run_dir) / f"{name}.jsonl"
            rewind(path, resume_step)
            self._files[name] = path.open("a", encoding="utf-8")

    def _write(self, name: str, step: int, row: LogRow) -> None:
        line = json.dumps({"step": int(step), **plain(row)}, allow_nan=False)
        self._files[name].write(line + "\n")
        self._files[name].flush()

    def log(self, step: int, metrics: Metrics) -> None:
        if metrics:
            self._write("metrics", step, metrics)

    def log_completions(self, step: int, rows: Sequence[LogRow]) -> None:
        for row in rows:
            self._write("completions", step, row)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
