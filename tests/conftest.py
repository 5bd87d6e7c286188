"""Shared fixtures. The persistent compilation cache makes a second run of the suite several times faster."""

import os
import sys
from pathlib import Path

import jax
import pytest
from hypothesis.configuration import set_hypothesis_home_dir

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # toy.py and oracle.py

import shape_checks  # noqa: E402  needs the path above

shape_checks.install()  # before the package is imported

from grpo_jax.cli import enable_compilation_cache  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network
os.environ.setdefault("WANDB_MODE", "offline")
CACHE = enable_compilation_cache()
set_hypothesis_home_dir(CACHE.parent / "hypothesis")  # the tests leave nothing behind where they run
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Folders and modules that start processes, compile real models or train. A single test has the mark itself.
SLOW = (
    "nightly",
    "commands",
    "checkpoints/test_manager_damaged.py",
    "config/test_inert_settings.py",
    "models/test_any_model.py",
    "models/test_cards.py",
    "models/test_decoder_families.py",
    "models/test_flax_families.py",
    "models/test_flax_objects.py",
    "models/test_implementations.py",
    "models/test_peft.py",
    "models/test_start_adapters.py",
    "models/test_vocabulary.py",
    "policy/test_attention.py",
    "policy/test_decoder.py",
    "policy/test_devices.py",
    "policy/test_shared_prompts.py",
    "rewards/test_pool.py",
    "run",
    "test_benchmarks.py",
    "test_convert_smollm2.py",
    "test_cpu_tuning.py",
    "test_newcomer.py",
    "test_printed_commands.py",
)


def is_slow(path):
    """Says whether SLOW names a test module or a folder above it."""
    parts = path.relative_to(TESTS).parts
    return any("/".join(parts[: end + 1]) in SLOW for end in range(len(parts)))


def pytest_collection_modifyitems(items):
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def no_shape_checks():
    """Lets a test pass shapes that the annotations forbid, as a user can."""
    with shape_checks.off():
        yield


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
