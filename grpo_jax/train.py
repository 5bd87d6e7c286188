"""The training command: it parses the config, builds the run and starts the loop.

python -m grpo_jax.train --config configs/grpo_config.yaml --algorithm.kl_coef 0.05
"""

import sys

from grpo_jax.screen.start import begin

if __name__ == "__main__":
    begin("train", sys.argv[1:])  # before the imports that take seconds

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from grpo_jax.checkpoints.manager import Checkpoints
from grpo_jax.cli import enable_compilation_cache, json_alone, run_command
from grpo_jax.config.default import or_default
from grpo_jax.config.output import OUTPUT_OPTIONS, OutputArguments, without_output
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.models.loading import save_model
from grpo_jax.models.peft import save_adapters
from grpo_jax.rewards.loading import close_rewards
from grpo_jax.run.best_model import check_best_metric, forget_best, outdate_best
from grpo_jax.run.build import Run, build
from grpo_jax.run.continuing import describe_start, same_evaluation
from grpo_jax.run.directory import config_dict, keep_first_date, read_config, write_config
from grpo_jax.run.loop import Interrupts, evaluate_and_keep_best, run_loop
from grpo_jax.run.model_card import write_card
from grpo_jax.run.planning import make_plan
from grpo_jax.run.progress import Progress, restore, resume_candidates, start
from grpo_jax.run.trained_model import resolve_adapter
from grpo_jax.screen.start import rows_printed_by, say, say_aside, say_more, say_result
from grpo_jax.trackers import make_trackers


def _measures_as_before(config: Config, progress: Progress) -> bool:
    """Says whether evaluations of a continued run can be compared with those before."""
    if not (Path(config.run_dir) / "config.yaml").exists():
        return True
    return progress.comparable and same_evaluation(config, read_config(config.run_dir))


def _export(run: Run, progress: Progress) -> None:
    """Writes the trained model, and its adapters if it has any, as other libraries read them."""
    config = run.config
    target = Path(config.run_dir) / "hf"
    save_model(run.model, progress.policy_params, target)
    write_card(config, target, step=progress.step)
    say_result(f"saved {target}, a directory that transformers opens")
    if run.lora is not None:
        target = Path(config.run_dir) / "adapter"
        save_adapters(run.model, run.lora, progress.state.params, target)
        say_result(f"saved {target}, a directory that peft opens")


def train(config: Config) -> int:
    """Trains, evaluates and exports as the config says, and continues an interrupted run.

    Returns:
        0, or 128 + the signal's number when the run was interrupted (and saved).

    Raises:
        ValueError, OSError, ImportError: before anything is compiled, about something in the config.
        RewardError: a reward function failed. RuntimeError: training broke down.
    """
    config = resolve_adapter(config)
    candidates = resume_candidates(config)
    config = keep_first_date(config, [candidate.parent for candidate in candidates])
    run = build(config)
    config = run.config
    check_best_metric(run)
    directory = Path(config.run_dir) / "checkpoints"
    progress = restore(run, candidates)
    if progress is not None and not _measures_as_before(config, progress):
        outdate_best(config.run_dir)
    write_config(config)
    say(make_plan(run).text())

    if progress is None:
        # A run that was killed before its first checkpoint starts again, and its model may have changed.
        shutil.rmtree(directory / "reference", ignore_errors=True)
        forget_best(config.run_dir)
    checkpoints = Checkpoints(directory, keep=config.checkpoints.keep)
    resume_step = None
    if progress is None:
        progress = start(run)
    else:
        resume_step = progress.step
        say(describe_start(resume_step, run.num_steps))
        for remark in progress.remarks:
            say(f"note: {remark}")
    # A reference that moves is in every checkpoint, the base of LoRA in its own directory.
    stays = progress.ref_params is not None and not (config.algorithm.ref_sync_every or run.lora)
    if stays and not checkpoints.has_reference():
        checkpoints.save_reference(progress.ref_params)
    # From here on parameters live in the state and in the reference or base alone; the model keeps shapes.
    shapes = jax.eval_shape(lambda params: params, run.model.params)
    run = replace(run, model=replace(run.model, params=shapes))

    trackers = make_trackers(
        config.tracking,
        run_dir=config.run_dir,
        config=config_dict(config),
        total_steps=run.num_steps,
        resume_step=resume_step,
    )
    try:
        with trackers, Interrupts(trackers.doing, trackers.message) as interrupts:
            if progress.step == 0:
                evaluate_and_keep_best(run, progress, trackers, first=True)
            run_loop(run, progress, checkpoints, trackers, interrupts)
    finally:
        checkpoints.close()
        close_rewards([*run.rewards, *run.eval_rewards])
    if interrupts.signum is not None and progress.step < run.num_steps:
        say_result(f"interrupted after step {progress.step}, saved; the same command continues it")
        return 128 + interrupts.signum
    _export(run, progress)
    return 0


@dataclass(frozen=True, kw_only=True)
class TrainArguments(Config, OutputArguments):
    """The config of a run, and what is printed.

    With `json` each row of metrics.jsonl is a line of standard output as well.
    """

    def __post_init__(self):
        Config.__post_init__(self)
        OutputArguments.__post_init__(self)


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    from grpo_jax.run.run_record import recording

    arguments = parse_record(
        TrainArguments,
        or_default(argv, own=OUTPUT_OPTIONS, say=say_aside),
        command="python -m grpo_jax.train",
        description="Train a causal language model with GRPO.",
        from_trl=True,
    )
    say_more(f"compilation cache: {enable_compilation_cache()}")
    config = without_output(arguments, Config)
    with json_alone(arguments.json, at_once=True) as print_row, rows_printed_by(print_row, arguments.json):
        with recording() as record:
            record.exit_code = train(config)
        return record.exit_code


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
