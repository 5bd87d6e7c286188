"""Where a run stands between two optimizer steps, and how that is saved and read back bit for bit."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.checkpoints.format import fingerprint
from grpo_jax.checkpoints.manager import Checkpoints, CorruptedCheckpoint
from grpo_jax.config.run import Config
from grpo_jax.models.peft import check_base
from grpo_jax.run.build import Parts
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
from grpo_jax.training.learner import TrainState, policy_params
from grpo_jax.types import Experience, Judged, Params, Rollout, Silence


@dataclass(kw_only=True)
class Progress:
    """Where a run stands, at the boundary between two optimizer steps."""

    state: TrainState
    ref_params: Params | None
    frozen: Params | None = None  # of the base, with LoRA
    base: str | None = None  # its fingerprint
    kl_coef: float  # of the next update; moves with a KL target
    step: int = 0  # optimizer steps done
    num_rounds: int = 0  # rounds of prompts drawn: the clock of data order and noise
    num_tokens: int = 0
    experience: Experience | None = None  # of the rollout in use
    leftovers: Groups | None = None  # informative groups that wait for the next rollout
    rollout_metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    inputs: Record = field(default_factory=dict)  # what the run is made from
    remarks: tuple[str, ...] = ()  # what is different since the checkpoint, a line each
    comparable: bool = True  # whether evaluations before and after the checkpoint are
    silences: tuple[Silence, ...] = ()  # of the rollout in use; not saved

    @property
    def policy_params(self) -> Params:
        """The parameters of the policy; with LoRA made anew by every call, so none should be kept."""
        return policy_params(self.state, self.frozen)


def start(parts: Parts) -> Progress:
    """Makes the progress of step 0."""
    return Progress(
        state=parts.init_state(),
        ref_params=parts.model.params if parts.needs_reference else None,
        kl_coef=float(parts.recipe.kl_coef),
        inputs=record_inputs(parts),
        **_base(parts),
    )


def _base(parts: Parts) -> dict[str, Any]:
    """Returns what Progress has of the base under LoRA."""
    if parts.lora is None:
        return {}
    return {"frozen": parts.model.params, "base": fingerprint(parts.model.params)}


def resume_sources(config: Config) -> list[Path]:
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


def restore(parts: Parts, sources: list[Path]) -> Progress | None:
    """Reads the newest checkpoint under the first source that has one, None if there is none yet.

    Raises:
        ValueError: the run that resume names has no checkpoint, or none that these settings can continue;
            or the run in run_dir was made with other training data or rewards.
    """
    config = parts.config
    templates = {"experience": _experience_template(parts), "leftovers": _leftovers_template(parts)}
    if parts.needs_reference and parts.lora is None:
        # One that has moved is there even if from now on it stays.
        templates["reference"] = parts.model.params
    for source in (source for source in sources if source.is_dir()):
        own = source == Path(config.run_dir) / "checkpoints"
        checkpoints = Checkpoints(source, read_only=not own)
        try:
            if checkpoints.latest_step() is None:
                continue
            inputs = record_inputs(parts)
            compare = functools.partial(compare_inputs, parts, now=inputs, refuse=own)
            _refuse_changes(checkpoints, source, compare)
            template = jax.eval_shape(parts.init_state)
            step, state, extra, others = checkpoints.restore_latest(template, templates)
            base, their_base = _base(parts), extra.pop("base", None)
            if base:
                check_base(their_base, base["base"], source)
            reference = others.get("reference")
            if reference is None and parts.needs_reference:
                reference = base["frozen"] if base else checkpoints.restore_reference(parts.model.params)
        finally:
            checkpoints.close()
        experience = others.get("experience")
        if experience is None and step % parts.updates_per_rollout:
            raise ValueError(
                f"the checkpoint of step {step} in {source} holds no rollout, but with "
                f"{parts.updates_per_rollout} updates per rollout (algorithm.num_iterations times "
                "num_minibatches) this step lies inside one; continue with the settings it was made with"
            )
        remarks, comparable = compare(extra.pop("inputs", {}), checkpoint=checkpoint_name(step, source))
        jump = compare_schedules(parts, extra.pop("schedule", {}), state, step)
        extra["rollout_metrics"] = {k: float(v) for k, v in extra["rollout_metrics"].items()}
        # With a target the coefficient is where the run stands; without one it is a setting.
        kl_coef = extra["kl_coef"] if config.algorithm.kl_target else parts.recipe.kl_coef
        extra["kl_coef"] = float(kl_coef)
        left = extra.pop("leftover_samples")
        leftovers = None
        if left:
            leftovers = Groups(judged=add_up(parts.actor(), others["leftovers"]), samples=left)
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
    if config.checkpoints.resume not in ("auto", "never"):
        raise ValueError(f"checkpoints.resume: the run {config.checkpoints.resume} has no checkpoint yet")
    return None


def _refuse_changes(checkpoints: Checkpoints, source: Path, compare: Callable[..., Any]) -> None:
    """Compares inputs before any array is read: prompts of another length would not fit either."""
    step = checkpoints.latest_step()
    try:
        before = checkpoints.extra(step).get("inputs", {})
    except CorruptedCheckpoint:  # the restore goes back to an earlier one
        return
    compare(before, checkpoint=checkpoint_name(step, source))


def save(parts: Parts, checkpoints: Checkpoints, progress: Progress) -> None:
    """Saves; inside the passes over one rollout the rollout goes with it, so none is made twice."""
    inside = progress.step % parts.updates_per_rollout != 0
    others: dict[str, Any] = {"experience": progress.experience} if inside else {}
    if progress.leftovers is not None:
        others["leftovers"] = progress.leftovers.judged.replace(totals=None)  # `restore` adds up again
    if parts.config.algorithm.ref_sync_every:
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
        "schedule": record_schedule(parts, progress.state, progress.step),
    }
    if progress.base is not None:
        extra["base"] = progress.base
    checkpoints.save(progress.step, progress.state, extra, others)


def _shapes(num_rows: int):
    """Returns f(dtype, *shape) that describes an array [num_rows, *shape]."""
    return lambda dtype, *shape: jax.ShapeDtypeStruct((num_rows, *shape), dtype)


def _experience_template(parts: Parts) -> Experience:
    rows = _shapes(parts.num_prompts * parts.config.algorithm.group_size)
    prompt, completion = parts.prompt_length, parts.config.sampling.max_new_tokens
    return Experience(
        prompt_tokens=rows(jnp.int32, prompt),
        prompt_mask=rows(jnp.bool_, prompt),
        tokens=rows(jnp.int32, completion),
        mask=rows(jnp.bool_, completion),
        advantages=rows(jnp.float32),
        weights=rows(jnp.float32, completion),
        old_log_probs=rows(jnp.float32, completion) if parts.rescores_rollout else None,
        ref_log_probs=rows(jnp.float32, completion) if parts.needs_ref_log_probs else None,
        sampler_log_probs=None if parts.rescores_rollout else rows(jnp.float32, completion),
        penalty_weights=rows(jnp.float32, completion) if parts.recipe.separate_penalty else None,
    )


def _leftovers_template(parts: Parts):
    """Returns a function of the number of rows, which differs from step to step."""
    prompt, completion = parts.prompt_length, parts.config.sampling.max_new_tokens

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
            old_log_probs=rows(jnp.float32, completion) if parts.rescores_rollout else None,
            entropies=rows(jnp.float32, completion) if parts.rescores_rollout else None,
            ref_log_probs=rows(jnp.float32, completion) if parts.needs_ref_log_probs else None,
            scores=rows(jnp.float32, len(parts.rewards)),
        )

    return template
