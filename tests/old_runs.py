"""What a run leaves behind. It is read from files alone, so this also works with an older version."""

import json
import os
import platform as python_platform
from pathlib import Path

import jax
import jaxlib


def platform() -> dict:
    """Returns what the bits of a computation depend on: processor, cores, flags and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = {}
    for line in lines:
        key, _, value = line.partition(":")
        processor.setdefault(key.strip(), value.strip())
    flags = processor.get("flags", "").split()
    return {
        "machine": python_platform.machine(),
        "processor": [processor.get(key) for key in ("vendor_id", "cpu family", "model")],
        "vectors": sorted(flag for flag in flags if flag.startswith(("avx", "fma"))),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax": [jax.__version__, jaxlib.__version__, jax.default_backend(), jax.device_count()],
    }


def state_of(run_dir) -> dict:
    """Returns the newest checkpoint: its step, its items, and of every leaf the dtype, shape and CRC-32."""
    steps = [path for path in Path(run_dir, "checkpoints").iterdir() if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name))
    items = json.loads((newest / "extra" / "metadata").read_text())["_leaves"]
    return {"step": int(newest.name), "items": items}
