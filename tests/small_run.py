"""A run of the packaged model that takes well under a second once compiled, and what it leaves behind."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import yaml

from grpo_jax.checkpoints.manager import Checkpoints
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.run import build as run_build
from grpo_jax.run import directory as run_directory
from grpo_jax.run import from_config, trained_model
from grpo_jax.run import loop as run_loop
from grpo_jax.run.diagnostics import Notices
from grpo_jax.trackers import is_timing

ROOT = Path(__file__).parents[1]

SETTINGS = {
    "sampling.max_new_tokens": 5,
    "training.batch_size": 32,
    "training.num_steps": 7,
    "training.learning_rate": 1e-4,
    "evaluation.every": 3,
    "evaluation.num_prompts": 4,
    "evaluation.num_samples": 2,
    "evaluation.batch_size": 8,
    "checkpoints.every": 3,
    "tracking.completions_every": 2,
    "tracking.num_completions": 2,
}


def arguments(run_dir, **changes) -> list[str]:
    """Returns the command line of a small run; changes are written `training__num_steps=3`."""
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in settings.items()] + [f"--run_dir={run_dir}"]


def config(run_dir, **changes) -> Config:
    """Returns the config of a small run."""
    return parse_record(Config, arguments(run_dir, **changes), command="test", description="")


def command(name: str, *argv, **kwargs) -> subprocess.CompletedProcess:
    """Runs a command as a user types it."""
    full = [sys.executable, "-m", f"grpo_jax.{name}", *map(str, argv)]
    return subprocess.run(full, capture_output=True, text=True, env=environment(), timeout=300, **kwargs)


def environment() -> dict[str, str]:
    """Returns an environment in which a subprocess finds the package and the tests' compilation cache."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    cache = jax.config.jax_compilation_cache_dir
    return os.environ | {"PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}


def share_compilations(monkeypatch) -> None:
    """Lets the runs of one test process share a model and its optimizers, and so their compilations."""
    for name in ("load_model", "make_schedule", "make_optimizer"):
        monkeypatch.setattr(trained_model, name, _shared(name))
    monkeypatch.setattr(run_directory, "load_model", _shared("load_model"))


@functools.cache
def _shared(name):
    original, made = getattr(trained_model, name), {}

    def get(*args, **kwargs):
        key = repr((args, kwargs))  # a dict among the arguments has no hash
        if key not in made:
            made[key] = original(*args, **kwargs)
        return made[key]

    return get


def note_compilations(monkeypatch) -> list[str]:
    """Returns a list to which the name of every program is added that jit compiles, cached on disk or not."""
    names, compiler = [], jax._src.compiler
    original = compiler.compile_or_get_cached

    def noting(backend, computation, *args, **kwargs):
        name = str(computation.operation.attributes["sym_name"]).strip('"')
        names.append(name.removeprefix("jit_").lstrip("_"))
        return original(backend, computation, *args, **kwargs)

    monkeypatch.setattr(compiler, "compile_or_get_cached", noting)
    return names


PROGRAMS = ("generate", "completion_log_probs", "train_step")  # what takes seconds to compile


def error_of(done: subprocess.CompletedProcess) -> str:
    """Returns the one line on stderr that a failed command wrote."""
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done
    return lines[0].removeprefix("error: ")


def rows(run_dir, name: str = "metrics") -> list[dict]:
    """Returns the rows of metrics.jsonl or completions.jsonl, timings left out."""
    lines = (Path(run_dir) / f"{name}.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]


@functools.cache
def template():
    """Returns the shapes of a small run's state, the same for all of them."""
    return jax.eval_shape(run_build.build(config("unused")).init_state)


def leaves(run_dir, step=None) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint's train state, by its path; step None is the last."""
    checkpoints = Checkpoints(Path(run_dir) / "checkpoints", read_only=True)
    try:
        step = checkpoints.latest_step() if step is None else step
        state, _, _ = checkpoints.restore(step, template())
    finally:
        checkpoints.close()
    named = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}


def assert_same_run(run_dir, expected) -> None:
    """Asserts that two runs wrote the same rows and ended in the same state, bit for bit."""
    for name in ("metrics", "completions"):
        assert rows(run_dir, name) == rows(expected, name)
    mine, theirs = leaves(run_dir), leaves(expected)
    assert mine.keys() == theirs.keys()
    for name, leaf in mine.items():
        assert leaf.dtype == theirs[name].dtype and leaf.tobytes() == theirs[name].tobytes(), name
    weights = "hf/model.safetensors"
    assert (Path(run_dir) / weights).read_bytes() == (Path(expected) / weights).read_bytes()


def write_yaml(path, content) -> str:
    """Writes a YAML file and returns its name."""
    Path(path).write_text(yaml.safe_dump(content))
    return str(path)


class Crash(BaseException):
    """Ends a run at once, past every `except Exception`."""


PLACES = {  # where a run can be made to crash, and on which side of what happens there
    "rollout": (run_loop, "collect", "before"),
    "rewarded": (run_loop, "collect", "after"),
    "updated": (run_loop, "train_step", "after"),
    "logged": (Notices, "about", "before"),
    "evaluation": (run_loop, "evaluate_run", "before"),
    "evaluated": (run_loop, "evaluate_run", "after"),
    "save": (Checkpoints, "save", "before"),
    "saved": (Checkpoints, "save", "after"),
    "export": (from_config, "save_model", "before"),
}


def crash_at(monkeypatch, place: str, call: int) -> None:
    """Makes the call-th call at a place crash."""
    owner, name, when = PLACES[place]
    original, calls = getattr(owner, name), []

    def crashing(*args, **kwargs):
        calls.append(1)
        if when == "before" and len(calls) == call:
            raise Crash
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise Crash
        return result

    monkeypatch.setattr(owner, name, crashing)
