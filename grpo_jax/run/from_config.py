"""Runs a config from its start, or from its last checkpoint, to its end: the command and Python do it so."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax

from grpo_jax.checkpoints.manager import Checkpoints
from grpo_jax.config.run import Config
from grpo_jax.data.given_rows import PromptRows
from grpo_jax.models.from_objects import can_be_exported
from grpo_jax.models.loading import Model, save_model
from grpo_jax.models.peft import save_adapters
from grpo_jax.rewards.loading import close_rewards
from grpo_jax.run.best_model import check_best_metric, forget_best, outdate_best
from grpo_jax.run.build import Run, build
from grpo_jax.run.continuing import describe_start, same_evaluation
from grpo_jax.run.directory import config_dict, keep_first_date, read_config, write_config
from grpo_jax.run.loop import Interrupts, OnStep, evaluate_and_keep_best, run_loop
from grpo_jax.run.model_card import write_card
from grpo_jax.run.planning import make_plan
from grpo_jax.run.progress import Progress, restore, resume_candidates, start
from grpo_jax.run.trained_model import resolve_adapter
from grpo_jax.screen import start as screen
from grpo_jax.trackers import make_trackers, own_tracker
from grpo_jax.trackers.jsonl import LogRow
from grpo_jax.training.train_state import TrainState
from grpo_jax.types import Params


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run ends with.

    Args:
        state: the final state of the training.
        params: the parameters of the policy, with adapters merged into them.
        history: the logged metrics, a dict with `step` for each row of metrics.jsonl, in order.
        model: the trained model, as `load_model` gives one.
        step: number of optimizer steps.
        ended: `finished`, `stopped` (by on_step), or `interrupted` (by Ctrl-C or SIGTERM).
        run_dir: directory of the run. `None` means that nothing was written.
        exit_code: 0, or 128 + the signal's number when the run was interrupted.
    """

    state: TrainState
    params: Params
    history: list[dict[str, Any]]
    model: Model
    step: int
    ended: Literal["finished", "stopped", "interrupted"]
    run_dir: Path | None
    exit_code: int = 0

    def save(self, directory: str | Path, *, dtype: str = "float32") -> None:
        """Writes the trained model as a directory that transformers and `load_model` open.

        Args:
            directory: the directory, which is created if missing.
            dtype: data type of the weights in the files: `float32`, `bfloat16` or `float16`.

        Raises:
            ValueError: the model is not one of transformers, so it has no such form.
        """
        if not can_be_exported(self.model):
            raise ValueError(
                f"the {self.model.source} has no configuration of transformers, so it cannot be saved as a "
                "directory of Hugging Face; save result.params yourself"
            )
        save_model(self.model, self.params, directory, dtype=dtype)


class _History:
    """A tracker that keeps what is logged."""

    def __init__(self, rows: Sequence[dict[str, Any]] = ()):
        self.rows = [*rows]

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self.rows.append({"step": step, **metrics})

    def log_completions(self, step: int, rows: Sequence[LogRow]) -> None:
        """Keeps none of them."""

    def close(self) -> None:
        """Keeps the rows."""


class _NoCheckpoints:
    """Stands for the checkpoints of a run that writes nothing."""

    def save(self, *_: Any) -> None:
        pass

    def close(self) -> None:
        pass


def run_config(
    config: Config,
    *,
    model: Model | None = None,
    prompts: PromptRows | None = None,
    on_step: OnStep | None = None,
    quiet: bool = False,
) -> Result:
    """Trains, evaluates and exports as the config says, and continues an interrupted run.

    Args:
        config: config of the run. Functions and other objects may be in it, see `config.in_memory`.
        model: a model that is used instead of the one that the config names.
        prompts: rows that are used instead of those that the config names.
        on_step: function of (step, metrics) that is called after every optimizer step. If it returns True or
            `"stop"`, the run ends there as it would after its last step.
        quiet: whether nothing is printed.

    Raises:
        ValueError, OSError, ImportError: before anything is compiled, about something in the config.
        RewardError: a reward function failed. RuntimeError: training broke down.
    """
    say: Callable[[str], None] = _say_nothing if quiet else screen.say
    say_result: Callable[[str], None] = _say_nothing if quiet else screen.say_result
    own_trackers = [own_tracker(named) for named in config.tracking.trackers]
    config = resolve_adapter(config)
    candidates = resume_candidates(config)
    config = keep_first_date(config, [candidate.parent for candidate in candidates])
    run = build(config, model=model, prompts=prompts)
    config = run.config
    check_best_metric(run)
    progress = restore(run, candidates)
    if config.run_dir is not None:
        if progress is not None and not _measures_as_before(config, progress):
            outdate_best(config.run_dir)
        write_config(config)
    say(make_plan(run).text())
    resume_step = None if progress is None else progress.step
    checkpoints = _open_checkpoints(config, fresh=progress is None)
    if progress is None:
        progress = start(run)
    else:
        say(describe_start(progress.step, run.num_steps))
        for remark in progress.remarks:
            say(f"note: {remark}")
    # A reference that moves is in every checkpoint, the base of LoRA in its own directory.
    stays = progress.ref_params is not None and not (config.algorithm.ref_sync_every or run.lora)
    if isinstance(checkpoints, Checkpoints) and stays and not checkpoints.has_reference():
        checkpoints.save_reference(progress.ref_params)
    # From here on parameters live in the state and in the reference or base alone; the model keeps shapes.
    shapes = jax.eval_shape(lambda params: params, run.model.params)
    run = replace(run, model=replace(run.model, params=shapes))

    history = _History()
    trackers = make_trackers(
        config.tracking,
        run_dir=config.run_dir,
        config=config_dict(config),
        total_steps=run.num_steps,
        resume_step=resume_step,
        own=[history, *own_trackers],
        quiet=quiet,
    )
    if resume_step is not None and config.run_dir is not None:
        lines = (Path(config.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        history.rows = [json.loads(line) for line in lines]
    stopped = False
    try:
        with trackers, Interrupts(trackers.doing, trackers.message) as interrupts:
            if progress.step == 0:
                evaluate_and_keep_best(run, progress, trackers, first=True)
            stopped = run_loop(run, progress, checkpoints, trackers, interrupts, on_step)
    finally:
        checkpoints.close()
        close_rewards([*run.rewards, *run.eval_rewards])
    interrupted = interrupts.signum is not None and progress.step < run.num_steps and not stopped
    if interrupted:
        kept = ", saved; the same command continues it" if config.run_dir is not None else ""
        say_result(f"interrupted after step {progress.step}{kept}")
    elif config.run_dir is not None:
        _export(run, progress, say_result)
    return _result(run, progress, history.rows, interrupts.signum if interrupted else None, stopped)


def _say_nothing(text: str) -> None:
    del text


def _result(
    run: Run, progress: Progress, rows: list[dict[str, Any]], signum: int | None, stopped: bool
) -> Result:
    params = progress.policy_params
    run_dir = run.config.run_dir
    return Result(
        state=progress.state,
        params=params,
        history=rows,
        model=replace(run.model, params=params),
        step=progress.step,
        ended="interrupted" if signum is not None else "stopped" if stopped else "finished",
        run_dir=None if run_dir is None else Path(run_dir),
        exit_code=0 if signum is None else 128 + signum,
    )


def _open_checkpoints(config: Config, *, fresh: bool) -> Checkpoints | _NoCheckpoints:
    if config.run_dir is None:
        return _NoCheckpoints()
    directory = config.directory / "checkpoints"
    if fresh:
        # A run that was killed before its first checkpoint starts again, and its model may have changed.
        shutil.rmtree(directory / "reference", ignore_errors=True)
        forget_best(config.run_dir)
    return Checkpoints(directory, keep=config.checkpoints.keep)


def _measures_as_before(config: Config, progress: Progress) -> bool:
    """Says whether evaluations of a continued run can be compared with those before."""
    if not (config.directory / "config.yaml").exists():
        return True
    return progress.comparable and same_evaluation(config, read_config(config.directory))


def _export(run: Run, progress: Progress, say: Callable[..., None]) -> None:
    """Writes the trained model, and its adapters if it has any, as other libraries read them."""
    config = run.config
    if not can_be_exported(run.model):
        say("note: the model is none of transformers, so it is in the checkpoints alone")
        return
    target = config.directory / "hf"
    save_model(run.model, progress.policy_params, target)
    write_card(config, target, step=progress.step)
    say(f"saved {target}, a directory that transformers opens")
    if run.lora is not None:
        target = config.directory / "adapter"
        save_adapters(run.model, run.lora, progress.state.params, target)
        say(f"saved {target}, a directory that peft opens")
