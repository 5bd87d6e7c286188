"""The record of what a run is made from, in every checkpoint, and what a resumed run does if it differs.

The record maps names to what identifies them. A name that only one side knows is not compared, so a later
version may add names and still read the records of an earlier one.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config.run import Config, EvaluationConfig
from grpo_jax.run.build import Run
from grpo_jax.run.digests import digest_examples, digest_reward, same_code
from grpo_jax.training.train_state import TrainState

Record = dict[str, dict[str, Any]]

DATA = "training data"
HELD_OUT = "held-out data"
# Prefixes of entries, followed by the reward's name.
REWARD = "reward "
EVAL_REWARD = "reward of evaluation "


def record_inputs(run: Run) -> Record:
    """Returns the digests of a run's examples and of the source of its own reward functions."""
    record = {DATA: digest_examples(run.task.train)}
    if run.held_out:
        record[HELD_OUT] = digest_examples(run.held_out)
    config = run.config
    for prefix, specs, rewards in (
        (REWARD, config.rewards, run.rewards),
        (EVAL_REWARD, config.evaluation.rewards, run.eval_rewards),
    ):
        for spec, reward in zip(specs, rewards, strict=False):  # a task's own rewards have no spec
            if (files := digest_reward(spec.function)) is not None:
                record[prefix + reward.name] = {"files": files}
    return record


def compare_inputs(
    run: Run, before: Record, now: Record, *, checkpoint: str, refuse: bool
) -> tuple[list[str], bool]:
    """Compares what a checkpoint was made from with what the run would continue with.

    Args:
        run: the run.
        before: the record of the checkpoint. It is empty for a run of an earlier version.
        now: the record of the run.
        checkpoint: name of the checkpoint in messages, such as `step 4 in runs/a/checkpoints`.
        refuse: whether other training data or training rewards are refused, unless the config allows them.

    Returns:
        (a line for each change, whether evaluations before and after can be compared).

    Raises:
        ValueError: the training data or a training reward is different. The message names both facts and the
            ways on.
    """
    lines = []
    comparable = True
    for name in now:
        if name not in before:
            continue
        change = _change(run, name, before[name], now[name])
        if change is None:
            continue
        subject, facts = change
        line = f"the {subject} is not that of the checkpoint of {checkpoint}: {facts}"
        key = _key_that_allows(name)
        if refuse and key is not None and key not in run.config.checkpoints.allow_changes:
            raise ValueError(
                f"{line}. Continue with what it was made with, or start a new run in another run_dir, or "
                f"allow the change with --checkpoints.allow_changes '[{key}]'"
            )
        comparable = comparable and name == DATA
        lines.append(line)
    return lines, comparable


def _key_that_allows(name: str) -> str | None:
    """Returns what checkpoints.allow_changes has to hold if an entry differs, or None if it may differ."""
    if name == DATA:
        return "data"
    return "rewards" if name.startswith(REWARD) and not name.startswith(EVAL_REWARD) else None


def _change(run: Run, name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns (what differs, how), or None if nothing does."""
    if name not in (DATA, HELD_OUT):
        return _change_of_files(name, before.get("files", {}), now["files"])
    if before["digest"] == now["digest"]:
        return None
    old_rows = before["rows"]
    new_rows = now["rows"]
    facts = (
        f"{old_rows:,} prompts (digest {before['digest'][:8]}) there, {new_rows:,} ({now['digest'][:8]}) here"
    )
    examples = run.task.train if name == DATA else run.held_out
    if old_rows == new_rows and before["unordered"] == now["unordered"]:
        how = "the same prompts in another order"
    elif new_rows > old_rows and digest_examples(examples[:old_rows])["digest"] == before["digest"]:
        how = f"{new_rows - old_rows:,} were added at the end"
    elif old_rows == new_rows:
        how = "other texts or other columns"
    else:
        how = "some were added, removed or edited"
    return name, f"{facts}; {how}"


def _change_of_files(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    facts = []
    for file in sorted({*before, *now}):
        if file not in before or file not in now:
            facts.append(f"{file} is there only" if file in before else f"{file} is here only")
        elif not same_code(before[file], now[file]):
            digests = (before[file]["bytes"][:8], now[file]["bytes"][:8])
            facts.append(f"{file} has digest {digests[0]} there, {digests[1]} here")
    return (f"code of the {name}", ", ".join(facts)) if facts else None


def record_schedule(run: Run, state: TrainState, step: int) -> dict[str, Any]:
    """Returns the learning rates of the last update and of the next one, as the schedule has them now."""
    moved = _moved(state, step)
    return {
        "num_steps": run.num_steps,
        "last": float(run.schedule(max(moved - 1, 0))),
        "next": float(run.schedule(moved)),
    }


def _moved(state: TrainState, step: int) -> int:
    """Returns the number of updates that moved something. The schedule counts these."""
    return step - int(np.asarray(state.skipped)) - int(np.asarray(state.idle))


def compare_schedules(run: Run, before: Mapping[str, Any], state: TrainState, step: int) -> str | None:
    """Returns a line if the learning rate jumps at the checkpoint, or None if it does not.

    Args:
        run: the run.
        before: result of `record_schedule` at the checkpoint. It is empty for a run of an earlier version.
        state: the state of the checkpoint.
        step: number of optimizer steps so far.
    """
    if not before or step >= run.num_steps:
        return None
    rate = float(run.schedule(_moved(state, step)))
    if abs(rate - before["next"]) <= 1e-5 * max(rate, before["next"]):
        return None
    lr_schedule = run.config.training.lr_schedule
    ended = before["num_steps"]
    if ended == run.num_steps or lr_schedule == "constant":
        why = "its settings are others now"
    else:
        why = f"the {lr_schedule} schedule now ends at step {run.num_steps:,}, not {ended:,}"
    return (
        f"the learning rate jumps: it was {before['last']:.4g} in step {step:,} and is {rate:.4g} in step "
        f"{step + 1:,}, where it would have been {before['next']:.4g}: {why}"
    )


def same_evaluation(config: Config, other: Config) -> bool:
    """Says whether figures of evaluation under two configs can be compared."""

    def relevant(config: Config) -> EvaluationConfig:
        return replace(config.evaluation, every=0, batch_size=1, category=None)

    return relevant(config) == relevant(other)


def describe_start(step: int, num_steps: int) -> str:
    """Returns the line that a continued run begins with."""
    if step > num_steps:
        return (
            f"{step:,} steps are done, more than the {num_steps:,} of training.num_steps, so nothing is left "
            "to train; a larger number continues the run"
        )
    return f"continuing after step {step} of {num_steps}"


def checkpoint_name(step: int, directory: Path) -> str:
    """Returns the name of a checkpoint in messages."""
    return f"step {step:,} in {directory}"
