"""Shared fixtures. The persistent compilation cache makes a second run of the suite several times faster."""

import os
import sys
from pathlib import Path

import jax
import pytest
from hypothesis.configuration import set_hypothesis_home_dir

from grpo_jax.cli import enable_compilation_cache

sys.path.insert(0, str(Path(__file__).parent))  # toy.py and oracle.py

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network
os.environ.setdefault("WANDB_MODE", "offline")
CACHE = enable_compilation_cache()
set_hypothesis_home_dir(CACHE.parent / "hypothesis")  # the tests leave nothing behind where they run
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def toy_policy():
    """A one-layer causal transformer in 60 lines of JAX: (Policy, params)."""
    import toy

    return toy.make_toy_policy()


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Drops each module's compiled programs: thousands of them exhaust the mappings of a process (65,530)."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def shared_compilations():
    """Lets the runs of a test module share a model and its optimizers, and so their compilations."""
    import small_run  # needs the path above

    with pytest.MonkeyPatch.context() as monkeypatch:
        small_run.share_compilations(monkeypatch)
        yield
