"""The progress of a run between two optimizer steps, which is saved and restored bit for bit."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.checkpoints.format import fingerprint
from grpo_jax.checkpoints.manager import Checkpoints, CorruptedCheckpoint
from grpo_jax.config.run import Config
from grpo_jax.models.peft import check_base
from grpo_jax.run.build import Run
from grpo_jax.run.continuing import (
    Record,
    checkpoint_name,
    compare_inputs,
    compare_schedules,
    record_inputs,
    record_schedule,
)
from grpo_jax.run.directory import check_same_run, read_config
from grpo_jax.trackers.jsonl import plain
from grpo_jax.training.actor import add_up
from grpo_jax.training.dynamic_sampling import Groups
from grpo_jax.training.train_state import TrainState, policy_params
from grpo_jax.types import Experience, Judged, Params, Rollout, Silence


@dataclass(kw_only=True)
class Progress:
    """Everything that changes from one optimizer step to the next.

    Args:
        state: state of the training.
        ref_params: parameters of the reference. `None` means that there is none.
        frozen: parameters of the base, with LoRA.
        base: fingerprint of the base, with LoRA.
        kl_coef: coefficient of the KL term in the next update. It moves if there is a KL target.
        step: number of optimizer steps so far.
        num_rounds: number of rounds of prompts so far, which determines data order and noise.
        num_tokens: number of completion tokens so far.
        experience: experience of the rollout in use.
        leftovers: groups with a signal that wait for the next rollout.
        rollout_metrics: metrics of the rollout in use.
        samples: completions of the rollout in use, for the table of samples.
        inputs: record of what the run is made from.
        remarks: what is different since the checkpoint, a line each.
        comparable: whether evaluations before and after the checkpoint can be compared.
        silences: rewards that say nothing about the rollout in use. They are not saved.
        left_reference: False, as bool [] on the device, once the policy has left a reference that is frozen.
            It is not saved.
    """

    state: TrainState
    ref_params: Params | None
    frozen: Params | None = None
    base: str | None = None
    kl_coef: float
    step: int = 0
    num_rounds: int = 0
    num_tokens: int = 0
    experience: Experience | None = None
    leftovers: Groups | None = None
    rollout_metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    inputs: Record = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    comparable: bool = True
    silences: tuple[Silence, ...] = ()
    left_reference: jax.Array | bool | None = None

    @property
    def policy_params(self) -> Params:
        """The parameters of the policy. With LoRA every call merges them again, so keep none of them."""
        return policy_params(self.state, self.frozen)


def start(run: Run) -> Progress:
    """Makes the progress of step 0."""
    return Progress(
        state=run.init_state(),
        ref_params=run.model.params if run.needs_reference else None,
        kl_coef=float(run.recipe.kl_coef),
        inputs=record_inputs(run),
        **_base(run),
    )


def _base(run: Run) -> dict[str, Any]:
    """Returns the fields of Progress that describe the base under LoRA."""
    if run.lora is None:
        return {}
    return {"frozen": run.model.params, "base": fingerprint(run.model.params)}


def resume_candidates(config: Config) -> list[Path]:
    """Returns the checkpoint directories that the run may continue from, the first choice first.

    There is none for a fresh start.

    Raises:
        ValueError: resume is `never` and run_dir is in use, or resume names no run, or run_dir holds a run
            with other settings or one that continues another run.
    """
    run_dir = None if config.run_dir is None else Path(config.run_dir)
    resume = config.checkpoints.resume
    used = run_dir is not None and (run_dir / "config.yaml").exists()
    other = Path(resume) / "checkpoints"
    if resume == "never" and used:
        raise ValueError(
            f"run_dir {run_dir} holds a run already and checkpoints.resume is never; use another run_dir"
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
    # A run that continues another one, and was interrupted, continues from its own checkpoints if it has any.
    return ([run_dir / "checkpoints"] if used else []) + ([other] if named else [])


def restore(run: Run, candidates: Sequence[Path]) -> Progress | None:
    """Reads the newest checkpoint of the first candidate that has one.

    Args:
        run: the run.
        candidates: checkpoint directories, the first choice first, from `resume_candidates`.

    Returns:
        the progress that the checkpoint holds, or None if there is no checkpoint yet.

    Raises:
        ValueError: the run that resume names has no checkpoint, or none that these settings can continue, or
            the run in run_dir was made with other training data or rewards.
    """
    for directory in candidates:
        progress = _restore_from(run, directory) if directory.is_dir() else None
        if progress is not None:
            return progress
    resume = run.config.checkpoints.resume
    if resume not in ("auto", "never"):
        raise ValueError(f"checkpoints.resume: the run {resume} has no checkpoint yet")
    return None


def _restore_from(run: Run, directory: Path) -> Progress | None:
    """Reads the newest checkpoint of a directory. Returns None if there is none."""
    config = run.config
    own = config.run_dir is not None and directory == Path(config.run_dir) / "checkpoints"
    checkpoints = Checkpoints(directory, read_only=not own)
    try:
        if checkpoints.latest_step() is None:
            return None
        inputs = record_inputs(run)
        compare = functools.partial(compare_inputs, run, now=inputs, refuse=own)
        _refuse_changes(checkpoints, directory, compare)
        template = jax.eval_shape(run.init_state)
        step, state, extra, others = checkpoints.restore_latest(template, _templates(run))
        base = _base(run)
        stored_base = extra.pop("base", None)
        if base:
            check_base(stored_base, base["base"], directory)
        reference = others.get("reference")
        if reference is None and run.needs_reference:
            reference = base["frozen"] if base else checkpoints.restore_reference(run.model.params)
    finally:
        checkpoints.close()
    experience = others.get("experience")
    updates = config.updates_per_rollout
    if experience is None and step % updates:
        raise ValueError(
            f"the checkpoint of step {step} in {directory} holds no rollout, but with "
            f"{updates} updates per rollout (algorithm.num_iterations times num_minibatches) this step lies "
            "inside one; continue with the settings that the checkpoint was made with"
        )
    remarks, comparable = compare(extra.pop("inputs", {}), checkpoint=checkpoint_name(step, directory))
    jump = compare_schedules(run, extra.pop("schedule", {}), state, step)
    extra["rollout_metrics"] = {k: float(v) for k, v in extra["rollout_metrics"].items()}
    # The KL target moves the coefficient, so the stored one counts. Without a target it is a setting.
    extra["kl_coef"] = float(extra["kl_coef"] if config.algorithm.kl_target else run.recipe.kl_coef)
    left = extra.pop("leftover_samples")
    leftovers = None
    if left:
        leftovers = Groups(judged=add_up(run.actor(), others["leftovers"]), samples=left)
    return Progress(
        state=state,
        ref_params=reference,
        step=step,
        experience=experience,
        leftovers=leftovers,
        inputs=inputs,
        remarks=(*remarks, *filter(None, [jump])),
        comparable=comparable,
        **base,
        **extra,
    )


def _templates(run: Run) -> dict[str, Any]:
    """Returns the shapes of what a checkpoint may hold besides the state."""
    templates = {"experience": _experience_template(run), "leftovers": _leftovers_template(run)}
    if run.needs_reference and run.lora is None:
        # A reference that has moved is in the checkpoint even if it does not move any more.
        templates["reference"] = run.model.params
    return templates


def _refuse_changes(checkpoints: Checkpoints, directory: Path, compare: Callable[..., Any]) -> None:
    """Compares inputs before any array is read, because prompts of another length would not fit either."""
    step = checkpoints.latest_step()
    try:
        before = checkpoints.extra(step).get("inputs", {})
    except CorruptedCheckpoint:  # the restore goes back to an earlier one
        return
    compare(before, checkpoint=checkpoint_name(step, directory))


def save(run: Run, checkpoints: Any, progress: Progress) -> None:
    """Saves a checkpoint. Within the passes over a rollout it holds the rollout, so none is made twice."""
    inside = progress.step % run.config.updates_per_rollout != 0
    others: dict[str, Any] = {"experience": progress.experience} if inside else {}
    if progress.leftovers is not None:
        others["leftovers"] = progress.leftovers.judged.replace(totals=None)  # `restore` adds up again
    if run.config.algorithm.ref_sync_every:
        others["reference"] = progress.ref_params
    extra = {
        "num_rounds": progress.num_rounds,
        "num_tokens": progress.num_tokens,
        "kl_coef": repr(progress.kl_coef),
        # As texts: JSON has no NaN, and a run that breaks down must get as far as saying so.
        "rollout_metrics": {k: repr(v) for k, v in progress.rollout_metrics.items()} if inside else {},
        "samples": plain(progress.samples) if inside else [],
        "leftover_samples": plain(progress.leftovers.samples) if progress.leftovers else [],
        "inputs": progress.inputs,
        "schedule": record_schedule(run, progress.state, progress.step),
    }
    if progress.base is not None:
        extra["base"] = progress.base
    checkpoints.save(progress.step, progress.state, extra, others)


def _shapes(num_rows: int):
    """Returns f(dtype, *shape) that describes an array [num_rows, *shape]."""
    return lambda dtype, *shape: jax.ShapeDtypeStruct((num_rows, *shape), dtype)


def _experience_template(run: Run) -> Experience:
    rows = _shapes(run.config.num_prompts * run.config.algorithm.group_size)
    prompt = run.prompt_length
    completion = run.config.sampling.max_new_tokens
    return Experience(
        prompt_tokens=rows(jnp.int32, prompt),
        prompt_mask=rows(jnp.bool_, prompt),
        tokens=rows(jnp.int32, completion),
        mask=rows(jnp.bool_, completion),
        advantages=rows(jnp.float32),
        weights=rows(jnp.float32, completion),
        old_log_probs=rows(jnp.float32, completion) if run.rescores_rollout else None,
        ref_log_probs=rows(jnp.float32, completion) if run.needs_ref_log_probs else None,
        sampler_log_probs=None if run.rescores_rollout else rows(jnp.float32, completion),
        penalty_weights=rows(jnp.float32, completion) if run.recipe.separate_penalty else None,
    )


def _leftovers_template(run: Run):
    """Returns a function of the number of rows, which differs from step to step."""
    prompt = run.prompt_length
    completion = run.config.sampling.max_new_tokens

    def template(num_rows: int) -> Judged:
        rows = _shapes(num_rows)
        return Judged(
            rollout=Rollout(
                prompt_tokens=rows(jnp.int32, prompt),
                prompt_mask=rows(jnp.bool_, prompt),
                tokens=rows(jnp.int32, completion),
                mask=rows(jnp.bool_, completion),
                log_probs=rows(jnp.float32, completion),
                kept_mass=rows(jnp.float32, completion),
                finished=rows(jnp.bool_),
            ),
            old_log_probs=rows(jnp.float32, completion) if run.rescores_rollout else None,
            entropies=rows(jnp.float32, completion) if run.rescores_rollout else None,
            ref_log_probs=rows(jnp.float32, completion) if run.needs_ref_log_probs else None,
            scores=rows(jnp.float32, len(run.rewards)),
        )

    return template
