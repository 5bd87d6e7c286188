"""The best model of a run: chosen by its metric, whole at any moment, the same after a cut."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_run
from safetensors.numpy import load_file

import grpo_jax.train as train_module
from grpo_jax.evaluate import main as evaluate_main
from grpo_jax.models.loading import load_model
from grpo_jax.plan import main as plan_main
from grpo_jax.run import best_model as best_module
from grpo_jax.run.best_model import (
    check_best_metric,
    evaluation_names,
    forget_best,
    keep_best,
    outdate_best,
    read_best,
)
from grpo_jax.run.build import build
from grpo_jax.run.evaluation import evaluate_run
from grpo_jax.train import train

METRIC = "eval/rewards/exact_match/mean"


pytestmark = pytest.mark.usefixtures("shared_compilations")


@pytest.fixture(scope="module")
def model():
    return load_model("packaged:arithmetic")


def settings(**changes):
    return {"checkpoints__best_metric": METRIC} | changes


def run_for(run_dir, model, **changes):
    return build(small_run.config(run_dir, **settings(**changes)), model=model)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def scaled(model, factor):
    return jax.tree.map(lambda x: x * factor, model.params)


def entry(step, value, mode="max", moved=True):
    return {"step": step, "metric": METRIC, "mode": mode, "value": value, "moved": moved, "comparable": True}


# The choice


def kept_steps(run, values, params) -> list[int]:
    """Returns the steps that were exported of evaluations with these values."""
    return [
        step for step, value in enumerate(values) if keep_best(run, step, {METRIC: value}, params) is not None
    ]


@pytest.mark.parametrize(
    ("mode", "steps"),
    [("max", [0, 2, 6]), ("min", [0, 1, 5])],
)
def test_only_an_improvement_is_kept(mode, steps, model, tmp_path):
    run = run_for(tmp_path, model, checkpoints__best_mode=mode)
    values = [0.5, 0.25, 0.75, 0.75, float("nan"), 0.0, 1.0]
    assert kept_steps(run, values, model.params) == steps
    assert read_best(tmp_path) == entry(steps[-1], values[steps[-1]], mode)


def test_a_metric_that_is_missing_changes_nothing(model, tmp_path):
    run = run_for(tmp_path, model)
    assert keep_best(run, 1, {"eval/mean@2": 1.0}, model.params) is None
    assert read_best(tmp_path) is None and list(tmp_path.iterdir()) == []
    off = build(small_run.config(tmp_path), model=model)
    assert keep_best(off, 1, {METRIC: 1.0}, model.params) is None and list(tmp_path.iterdir()) == []


def test_another_metric_or_mode_starts_anew(model, tmp_path):
    assert keep_best(run_for(tmp_path, model), 1, {METRIC: 0.5}, model.params)
    other = run_for(tmp_path, model, checkpoints__best_metric="eval/mean@2")
    assert keep_best(other, 2, {METRIC: 0.1, "eval/mean@2": 0.1}, model.params)
    lowest = run_for(tmp_path, model, checkpoints__best_metric="eval/mean@2", checkpoints__best_mode="min")
    assert keep_best(lowest, 3, {"eval/mean@2": 0.9}, model.params)
    found = {"step": 3, "metric": "eval/mean@2", "mode": "min", "value": 0.9}
    found |= {"moved": False, "comparable": True}
    assert read_best(tmp_path) == found


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_metric_that_has_not_moved_keeps_the_newest_model(value, model, tmp_path):
    """A tie is no reason to keep the untrained model."""
    run = run_for(tmp_path, model)
    assert kept_steps(run, [value] * 3, model.params) == [0, 1, 2]
    assert read_best(tmp_path) == entry(2, value, moved=False)
    text = keep_best(run, 3, {METRIC: value}, model.params)
    assert f"is still {value:.4g} and tells no model from another" in text and "best so far" not in text
    # From the first other value on, better or worse, a tie keeps what is there.
    assert keep_best(run, 4, {METRIC: value - 0.1}, model.params) is None
    assert keep_best(run, 5, {METRIC: value}, model.params) is None
    assert read_best(tmp_path) == entry(3, value)
    assert keep_best(run, 6, {METRIC: value + 0.1}, model.params)
    assert keep_best(run, 7, {METRIC: value + 0.1}, model.params) is None


def test_after_a_change_of_what_is_measured_the_next_model_is_kept(model, tmp_path):
    run = run_for(tmp_path, model)
    outdate_best(tmp_path)  # there is none
    assert keep_best(run, 1, {METRIC: 0.5}, model.params) and list(tmp_path.iterdir())
    outdate_best(tmp_path)
    assert read_best(tmp_path) == entry(1, 0.5, moved=False) | {"comparable": False}
    assert keep_best(run, 2, {METRIC: 0.1}, model.params)
    assert read_best(tmp_path) == entry(2, 0.1, moved=False)


def test_a_record_of_before_ties_were_told_apart(model, tmp_path):
    run = run_for(tmp_path, model)
    assert keep_best(run, 0, {METRIC: 0.5}, model.params)
    record = tmp_path / "best" / "best.json"
    old = json.loads(record.read_text())
    del old["moved"], old["comparable"]
    record.write_text(json.dumps(old))
    assert read_best(tmp_path) == entry(0, 0.5)
    assert keep_best(run, 1, {METRIC: 0.5}, model.params) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 1}'])
def test_a_damaged_record_is_an_error(text, model, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "best.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"best.json is damaged; remove .*/best, and the next evaluation chooses"
    ):
        keep_best(run_for(tmp_path, model), 1, {METRIC: 0.5}, model.params)


# The directory


def test_the_directory_is_a_model(model, tmp_path):
    run = run_for(tmp_path, model)
    for step, factor in ((3, 1.5), (6, 0.5), (9, 0.25)):
        text = keep_best(run, step, {METRIC: step / 10}, scaled(model, factor))
        which = "the first" if step == 3 else "the best so far"
        assert text == f"step {step}: {METRIC} {step / 10} is {which}; the model is in {tmp_path}/best"
        assert bits(load_model(str(tmp_path / "best")).params) == bits(scaled(model, factor))
        assert read_best(tmp_path) == entry(step, step / 10, moved=step > 3)
        # Beside the link only what it points to.
        assert len([path for path in tmp_path.iterdir() if path.name.startswith("best.")]) == 1


@pytest.mark.parametrize("place", ["save_model", "replace", "rmtree"])
def test_a_kill_leaves_the_old_one_or_the_new_one(place, model, tmp_path, monkeypatch):
    run, calls = run_for(tmp_path, model), []
    assert keep_best(run, 1, {METRIC: 0.1}, scaled(model, 1))
    owner = {"save_model": best_module, "replace": os, "rmtree": shutil}[place]
    original = getattr(owner, place)

    def crashing(*args, **kwargs):
        if place == "save_model":
            original(*args, **kwargs)  # the files are there, the record is not
        calls.append(1)
        if place != "rmtree" or len(calls) == 2:  # the second removes what was replaced
            raise small_run.Crash
        return original(*args, **kwargs)

    with monkeypatch.context() as context:
        if place == "replace":  # not the one inside of save_model
            context.setattr(best_module, "os", SimpleNamespace(readlink=os.readlink, replace=crashing))
        else:
            context.setattr(owner, place, crashing)
        with pytest.raises(small_run.Crash):
            keep_best(run, 2, {METRIC: 0.2}, scaled(model, 2))
    new = place == "rmtree"
    assert read_best(tmp_path) == (entry(2, 0.2) if new else entry(1, 0.1, moved=False))
    assert bits(load_model(str(tmp_path / "best")).params) == bits(scaled(model, 2 if new else 1))
    assert keep_best(run, 3, {METRIC: 0.3}, scaled(model, 3))
    assert bits(load_model(str(tmp_path / "best")).params) == bits(scaled(model, 3))
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("best.")]) == 1


def test_a_copied_run_goes_on(model, tmp_path):
    """A copy may have directories for links."""
    assert keep_best(run_for(tmp_path / "run", model), 1, {METRIC: 0.1}, model.params)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert not (tmp_path / "copy" / "best").is_symlink()
    run = run_for(tmp_path / "copy", model)
    assert keep_best(run, 2, {METRIC: 0.05}, model.params) is None
    assert read_best(tmp_path / "copy") == entry(1, 0.1)
    assert keep_best(run, 3, {METRIC: 0.2}, scaled(model, 2))
    assert bits(load_model(str(tmp_path / "copy" / "best")).params) == bits(scaled(model, 2))


def test_forgetting_leaves_nothing(model, tmp_path):
    forget_best(tmp_path)
    assert keep_best(run_for(tmp_path / "run", model), 1, {METRIC: 0.1}, model.params)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "mine" / "best").mkdir(parents=True)
    for name, left in (("run", []), ("copy", []), ("mine", ["best"])):
        forget_best(tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == left


# The names


def test_names_are_those_that_evaluation_gives(model, tmp_path):
    changes = {
        "evaluation__category": "answer", "evaluation__num_samples": 3,
        "evaluation__rewards": "[{function: exact_match}]",
    }  # fmt: skip
    run = run_for(tmp_path, model, **changes)
    assert evaluation_names(run) == list(evaluate_run(run, model.params))
    assert {METRIC, "eval/mean@3", "eval/pass@2", "eval/rewards/exact_match_2/mean"} <= set(
        evaluation_names(run)
    )


def test_an_unknown_metric_is_an_error_before_training(tmp_path, monkeypatch):
    compiled = small_run.note_compilations(monkeypatch)
    with pytest.raises(ValueError) as caught:
        train(small_run.config(tmp_path / "run", checkpoints__best_metric="eval/mean@4"))
    assert str(caught.value) == (
        "checkpoints.best_metric: evaluation gives no 'eval/mean@4'; it gives eval/greedy_accuracy, "
        "eval/mean@2, eval/pass@2, eval/reward, eval/rewards/exact_match/mean, eval/mean_length, "
        "eval/clipped_ratio (evaluation.num_samples is the k of mean@k)"
    )
    assert not (tmp_path / "run").exists() and "generate" not in compiled
    with pytest.raises(ValueError, match="evaluation gives no 'reward'; it gives eval/greedy_accuracy,"):
        plan_main(["--checkpoints.best_metric=reward", "--sampling.max_new_tokens=5"])


def test_without_held_out_prompts_there_is_no_best(model, tmp_path):
    with pytest.raises(
        ValueError, match=f"best_metric: '{METRIC}' needs held-out prompts, and there are none"
    ):
        check_best_metric(run_for(tmp_path, model, evaluation__num_prompts=0))


# A run

RUN = settings(
    evaluation__every=1,
    evaluation__num_prompts=16,  # enough for steps to differ
    training__learning_rate=1e-3,
    checkpoints__every=1,
    checkpoints__keep=99,
    checkpoints__best_metric="eval/reward",
    checkpoints__best_mode="min",  # at this learning rate it falls: several steps are kept in turn
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("best") / "run"
    assert train(small_run.config(run_dir, **RUN)) == 0
    return run_dir


def test_a_run_keeps_its_best(whole):
    values = {row["step"]: row["eval/reward"] for row in small_run.rows(whole) if "eval/reward" in row}
    step = min(values, key=values.get)  # the first of equal ones
    assert len(values) == 8 and step > 2 and values[2] < values[1] < values[0]
    best = {"step": step, "metric": "eval/reward", "mode": "min", "value": values[step]}
    best |= {"moved": True, "comparable": True}
    assert read_best(whole) == best
    stored = small_run.leaves(whole, step)
    kept = load_model(str(whole / "best")).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
        assert stored[f".params{jax.tree_util.keystr(path)}"].tobytes() == np.asarray(leaf).tobytes()


def test_a_fresh_start_forgets_the_best_of_the_attempt_before(model, tmp_path):
    assert keep_best(run_for(tmp_path, model), 1, {METRIC: 2.0}, model.params)
    assert train(small_run.config(tmp_path, **settings(training__num_steps=1))) == 0
    assert read_best(tmp_path)["value"] <= 1


def test_evaluate_opens_it(whole, capsys):
    assert evaluate_main([f"--model={whole}/best", f"--config={whole}/config.yaml", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["eval/reward"] == read_best(whole)["value"]


def test_the_checkpoints_know_nothing_of_it(whole, tmp_path):
    config = small_run.config(tmp_path, **RUN)
    none = replace(config.checkpoints, best_metric=None, best_mode="max")
    assert train(replace(config, checkpoints=none)) == 0
    assert not (tmp_path / "best").exists()
    small_run.assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("evaluated", 1),  # of step 0: a fresh start
        ("updated", 2),  # an export, and no checkpoint
        ("evaluated", 5),
        ("save", 5),  # exported, perhaps, and not yet saved
        ("saved", 5),
        ("evaluation", 8),
    ],
)
def test_cut_anywhere(place, call, whole, tmp_path, monkeypatch):
    config = small_run.config(tmp_path, **RUN | {"checkpoints__every": 2})
    with monkeypatch.context() as context:
        small_run.crash_at(context, place, call)
        with pytest.raises(small_run.Crash):
            train_module.train(config)
    assert train_module.train(config) == 0
    small_run.assert_same_run(tmp_path, whole)
    assert read_best(tmp_path) == read_best(whole)
    mine, theirs = (load_file(run / "best" / "model.safetensors") for run in (tmp_path, whole))
    assert {name: value.tobytes() for name, value in mine.items()} == {
        name: value.tobytes() for name, value in theirs.items()
    }


# A metric that cannot move


GRADED = """
def graded(completions, answer, **columns):
    return [0.9 * (text == a) for text, a in zip(completions, answer)]

def short(completions, **columns):
    return [-float(len(text)) for text in completions]
"""


def graded_run(tmp_path, rewards, **changes):
    (tmp_path / "mine.py").write_text(GRADED)
    entries = ", ".join(f"{{function: '{tmp_path}/mine.py:{name}'}}" for name in rewards)
    run = {
        "rewards": f"[{entries}]",
        "training__num_steps": 2,
        "evaluation__every": 1,
        "checkpoints__best_metric": "eval/mean@2",
    }
    return small_run.config(tmp_path / "run", **run | changes)


@pytest.mark.parametrize(
    ("rewards", "changes", "words"),
    [
        (
            ["graded"],
            {},
            "no completion counts as correct: the largest value of graded is 0.9 and correct means 1 or more",
        ),
        (
            ["short", "graded"],
            {"evaluation__correct": "{reward: short}"},
            "no completion can count as correct: short gives at most -",
        ),
    ],
)
def test_the_untrained_model_is_not_the_best_for_a_metric_that_cannot_move(
    rewards, changes, words, tmp_path, capsys
):
    """Rewards of at most 0.9, or a penalty: mean@k stays 0 (data-11)."""
    assert train(graded_run(tmp_path, rewards, **changes)) == 0
    assert [row["eval/mean@2"] for row in small_run.rows(tmp_path / "run") if "eval/mean@2" in row] == [0] * 3
    assert read_best(tmp_path / "run")["step"] == 2
    out = " ".join(capsys.readouterr().out.split())
    assert out.count(words) == 1
    assert out.count("checkpoints.best_metric eval/mean@2 is 0 for every held-out completion") == 1
    assert "best so far" not in out


def test_a_threshold_of_its_own_lets_the_metric_move(tmp_path, capsys):
    config = graded_run(tmp_path, ["short", "graded"], evaluation__correct="{reward: graded, threshold: 0.9}")
    assert train(config) == 0
    rows = [row for row in small_run.rows(tmp_path / "run") if "eval/mean@2" in row]
    for row in rows:
        assert row["eval/mean@2"] == pytest.approx(row["eval/rewards/graded/mean"] / 0.9, rel=1e-6)
    assert rows[0]["eval/mean@2"] > 0 and "count as correct" not in capsys.readouterr().out
