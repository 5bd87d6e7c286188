"""Huge pages: asked for where the kernel waits to be asked, and left alone elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax import cpu_tuning

SCRIPT = """
import re, threading
from pathlib import Path
from grpo_jax.cpu_tuning import use_huge_pages
done = use_huge_pages(0.25)
assert use_huge_pages(0.25) == done
blocks = []
thread = threading.Thread(target=lambda: blocks.append(bytearray(64 * 2**20)))  # as XLA's threads allocate
thread.start(); thread.join()
blocks.append(bytearray(64 * 2**20))
huge = re.search(r"AnonHugePages: *(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1]
print(done, int(huge) // 1024)
"""


def run(**environment: str) -> tuple[bool, int]:
    """Returns (what use_huge_pages says, MiB of huge pages after 128 MiB were allocated and written)."""
    environment = {k: v for k, v in os.environ.items() if k != "GRPO_JAX_HUGE_PAGES"} | environment
    command = [sys.executable, "-c", SCRIPT]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    done, mebibytes = output.split()
    return done == "True", int(mebibytes)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_large_arrays_of_every_thread_lie_in_huge_pages():
    done, mebibytes = run()
    assert not done or mebibytes >= 100
    if "[madvise]" in cpu_tuning._SETTING.read_text():
        assert done
        assert run(GRPO_JAX_HUGE_PAGES="0") == (False, 0)


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]", None])
def test_left_alone_where_it_would_change_nothing(tmp_path, monkeypatch, setting):
    path = tmp_path / "enabled"
    if setting:
        path.write_text(setting)
    monkeypatch.setattr(cpu_tuning, "_SETTING", path)
    assert cpu_tuning.use_huge_pages.__wrapped__() is False
