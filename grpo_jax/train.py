"""The training command: parse the config, build the parts, run the loop.

python -m grpo_jax.train --config configs/grpo_config.yaml --algorithm.kl_coef 0.05
"""

import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.actor import Actor, collect
from grpo_jax.checkpoints import Checkpoints
from grpo_jax.cli import enable_compilation_cache, parse_record, run_command
from grpo_jax.config import Config
from grpo_jax.data import batch
from grpo_jax.evaluate import evaluate_parts
from grpo_jax.learner import TrainState, train_step
from grpo_jax.models import save_model
from grpo_jax.notices import Notices
from grpo_jax.plan import make_plan
from grpo_jax.runs import Parts, build, check_same_run, config_dict, read_config, write_config
from grpo_jax.trackers import Trackers, make_trackers
from grpo_jax.trackers.jsonl import plain
from grpo_jax.types import Experience, Params

_MAX_SKIPPED = 5  # updates in a row without a finite gradient before the run stops


@dataclass(kw_only=True)
class Progress:
    """Where a run stands, at the boundary between two optimizer steps."""

    state: TrainState
    ref_params: Params | None
    step: int = 0  # optimizer steps done
    num_tokens: int = 0
    experience: Experience | None = None  # of the rollout in use
    rollout_metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class _Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second one interrupts at once."""

    def __init__(self):
        self.signum: int | None = None

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum, _frame):
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


def _resume_sources(config: Config) -> list[Path]:
    """Returns the checkpoint directories to continue from, the first choice first; [] for a fresh start.

    Raises:
        ValueError: resume is `never` and run_dir is in use, or names no run, or run_dir holds a run with
            other settings or one that continues something else.
    """
    run_dir, resume = Path(config.run_dir), config.checkpoints.resume
    used, other = (run_dir / "config.yaml").exists(), Path(resume) / "checkpoints"
    if resume == "never" and used:
        raise ValueError(
            f"run_dir {run_dir} holds a run already and checkpoints.resume is never; use another"
        )
    named = resume not in ("auto", "never")
    if named and not other.is_dir():
        raise ValueError(f"checkpoints.resume: {resume!r} is not auto, never or the directory of a run")
    if used:
        before = read_config(run_dir)
        itself = named and other.resolve() == (run_dir / "checkpoints").resolve()
        if named and not itself and before.checkpoints.resume != resume:
            raise ValueError(f"run_dir {run_dir} holds a run already; continue {resume} in another run_dir")
        check_same_run(config, before)
    # A run that continues another and was cut itself goes on from its own checkpoints, if it has any.
    return ([run_dir / "checkpoints"] if used else []) + ([other] if named else [])


def _restore(parts: Parts, sources: list[Path]) -> Progress | None:
    """Reads the newest checkpoint under the first source that has one, None if there is none yet.

    Raises:
        ValueError: the run that resume names has no checkpoint, or none that these settings can continue.
    """
    config = parts.config
    for source in (source for source in sources if source.is_dir()):
        checkpoints = Checkpoints(source, read_only=source != Path(config.run_dir) / "checkpoints")
        try:
            if checkpoints.latest_step() is None:
                continue
            step, state, extra, others = checkpoints.restore_latest(
                jax.eval_shape(parts.init_state), {"experience": _experience_template(parts)}
            )
            reference = checkpoints.restore_reference(parts.model.params) if parts.needs_reference else None
        finally:
            checkpoints.close()
        experience = others.get("experience")
        if experience is None and step % config.algorithm.num_iterations:
            raise ValueError(
                f"the checkpoint of step {step} in {source} holds no rollout, but with "
                f"algorithm.num_iterations {config.algorithm.num_iterations} this step lies inside one; "
                "continue with the num_iterations it was made with"
            )
        extra["rollout_metrics"] = {k: float(v) for k, v in extra["rollout_metrics"].items()}
        return Progress(state=state, ref_params=reference, step=step, experience=experience, **extra)
    if config.checkpoints.resume not in ("auto", "never"):
        raise ValueError(f"checkpoints.resume: the run {config.checkpoints.resume} has no checkpoint yet")
    return None


def _experience_template(parts: Parts) -> Experience:
    batch_size = parts.config.training.batch_size

    def rows(dtype, *shape):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    prompt, completion = parts.prompt_length, parts.config.sampling.max_new_tokens
    return Experience(
        prompt_tokens=rows(jnp.int32, prompt),
        prompt_mask=rows(jnp.bool_, prompt),
        tokens=rows(jnp.int32, completion),
        mask=rows(jnp.bool_, completion),
        advantages=rows(jnp.float32),
        weights=rows(jnp.float32, completion),
        old_log_probs=rows(jnp.float32, completion),
        ref_log_probs=rows(jnp.float32, completion) if parts.needs_reference else None,
    )


def _save(checkpoints: Checkpoints, progress: Progress, num_iterations: int) -> None:
    """Saves; inside the passes over one rollout the rollout goes with it, so none is made twice."""
    inside = progress.step % num_iterations != 0
    extra = {
        "num_tokens": progress.num_tokens,
        # As texts: JSON has no NaN, and a run that breaks down must get as far as saying so.
        "rollout_metrics": {k: repr(v) for k, v in progress.rollout_metrics.items()} if inside else {},
        "samples": plain(progress.samples) if inside else [],
    }
    others = {"experience": progress.experience} if inside else {}
    checkpoints.save(progress.step, progress.state, extra, others)


def _spread(rows: list, count: int) -> list:
    """Picks count rows evenly from all, so that a table shows many prompts rather than one group."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _one_step(parts: Parts, actor: Actor, progress: Progress, key: jax.Array) -> dict[str, float]:
    """Makes one optimizer step, after a new rollout if the last one is used up; returns its metrics."""
    config, started = parts.config, time.perf_counter()
    rollout_step, iteration = divmod(progress.step, config.algorithm.num_iterations)
    if iteration == 0:
        seed, count = config.training.seed, parts.num_prompts
        examples = batch(parts.task.train, seed=seed, step=rollout_step, num_prompts=count)
        noise = jax.random.fold_in(key, rollout_step)
        collected = collect(actor, progress.state.params, progress.ref_params, examples, noise)
        progress.experience = collected.experience
        progress.rollout_metrics = collected.metrics
        progress.samples = _spread(collected.samples, config.tracking.num_completions)
        progress.num_tokens += int(
            jnp.sum(collected.experience.prompt_mask) + jnp.sum(collected.experience.mask)
        )
    update_started = time.perf_counter()
    progress.state, updated = train_step(
        progress.state,
        progress.experience,
        recipe=parts.recipe,
        num_microbatches=config.training.num_microbatches,
        temperature=config.sampling.temperature,
    )
    updated = {name: float(value) for name, value in jax.device_get(updated).items()}
    now = time.perf_counter()
    metrics = {
        **progress.rollout_metrics,
        **updated,
        "learning_rate": float(parts.schedule(progress.step)),
        "num_tokens": progress.num_tokens,
        "time/update": now - update_started,
        "step_time": now - started,
    }
    if iteration:  # those phases belong to the step that made the rollout
        metrics |= {"time/generate": 0.0, "time/reward": 0.0, "time/score": 0.0}
    progress.step += 1
    return metrics


def _loop(
    parts: Parts, progress: Progress, checkpoints: Checkpoints, trackers: Trackers, interrupts: _Interrupts
) -> None:
    """Runs until the last step or an interrupt. What is logged for a step precedes its checkpoint."""
    config, actor, notices = parts.config, parts.actor(), Notices()
    key = jax.random.key(config.training.seed)
    every, num_iterations = config.evaluation.every, config.algorithm.num_iterations
    saved = progress.step
    while progress.step < parts.num_steps and interrupts.signum is None:
        metrics = _one_step(parts, actor, progress, key)
        step, last = progress.step, progress.step == parts.num_steps
        trackers.log(step, metrics)
        for text in notices.about(step, metrics):
            trackers.message(text)
        if last or step % config.tracking.completions_every == 0:
            trackers.log_completions(step, progress.samples)
        if metrics["skipped_updates_in_a_row"] >= _MAX_SKIPPED:
            raise RuntimeError(
                f"step {step}: loss or gradient was not finite {_MAX_SKIPPED} times in a row; nothing was "
                f"learned from them. Look at the rewards, or lower training.learning_rate in another run_dir "
                f"with checkpoints.resume: {config.run_dir}"
            )
        if last or (every and step % every == 0):
            trackers.log(step, evaluate_parts(parts, progress.state.params))
        if last or step % config.checkpoints.every == 0:
            _save(checkpoints, progress, num_iterations)
            saved = step
    if progress.step > saved:
        _save(checkpoints, progress, num_iterations)


def train(config: Config) -> int:
    """Trains, evaluates and exports as the config says; continues an interrupted run.

    Returns:
        0, or 128 + the signal's number when the run was interrupted (and saved).

    Raises:
        ValueError, OSError, ImportError: before anything is compiled, about something in the config.
        RewardError: a reward function failed. RuntimeError: training broke down.
    """
    sources = _resume_sources(config)
    parts = build(config)
    directory = Path(config.run_dir) / "checkpoints"
    progress = _restore(parts, sources)
    write_config(config)
    print(make_plan(parts).text(), flush=True)

    if progress is None:
        # A run cut before its first checkpoint starts anew, from a model that may have changed since.
        shutil.rmtree(directory / "reference", ignore_errors=True)
    checkpoints = Checkpoints(directory, keep=config.checkpoints.keep)
    resume_step = None
    if progress is None:
        state = parts.init_state()
        progress = Progress(state=state, ref_params=parts.model.params if parts.needs_reference else None)
    else:
        resume_step = progress.step
        print(f"continuing after step {resume_step} of {parts.num_steps}", flush=True)
    if progress.ref_params is not None and not checkpoints.has_reference():
        checkpoints.save_reference(progress.ref_params)
    # From here on parameters live in the state and in the reference alone; the model keeps their shapes.
    shapes = jax.eval_shape(lambda params: params, parts.model.params)
    parts = replace(parts, model=replace(parts.model, params=shapes))

    trackers = make_trackers(
        config.tracking,
        run_dir=config.run_dir,
        config=config_dict(config),
        total_steps=parts.num_steps,
        resume_step=resume_step,
    )
    try:
        with trackers, _Interrupts() as interrupts:
            if progress.step == 0:
                trackers.log(0, evaluate_parts(parts, progress.state.params))
            _loop(parts, progress, checkpoints, trackers, interrupts)
    finally:
        checkpoints.close()
    if interrupts.signum is not None and progress.step < parts.num_steps:
        print(f"interrupted after step {progress.step}, saved; the same command continues it", flush=True)
        return 128 + interrupts.signum
    target = Path(config.run_dir) / "hf"
    save_model(parts.model, progress.state.params, target)
    print(f"saved {target}, a directory that transformers opens", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    config = parse_record(
        Config,
        argv,
        command="python -m grpo_jax.train",
        description="Train a causal language model with GRPO.",
    )
    enable_compilation_cache()
    return train(config)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
