"""Settings that do nothing: refused by a table, or said in a line; and none that does something."""

import itertools
import re

import pytest
import small_run

from grpo_jax.config.inert_settings import _REFUSED
from grpo_jax.models.loading import load_model
from grpo_jax.run.build import build

ONE = "[{function: exact_match}]"
TWO = "[{function: exact_match}, {function: exact_match, weight: 0.5}]"


@pytest.fixture(scope="module")
def model():
    return load_model("packaged:arithmetic")


def notes(tmp_path, model, **changes) -> list[str]:
    return list(build(small_run.config(tmp_path, **changes), model=model).notes)


# key, what does nothing, what makes it do something, what the message names
CASES = [
    ("algorithm.kl_adaptation", "0.2", {"algorithm.kl_target": 0.1}, "algorithm.kl_target"),
    ("algorithm.ref_mixup_alpha", "0.5", {"algorithm.ref_sync_every": 4}, "algorithm.ref_sync_every"),
    ("algorithm.max_sampling_rounds", "2", {"algorithm.dynamic_sampling": "true"}, "dynamic_sampling"),
    ("algorithm.max_sampling_rounds", "2", {"algorithm.name": "dapo"}, "dynamic_sampling"),
    ("algorithm.missing", "skip", {"rewards": TWO}, "a second reward"),
    ("algorithm.missing", "renormalize", {"rewards": TWO}, "a second reward"),
    ("algorithm.aggregation", "normalize_then_sum", {"rewards": TWO}, "a second reward"),
    ("algorithm.aggregation", "normalize_then_sum", {"algorithm.overlong_buffer": 2}, "a second reward"),
    ("data.few_shot_separator", "' '", {"data.few_shot": "[{prompt: '1+1=', completion: '2'}]"}, "few_shot"),
    ("checkpoints.best_mode", "min", {"checkpoints.best_metric": "eval/reward"}, "checkpoints.best_metric"),
    ("tracking.wandb_project", "mine", {"tracking.wandb": "true"}, "tracking.wandb"),
    ("tracking.wandb_name", "mine", {"tracking.wandb": "true"}, "tracking.wandb"),
]
NEEDS_KL = [
    ("kl_estimator", "k2", "kl_coef above 0"),
    ("kl_estimator", "ratio_k3", "kl_coef above 0"),
    ("kl_estimator", "exact", "kl_coef above 0"),
    ("kl_on_dead_groups", "false", "kl_coef above 0, or algorithm.entropy_coef"),
]


@pytest.mark.parametrize(("key", "value", "remedy", "message"), CASES, ids=str)
def test_a_setting_that_does_nothing_is_refused(key, value, remedy, message, tmp_path, model):
    changes = {"rewards": ONE, key: value}
    with pytest.raises(ValueError, match=rf"^{key}: .+ does nothing without .*{message}"):
        notes(tmp_path, model, **changes)
    notes(tmp_path, model, **changes | remedy)


@pytest.mark.parametrize(("key", "value", "message"), NEEDS_KL)
@pytest.mark.parametrize("without", [{"algorithm.kl_coef": 0}, {"algorithm.name": "dr_grpo"}], ids=str)
def test_settings_of_a_kl_need_one(key, value, message, without, tmp_path, model):
    changes = {f"algorithm.{key}": value, **without}
    with pytest.raises(ValueError, match=f"^algorithm.{key}: .+ does nothing without .*{message}"):
        notes(tmp_path, model, **changes)
    notes(tmp_path, model, **changes | {"algorithm.kl_coef": 0.1})


def test_a_kl_in_the_reward_needs_one(tmp_path, model):
    changes = {"algorithm.kl_placement": "reward", "algorithm.kl_estimator": "k1", "algorithm.kl_coef": 0}
    with pytest.raises(ValueError, match=r"algorithm.kl_\w+: .+ does nothing without a KL term"):
        notes(tmp_path, model, **changes)
    assert not notes(tmp_path, model, **changes | {"algorithm.kl_coef": 0.1})


def test_every_row_of_the_table_is_tried():
    tried = {key for key, *_ in CASES} | {f"algorithm.{key}" for key, *_ in NEEDS_KL}
    assert tried | {"algorithm.kl_placement"} == {f"{row.section}.{row.key}" for row in _REFUSED}


def test_what_is_the_default_or_does_something_is_silent(tmp_path, model):
    said_again = {
        "algorithm.kl_adaptation": 0.1, "algorithm.missing": "drop",
        "algorithm.aggregation": "sum_then_normalize", "algorithm.kl_coef": 0,
        "algorithm.kl_estimator": "k3", "algorithm.kl_on_dead_groups": "true",
        "checkpoints.best_mode": "max", "tracking.wandb_project": "grpo_jax",
    }  # fmt: skip
    assert notes(tmp_path, model, **said_again) == []
    # gdpo divides one reward by the batch; dead groups feel an entropy bonus.
    assert notes(tmp_path, model, **{"algorithm.aggregation": "gdpo"}) == []
    bonus = {"algorithm.kl_coef": 0, "algorithm.entropy_coef": 0.01, "algorithm.kl_on_dead_groups": "false"}
    assert notes(tmp_path, model, **bonus) == []


K1 = "algorithm.kl_estimator: k1 in the loss does not pull"
PASSES = "the surrogate `reinforce` corrects for no step"
SAID = [
    ({"algorithm.kl_estimator": "k1"}, K1),
    ({"algorithm.name": "rloo", "algorithm.num_iterations": 3}, f"{PASSES}.* makes 3 updates"),
    ({"algorithm.name": "reinforce", "algorithm.num_minibatches": 2}, f"{PASSES}.* makes 2 updates"),
    ({"training.num_epochs": 2}, "training.num_epochs: 2.0 does nothing, since training.num_steps: 7"),
    ({"training.warmup_steps": 100}, "training.warmup_steps: 100 is not less than the 7 steps"),
    ({"training.warmup_steps": 7}, "training.warmup_steps: 7 is not less than the 7 steps"),
    ({"algorithm.ref_sync_every": 7}, "algorithm.ref_sync_every: 7 does nothing: the run has 7 steps"),
    (
        {"evaluation.num_prompts": 0, "evaluation.temperature": 0.7},
        "evaluation.every, evaluation.num_samples, evaluation.temperature do nothing: evaluation.num_prompts",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), SAID, ids=lambda v: str(v)[:40])
def test_what_does_harm_or_nothing_is_said(changes, text, tmp_path, model):
    (line,) = notes(tmp_path, model, **changes)
    assert re.match(text, line), line


def test_evaluation_without_held_out_prompts_is_said(tmp_path, model):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "1{i}+1=", "answer": "1{i + 1}"}}\n' for i in range(4)))
    (line,) = notes(tmp_path, model, **{"data.train_file": path, "rewards": ONE, "evaluation.num_samples": 4})
    assert line == (
        "evaluation.every does nothing: there are no held-out prompts; give data.eval_file or "
        "data.eval_fraction"
    )


@pytest.mark.parametrize(
    ("name", "estimator"), [*itertools.product(("grpo", "rloo"), ("k1", "k2", "k3", "ratio_k1", "exact"))]
)
def test_k1_is_harmful_in_the_loss_alone(name, estimator, tmp_path, model):
    changes = {"algorithm.name": name, "algorithm.kl_estimator": estimator}
    if name == "rloo" and estimator != "k1":
        changes["algorithm.kl_placement"] = "loss"
    said = [line for line in notes(tmp_path, model, **changes) if line.startswith(K1)]
    assert bool(said) == (name == "grpo" and estimator == "k1")
