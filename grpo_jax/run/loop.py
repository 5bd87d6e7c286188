"""The training loop of a run: one rollout, its updates, what is logged, evaluated and saved."""

import functools
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from grpo_jax.data.loading import batch
from grpo_jax.objective.kl import adapt_kl_coef
from grpo_jax.policy.decoding import generate
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.policy.shapes import tokens_in_use
from grpo_jax.rewards.extras import TrainerState
from grpo_jax.rewards.judging import reach_verdict
from grpo_jax.run.best_model import keep_best
from grpo_jax.run.build import Run
from grpo_jax.run.diagnostics import Notices
from grpo_jax.run.evaluation import evaluate_run
from grpo_jax.run.interrupts import Interrupts as Interrupts
from grpo_jax.run.progress import Progress, save
from grpo_jax.trackers import Trackers
from grpo_jax.trackers.console import spread
from grpo_jax.training.actor import Actor, collect
from grpo_jax.training.learner import train_step
from grpo_jax.training.reference import is_reference, mix_params

_JIT_BOUNDARIES = (generate, completion_log_probs, train_step)
EnterPhase = Callable[..., None]  # (phase in a word, what a log says about it) -> None
# (step, metrics) -> True or "stop" to end the run there, None or False to go on
OnStep = Callable[[int, dict[str, float]], Any]
_MAX_SKIPPED = 5  # updates in a row without a finite gradient before the run stops


def trainer_state(run: Run, progress: Progress) -> TrainerState:
    """Says how far the training is, for reward functions that ask for it."""
    prompts = progress.num_rounds * run.config.num_prompts
    return TrainerState(
        global_step=progress.step, max_steps=run.num_steps, epoch=prompts / len(run.task.train)
    )


def _say_no_phase(_phase: str, _detail: str = "") -> None:
    pass


def _new_rollout(run: Run, actor: Actor, progress: Progress, key: jax.Array, enter: EnterPhase) -> None:
    """Makes the rollout that the next updates use. Its index in data order and noise is num_rounds."""
    config = run.config
    reach = functools.partial(reach_verdict, run.rewards, trainer_state=trainer_state(run, progress))

    def judge(*args, completion_ids):
        enter("rewarding")
        verdict = reach(*args, completion_ids=completion_ids)
        enter("scoring")  # log-probs of what was sampled
        return verdict

    actor = replace(
        actor,
        recipe=actor.recipe.replace(kl_coef=progress.kl_coef),
        judge=judge,
    )

    def next_prompts(round_: int):
        enter("sampling", f"{run.config.training.batch_size} completions")
        index = progress.num_rounds + round_
        examples = batch(
            run.task.train, seed=config.training.seed, step=index, num_prompts=run.config.num_prompts
        )
        return examples, jax.random.fold_in(key, index)

    ref_params = progress.ref_params if run.needs_ref_log_probs else None
    collected = collect(actor, progress.policy_params, ref_params, next_prompts, progress.leftovers)
    progress.experience = collected.experience
    progress.leftovers = collected.leftovers
    progress.rollout_metrics = collected.metrics
    progress.silences = collected.silences
    progress.samples = spread(collected.samples, config.tracking.num_completions)
    progress.num_tokens += collected.num_tokens
    progress.num_rounds += collected.num_rounds


def dropout_key(run: Run, step: int) -> jax.Array | None:
    """Returns the key of an update's dropout, a function of (seed, step), or None without dropout."""
    if not run.config.lora.dropout:
        return None
    key = jax.random.key(run.config.training.seed)
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(b"lora.dropout")), step)


def _at_reference(run: Run, progress: Progress) -> bool | jax.Array:
    """Says whether the policy equals its reference. Without a reference the answer is False.

    With an exact KL, `train_step` has the reference's parameters and compares them itself.
    """
    if progress.ref_params is None or run.recipe.exact_kl:
        return False
    if progress.left_reference is not None:
        return progress.left_reference
    return is_reference(progress.state.params, progress.ref_params, progress.frozen)


def _update(run: Run, progress: Progress, minibatch: int) -> dict[str, float]:
    """Makes one optimizer update from one mini-batch of the rollout in use and returns its metrics."""
    config = run.config
    experience = progress.experience
    size = config.training.batch_size
    if config.algorithm.num_minibatches > 1:
        rows = slice(minibatch * size, (minibatch + 1) * size)
        experience = jax.tree.map(lambda x: x[rows], experience)
    at_reference = _at_reference(run, progress)
    progress.state, updated = train_step(
        progress.state,
        experience,
        recipe=run.recipe.replace(kl_coef=progress.kl_coef),
        frozen=progress.frozen,
        ref_params=progress.ref_params if run.recipe.exact_kl else None,
        at_reference=at_reference,
        dropout_key=dropout_key(run, progress.step),
        group_size=config.algorithm.group_size,
        num_microbatches=config.training.num_microbatches,
        num_tokens=tokens_in_use(experience.mask, config.training.num_microbatches),
        temperature=config.sampling.temperature,
    )
    updated, equal = jax.device_get((updated, at_reference))
    if not equal and not config.algorithm.ref_sync_every:
        # A policy that has moved does not come back to a frozen reference, so nothing is compared again.
        progress.left_reference = at_reference
    return {name: float(value) for name, value in updated.items()}


def _after_update(run: Run, progress: Progress, updated: dict[str, float]) -> None:
    """Adapts the KL coefficient and mixes the reference, where the config asks for it."""
    algorithm = run.config.algorithm
    # An update without a gradient may have had no token to measure a KL on.
    if algorithm.kl_target is not None and updated["grad_norm"] > 0:
        moved = adapt_kl_coef(
            progress.kl_coef,
            updated["kl"],
            kl_target=algorithm.kl_target,
            kl_adaptation=algorithm.kl_adaptation,
        )
        progress.kl_coef = float(moved)
    if algorithm.ref_sync_every and progress.step % algorithm.ref_sync_every == 0:
        progress.ref_params = mix_params(
            progress.state.params, progress.ref_params, algorithm.ref_mixup_alpha
        )


def one_step(
    run: Run, actor: Actor, progress: Progress, key: jax.Array, enter: EnterPhase = _say_no_phase
) -> dict[str, float]:
    """Makes one optimizer step, after a new rollout if the last one is used up, and returns its metrics.

    Args:
        run: the run.
        actor: the actor of the run.
        progress: the progress, which is changed.
        key: key of the sampling noise.
        enter: function that is told which phase begins.
    """
    started = time.perf_counter()
    index = progress.step % run.config.updates_per_rollout
    if index == 0:
        _new_rollout(run, actor, progress, key, enter)
    # The schedule counts the updates that moved something.
    moved = progress.step - int(progress.state.skipped) - int(progress.state.idle)
    enter("updating")
    update_started = time.perf_counter()
    kl_coef = progress.kl_coef
    updated = _update(run, progress, index % run.config.algorithm.num_minibatches)
    now = time.perf_counter()
    if taken := sorted(updated.keys() & progress.rollout_metrics.keys()):
        raise ValueError(
            f"a reward function logs a metric {taken[0]!r}, which every update has; give it another name"
        )
    metrics = {
        **progress.rollout_metrics,
        **updated,
        "kl_coef": kl_coef,
        **({"learning_rate": float(run.schedule(moved))} if run.takes_schedule else {}),
        "num_tokens": progress.num_tokens,
        "time/update": now - update_started,
        "step_time": now - started,
    }
    if index:  # those phases belong to the step that made the rollout
        metrics |= {"time/generate": 0.0, "time/reward": 0.0, "time/score": 0.0}
    progress.step += 1
    _after_update(run, progress, updated)
    return metrics


def _num_programs() -> int:
    """Returns how many programs the three jit boundaries have, compiled or read from the cache."""
    return sum(function._cache_size() for function in _JIT_BOUNDARIES)


def evaluate_and_keep_best(
    run: Run, progress: Progress, trackers: Trackers, *, first: bool
) -> dict[str, float]:
    """Evaluates and logs, exports the model if it is the best so far, and returns the figures.

    The first evaluation of a process also prints what its figures cannot tell.
    """
    if run.task.evaluation:
        trackers.enter("evaluating", f"{len(run.task.evaluation)} held-out prompts")
    params = progress.policy_params
    say = trackers.message if first else None
    metrics = evaluate_run(run, params, say, trainer_state=trainer_state(run, progress))
    trackers.log(progress.step, metrics)
    if text := keep_best(run, progress.step, metrics, params):
        trackers.message(text)
    return metrics


def _wants_stop(on_step: OnStep | None, step: int, metrics: dict[str, float]) -> bool:
    """Calls the user's function after a step, and returns whether the run ends there.

    Raises:
        ValueError: the function returned something else than it may.
    """
    answer = None if on_step is None else on_step(step, dict(metrics))
    if answer is None or isinstance(answer, bool):
        return bool(answer)
    if answer != "stop":
        raise ValueError(
            f"on_step returned {answer!r:.60}; it must return True or 'stop' to end the run, or None to go on"
        )
    return True


def run_loop(
    run: Run,
    progress: Progress,
    checkpoints: Any,
    trackers: Trackers,
    interrupts: Interrupts,
    on_step: OnStep | None = None,
) -> bool:
    """Trains until the last step or an interrupt. The rows of a step are written before its checkpoint.

    Args:
        run: the run.
        progress: its progress, which is changed.
        checkpoints: where checkpoints are saved.
        trackers: where metrics go.
        interrupts: signals to end.
        on_step: function that is called after each step with its metrics, those of an evaluation included.

    Returns:
        whether on_step has ended the run. That step is then treated as the last one.
    """
    config = run.config
    actor = run.actor()
    notices = Notices()
    key = jax.random.key(config.training.seed)
    every = config.evaluation.every
    saved = progress.step
    evaluated = saved == 0  # by this process
    num_programs = _num_programs()
    while progress.step < run.num_steps and interrupts.signum is None:
        metrics = one_step(run, actor, progress, key, trackers.enter)
        interrupts.has_work = True
        metrics["compilations"] = _num_programs() - num_programs
        step = progress.step
        last = step == run.num_steps
        trackers.log(step, metrics)
        for text in notices.about(step, metrics, progress.silences):
            trackers.message(text)
        shown = last or step % config.tracking.completions_every == 0
        if shown:
            trackers.log_completions(step, progress.samples)
        if metrics["skipped_updates_in_a_row"] >= _MAX_SKIPPED:
            raise RuntimeError(
                f"step {step}: loss or gradient was not finite {_MAX_SKIPPED} times in a row; nothing was "
                f"learned from them. Look at the rewards, or lower training.learning_rate in another run_dir "
                f"with checkpoints.resume: {config.run_dir or 'the run to go on from'}"
            )
        if last or (every and step % every == 0):
            metrics |= evaluate_and_keep_best(run, progress, trackers, first=not evaluated)
            evaluated = True
        if _wants_stop(on_step, step, metrics) and not last:
            if not shown:
                trackers.log_completions(step, progress.samples)
            if not (every and step % every == 0):
                evaluate_and_keep_best(run, progress, trackers, first=not evaluated)
            save(run, checkpoints, progress)
            return True
        if last or step % config.checkpoints.every == 0:
            trackers.enter("saving", f"step {step} in {config.run_dir}/checkpoints")
            save(run, checkpoints, progress)
            saved = step
    if progress.step > saved:
        trackers.enter("saving", f"step {progress.step} in {config.run_dir}/checkpoints")
        save(run, checkpoints, progress)
    return False
