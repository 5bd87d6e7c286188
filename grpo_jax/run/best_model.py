"""The best model of a run so far, by a metric of its evaluation: run_dir/best, apart from the resume chain.

run_dir/best is a link to one of the two directories beside it, best.0 and best.1: a new model is written
whole into the one that is not in use before the link moves, in one step. A kill leaves the old one or the
new one, and what best.json says is always true of the model beside it.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.evaluation.outcomes import Outcome
from grpo_jax.models.loading import save_model
from grpo_jax.run.build import Run
from grpo_jax.run.evaluation import summarize_run
from grpo_jax.run.whole_files import write_whole
from grpo_jax.types import Params

_SLOTS = ("best.0", "best.1")


def evaluation_names(run: Run) -> list[str]:
    """Returns the names of the figures of every evaluation of a run, or [] if it has no held-out prompts."""
    prompts = len(run.task.evaluation)
    k = run.config.evaluation.num_samples
    if not prompts:
        return []
    nothing = Outcome(
        greedy=np.zeros(prompts, bool),
        correct=np.zeros((prompts, k), bool),
        scores=np.zeros((prompts * k, len(run.rewards) + len(run.eval_rewards)), np.float32),
        totals=np.zeros((prompts, k), np.float32),
        valid=np.zeros((prompts, k), bool),
        lengths=np.zeros(prompts * k),
        finished=np.zeros(prompts * k, bool),
    )
    return list(summarize_run(run, nothing))


def check_best_metric(run: Run) -> None:
    """Checks that evaluation will give the metric by which the best model is chosen.

    Raises:
        ValueError: it will not. The message lists the names that it gives.
    """
    metric = run.config.checkpoints.best_metric
    if metric is None or metric in (names := evaluation_names(run)):
        return
    if not names:
        raise ValueError(
            f"checkpoints.best_metric: {metric!r} needs held-out prompts, and there are none; give "
            "data.eval_file, and evaluation.num_prompts above 0"
        )
    raise ValueError(
        f"checkpoints.best_metric: evaluation gives no {metric!r}; it gives {', '.join(names)} "
        "(evaluation.num_samples is the k of mean@k)"
    )


def read_best(run_dir: str | Path) -> dict[str, Any] | None:
    """Reads what best.json says of a run's best model.

    Returns:
        a dict of `step`, `metric`, `mode`, `value`, `moved` (whether the metric has ever had another value)
        and `comparable` (whether later evaluations measure the same thing). None if there is no best model.

    Raises:
        ValueError: best.json is damaged.
    """
    path = Path(run_dir) / "best" / "best.json"
    try:
        best = json.loads(path.read_text())
        known = {name: best[name] for name in ("step", "metric", "mode", "value")}
        # Runs of older versions did not store these two.
        return {**known, **{name: bool(best.get(name, True)) for name in ("moved", "comparable")}}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is damaged; remove {path.parent}, and the next evaluation chooses a best model"
        ) from None


def keep_best(run: Run, step: int, metrics: Mapping[str, float], params: Params) -> str | None:
    """Exports the model to run_dir/best if its evaluation is better than that of the model in it.

    A value that is missing or not finite is no improvement. An equal one is none either, unless the metric
    has had this one value in every evaluation. It then says nothing, and the newest model is kept, so that
    the untrained one is never kept for a tie. A best model is replaced if it was chosen by another metric or
    mode, or before a change of what is measured.

    Args:
        run: the run.
        step: number of optimizer steps so far.
        metrics: metrics of the evaluation at this step.
        params: parameters that were evaluated.

    Returns:
        a line that says so, or None if nothing was exported.
    """
    metric = run.config.checkpoints.best_metric
    mode = run.config.checkpoints.best_mode
    value = None if metric is None else metrics.get(metric)
    if value is None or not math.isfinite(value):
        return None
    best = read_best(run.config.run_dir)
    entry = {"step": step, "metric": metric, "mode": mode, "value": float(value)}
    entry |= {"moved": False, "comparable": True}
    target = Path(run.config.run_dir) / "best"
    rule = None if best is None else (best["metric"], best["mode"], best["comparable"])
    if rule != (metric, mode, True):
        _export(run, params, entry)
        return f"step {step}: {metric} {value:.4g} is the first; the model is in {target}"
    if value == best["value"] and not best["moved"]:
        _export(run, params, entry)
        return (
            f"step {step}: {metric} is still {value:.4g} and tells no model from another; the newest one is "
            f"in {target}"
        )
    if value > best["value"] if mode == "max" else value < best["value"]:
        _export(run, params, entry | {"moved": True})
        return f"step {step}: {metric} {value:.4g} is the best so far; the model is in {target}"
    if not best["moved"]:
        _write_entry(target, best | {"moved": best["value"] != value})
    return None


def _export(run: Run, params: Params, entry: dict[str, Any]) -> None:
    best = Path(run.config.run_dir) / "best"
    used = os.readlink(best) if best.is_symlink() else None
    free_first = _SLOTS if used != _SLOTS[0] else _SLOTS[::-1]
    slot, other = (best.with_name(name) for name in free_first)
    shutil.rmtree(slot, ignore_errors=True)
    save_model(run.model, params, slot)
    _write_entry(slot, entry)
    link = best.with_name("best.unfinished")
    link.unlink(missing_ok=True)
    link.symlink_to(slot.name)
    _remove_copy(best)
    os.replace(link, best)
    shutil.rmtree(other, ignore_errors=True)


def _write_entry(directory: Path, entry: dict[str, Any]) -> None:
    write_whole(directory / "best.json", json.dumps(entry) + "\n")


def outdate_best(run_dir: str | Path) -> None:
    """Notes that what is measured has changed: the next evaluation replaces the best model."""
    best = read_best(run_dir)
    if best is not None:
        _write_entry(Path(run_dir) / "best", best | {"comparable": False})


def forget_best(run_dir: str | Path) -> None:
    """Removes the best model of a run that was killed before its first checkpoint and now starts again."""
    best = Path(run_dir) / "best"
    _remove_copy(best)
    if best.is_symlink():
        best.unlink()
    for name in _SLOTS:
        shutil.rmtree(best.with_name(name), ignore_errors=True)


def _remove_copy(best: Path) -> None:
    """Removes a best model that is a directory: a copy of a run in which the link became one."""
    if not best.is_symlink() and (best / "best.json").is_file():
        shutil.rmtree(best)
