"""What a run is made from, recorded with every checkpoint, and what to do when it is different on resume.

The record maps names to what identifies them. A name that only one side knows is not compared, so a later
version may add names and still read the records of an earlier one.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_jax.config.run import Config
from grpo_jax.run.build import Run
from grpo_jax.run.digests import digest_examples, digest_reward, same_code
from grpo_jax.training.learner import TrainState

Record = dict[str, dict[str, Any]]

DATA, HELD_OUT, REWARD, EVAL_REWARD = "training data", "held-out data", "reward ", "reward of evaluation "


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
        before: the record of the checkpoint; empty for a run of an earlier version.
        now: the record of the run.
        checkpoint: the checkpoint, for messages, such as `step 4 in runs/a/checkpoints`.
        refuse: whether other training data or training rewards are refused, unless the config allows them.

    Returns:
        (a line for each change, whether evaluations before and after can be compared).

    Raises:
        ValueError: the training data or a training reward is different; names both facts and the ways on.
    """
    lines, comparable = [], True
    for name in (name for name in now if name in before):
        change = _change(run, name, before[name], now[name])
        if change is None:
            continue
        subject, facts = change
        line = f"the {subject} is not that of the checkpoint of {checkpoint}: {facts}"
        key = _key_that_allows(name)
        if refuse and key is not None and key not in run.config.checkpoints.allow_changes:
            raise ValueError(
                f"{line}. Continue with what it was made with; or start anew in another run_dir; or allow "
                f"the change with --checkpoints.allow_changes '[{key}]'"
            )
        comparable = comparable and name == DATA
        lines.append(line)
    return lines, comparable


def _key_that_allows(name: str) -> str | None:
    """Returns what in checkpoints.allow_changes an entry needs if it differs; None if it may."""
    if name == DATA:
        return "data"
    return "rewards" if name.startswith(REWARD) and not name.startswith(EVAL_REWARD) else None


def _change(run: Run, name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns (what differs, how), None if nothing does."""
    if name not in (DATA, HELD_OUT):
        return _change_of_files(name, before.get("files", {}), now["files"])
    if before["digest"] == now["digest"]:
        return None
    there, here = before["rows"], now["rows"]
    facts = f"{there:,} prompts (digest {before['digest'][:8]}) there, {here:,} ({now['digest'][:8]}) here"
    examples = run.task.train if name == DATA else run.held_out
    if there == here and before["unordered"] == now["unordered"]:
        how = "the same prompts in another order"
    elif here > there and digest_examples(examples[:there])["digest"] == before["digest"]:
        how = f"{here - there:,} were added at the end"
    elif there == here:
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
            there, here = before[file]["bytes"][:8], now[file]["bytes"][:8]
            facts.append(f"{file} has digest {there} there, {here} here")
    return (f"code of the {name}", ", ".join(facts)) if facts else None


def record_schedule(run: Run, state: TrainState, step: int) -> dict[str, Any]:
    """Returns what the learning rate was in the last update, and would be in the next one."""
    moved = _moved(state, step)
    return {
        "num_steps": run.num_steps,
        "last": float(run.schedule(max(moved - 1, 0))),
        "next": float(run.schedule(moved)),
    }


def _moved(state: TrainState, step: int) -> int:
    """Returns the updates that moved something; the schedule counts them."""
    return step - int(state.skipped) - int(state.idle)


def compare_schedules(run: Run, before: Mapping[str, Any], state: TrainState, step: int) -> str | None:
    """Returns a line where the learning rate leaves the course that it was on; None where it does not.

    Args:
        run: the run.
        before: what `record_schedule` said at the checkpoint; empty for a run of an earlier version.
        state: the state of the checkpoint.
        step: optimizer steps done.
    """
    if not before or step >= run.num_steps:
        return None
    rate = float(run.schedule(_moved(state, step)))
    if abs(rate - before["next"]) <= 1e-5 * max(rate, before["next"]):
        return None
    training, ended = run.config.training, before["num_steps"]
    if ended == run.num_steps or training.lr_schedule == "constant":
        why = "its settings are others now"
    else:
        why = f"the {training.lr_schedule} schedule now ends at step {run.num_steps:,}, not {ended:,}"
    return (
        f"the learning rate jumps: it was {before['last']:.4g} in step {step:,} and is {rate:.4g} in step "
        f"{step + 1:,}, where it would have been {before['next']:.4g}: {why}"
    )


def same_evaluation(config: Config, other: Config) -> bool:
    """Says whether figures of evaluation under two configs can be compared."""
    mine, theirs = (replace(one.evaluation, every=0, batch_size=1, category=None) for one in (config, other))
    return mine == theirs


def describe_start(step: int, num_steps: int) -> str:
    """Returns the line that a continued run begins with."""
    if step > num_steps:
        return (
            f"{step:,} steps are done, more than the {num_steps:,} of training.num_steps, so nothing is left "
            "to train; a larger number continues the run"
        )
    return f"continuing after step {step} of {num_steps}"


def checkpoint_name(step: int, directory: Path) -> str:
    """Returns how messages call a checkpoint."""
    return f"step {step:,} in {directory}"
