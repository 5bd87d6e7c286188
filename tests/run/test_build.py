"""A run, built from a config and checked before anything compiles."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_run

from grpo_jax.data.tasks import load_task
from grpo_jax.models.loading import load_model
from grpo_jax.objective.advantages import ADVANTAGES
from grpo_jax.objective.recipes import RECIPES
from grpo_jax.run import build as parts_module
from grpo_jax.run.build import build
from grpo_jax.train import train
from grpo_jax.types import Example


@pytest.fixture(scope="module")
def model():
    return load_model("packaged:arithmetic")


def prompts(path, *texts, **columns):
    rows = [{"prompt": text, "answer": "1", **columns} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def from_file(path, **changes):
    return {"data__train_file": path, "rewards": "[{function: exact_match}]", **changes}


def test_parts_of_the_main_task(tmp_path, model):
    run = build(small_run.config(tmp_path), model=model)
    assert run.model is model and run.config.num_prompts == 4 and run.num_steps == 7
    assert run.prompt_length == 6 and run.prompt_lengths == {6} and run.eval_prompt_length == 6
    assert len(run.task.train) == 7588 and len(run.task.evaluation) == 4 and run.num_dropped == 0
    assert [reward.name for reward in run.rewards] == ["exact_match"]
    actor = run.actor()
    assert (actor.group_size, actor.prompt_length, actor.max_new_tokens) == (8, 6, 5)
    state = run.init_state()
    assert state.step == 0 and jax.tree.structure(state.params) == jax.tree.structure(model.params)


def test_algorithm_settings_reach_the_recipe(tmp_path, model):
    changes = {
        "name": "dapo", "kl_coef": 0.3, "kl_estimator": "k1", "clip_range": 0.1, "clip_range_high": 0.4,
        "ratio_level": "sequence", "reduction": "constant", "advantage": "batch",
    }  # fmt: skip
    config = small_run.config(tmp_path, **{f"algorithm__{k}": v for k, v in changes.items()})
    recipe = build(config, model=model).recipe
    assert (recipe.name, recipe.kl_coef, recipe.kl_estimator.__name__) == ("dapo", 0.3, "kl_k1")
    assert recipe.clip == {"clip_range": 0.1, "clip_range_high": 0.4}
    assert (recipe.ratio_level, recipe.reduction) == ("sequence", "constant")
    assert recipe.advantage is ADVANTAGES["batch"]


def of_algorithm(tmp_path, **changes):
    settings = {name: value for name, value in changes.items() if "__" in name}
    algorithm = {f"algorithm__{name}": value for name, value in changes.items() if "__" not in name}
    return small_run.config(tmp_path, **algorithm, **settings)


def test_settings_around_the_loss_reach_the_recipe(tmp_path, model):
    changes = {
        "aggregation": "gdpo", "missing": "drop", "kl_on_dead_groups": False, "entropy_coef": 0.01,
        "top_entropy": 0.2, "max_staleness": 1.5, "importance_cap": 2.0, "mask_truncated": True,
        "overlong_buffer": 3, "dynamic_sampling": True,
    }  # fmt: skip
    run = build(of_algorithm(tmp_path, **changes, max_sampling_rounds=7), model=model)
    assert {name: getattr(run.recipe, name) for name in changes} == changes
    assert run.recipe.overlong_tokens(5) == 3 and run.actor().max_rounds == 7
    assert build(of_algorithm(tmp_path, name="dapo"), model=model).recipe == RECIPES["dapo"]
    off = {"name": "dapo", "overlong_buffer": 0, "dynamic_sampling": "false"}  # 0 and false are choices
    recipe = build(of_algorithm(tmp_path, **off), model=model).recipe
    assert recipe.overlong_tokens(5) == 0 and not recipe.dynamic_sampling


def test_parts_of_a_run_with_mini_batches(tmp_path, model):
    changes = {"num_minibatches": 3, "num_iterations": 2, "training__num_microbatches": 4}
    run = build(of_algorithm(tmp_path, **changes, training__num_steps="null"), model=model)
    assert run.config.num_prompts == 3 * 32 // 8 and run.config.updates_per_rollout == 6
    actor = run.actor()
    assert (actor.num_minibatches, actor.num_microbatches) == (3, 4)
    assert run.num_steps == 6 * -(-7588 // 12)  # one epoch, a rollout of 12 prompts at a time


def test_who_needs_the_reference(tmp_path, model):
    def needs(**changes):
        run = build(of_algorithm(tmp_path, **changes), model=model)
        return run.needs_reference, run.needs_ref_log_probs

    assert needs() == needs(name="rloo") == needs(kl_estimator="ratio_k3") == (True, True)
    assert needs(kl_estimator="exact") == (True, False)  # the update reads it
    assert needs(kl_coef=0) == needs(name="dapo") == (False, False)


CONTRADICTIONS = [
    (
        {"overlong_buffer": 6},
        "algorithm.overlong_buffer 6 is more than the 5 tokens of sampling.max_new_tokens; it counts the "
        "last tokens before that limit",
    ),
    (
        {"kl_target": 0.1, "kl_coef": 0},
        "algorithm.kl_target: 0.1 needs a KL term, but grpo has kl_coef 0; set algorithm.kl_coef above 0",
    ),
    (
        {"ref_sync_every": 2, "name": "dapo"},
        "algorithm.ref_sync_every: 2 needs a KL term, but dapo has kl_coef 0; set algorithm.kl_coef above 0",
    ),
    ({"cap": 2.0}, "algorithm: cap means nothing to clipped_surrogate, the surrogate of 'grpo'"),
    (
        {"name": "cispo", "clip_range": 0.2},
        "algorithm: clip_range means nothing to cispo_surrogate, the surrogate of 'cispo'",
    ),
    (
        {"kl_placement": "reward"},
        "algorithm: kl_placement: 'reward' adds up k1, so kl_estimator must be 'k1' with it",
    ),
    (
        {"name": "rloo", "kl_estimator": "exact"},
        "algorithm: kl_placement: 'reward' adds up k1, so kl_estimator must be 'k1' with it",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=lambda v: str(v)[:40])
def test_contradictions_are_one_line_before_anything_compiles(changes, message, tmp_path, model, monkeypatch):
    config = of_algorithm(tmp_path / "run", **changes)
    compiled = small_run.note_compilations(monkeypatch)
    with pytest.raises(ValueError) as caught:
        build(config, model=model)
    assert str(caught.value) == message and not compiled
    with pytest.raises(ValueError, match=message[:30].replace(".", r"\.")):
        train(config)
    assert not set(compiled) & set(small_run.PROGRAMS) and not (tmp_path / "run").exists()


def test_settings_reach_the_optimizer(tmp_path, model):
    run = build(
        small_run.config(tmp_path, training__lr_schedule="linear", training__warmup_steps=2), model=model
    )
    rates = [float(run.schedule(step)) for step in range(8)]
    np.testing.assert_allclose(rates, np.array([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0]) * 1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("weight_decay", 0.5),
        ("adam_b1", 0.5),
        ("adam_b2", 0.5),
        ("max_grad_norm", 1e-3),
        ("learning_rate", 1e-3),
    ],
)
def test_each_optimizer_setting_changes_the_update(setting, value, tmp_path, model):
    def second_update(**changes):
        optimizer = build(small_run.config(tmp_path, **changes), model=model).optimizer
        params = {"w": np.ones((2, 2), np.float32)}
        state = optimizer.init(params)
        for scale in (0.3, -0.05):
            updates, state = optimizer.update({"w": np.full((2, 2), scale, np.float32)}, state, params)
        return np.asarray(updates["w"])

    assert not np.allclose(second_update(**{f"training__{setting}": value}), second_update(), rtol=1e-3)


def test_prompts_too_long(tmp_path, model):
    path = prompts(tmp_path / "a.jsonl", "1+1=", "1+" * 14 + "1=", "2+2=")
    message = r"1 of 3 training prompts have more than 27 tokens \(the first is .*a\.jsonl, line 2 with 30\)"
    with pytest.raises(ValueError, match=message):
        build(small_run.config(tmp_path, **from_file(path)), model=model)
    run = build(small_run.config(tmp_path, **from_file(path, data__over_length="drop")), model=model)
    assert [e.prompt for e in run.task.train] == ["1+1=", "2+2="]
    assert run.num_dropped == 1 and run.prompt_length == 4
    run = build(small_run.config(tmp_path, **from_file(path, data__over_length="truncate_left")), model=model)
    assert [e.prompt for e in run.task.train] == ["1+1=", "+" + "1+" * 12 + "1=", "2+2="]
    assert (run.num_dropped, run.num_truncated, run.prompt_lengths) == (0, 1, {4, 27})


def test_default_rewards_bring_their_arguments(tmp_path, model, monkeypatch):
    task = load_task("addition")
    monkeypatch.setattr(
        parts_module,
        "load_data",
        lambda data, prompts=None: dataclasses.replace(task, train=[Example("1+1=")] * 4),
    )
    with pytest.raises(ValueError, match="needs `answer`"):
        build(small_run.config(tmp_path), model=model)
    examples = [Example("1+1=", {"answer": "2"})] * 4
    monkeypatch.setattr(
        parts_module,
        "load_data",
        lambda data, prompts=None: dataclasses.replace(task, train=examples, evaluation=[]),
    )
    (reward,) = build(small_run.config(tmp_path), model=model).rewards
    assert (reward.name, reward.arguments) == ("numeric_answer", {"which": "first"})
    given = small_run.config(tmp_path, rewards="[{function: numeric_answer}]")
    assert build(given, model=model).rewards[0].arguments == {}


def test_a_task_of_a_name_and_its_arguments(tmp_path, model):
    changes = {"data__task": "countdown", "data__task_arguments": "{size: 40, held_out: 8}"}
    template = {"data__prompt_template": "{{ numbers | join('+') }}={{ target }}"}
    run = build(small_run.config(tmp_path, **changes, **template), model=model)
    assert len(run.task.train) == 40 and [reward.name for reward in run.rewards] == ["countdown"]
    assert set("".join(e.prompt for e in run.task.train)) <= set("0123456789+=")


def test_held_out_prompts_too_long(tmp_path, model):
    train_file = prompts(tmp_path / "a.jsonl", "1+1=")
    changes = from_file(train_file, data__eval_file=prompts(tmp_path / "b.jsonl", "1+" * 14 + "1=", "1+1="))
    with pytest.raises(ValueError, match=r"1 of 2 evaluation prompts have more than 27 tokens"):
        build(small_run.config(tmp_path, **changes), model=model)
    run = build(small_run.config(tmp_path, **changes, evaluation__num_prompts=1), model=model)
    assert len(run.task.evaluation) == 1 and run.eval_prompt_length == 4
    run = build(small_run.config(tmp_path, **changes, data__over_length="drop"), model=model)
    assert len(run.task.evaluation) == 1 and run.num_dropped == 0  # of the training prompts


def test_columns_are_checked_in_both_files(tmp_path, model):
    good, bad = prompts(tmp_path / "a.jsonl", "1+1="), tmp_path / "b.jsonl"
    bad.write_text('{"prompt": "1+1=", "target": "2"}\n')
    for changes in (from_file(bad), from_file(good, data__eval_file=bad)):
        with pytest.raises(ValueError, match=r"reward `exact_match` .*needs `answer`.*columns: `target`"):
            build(small_run.config(tmp_path, **changes), model=model)


def test_a_model_without_a_limit(tmp_path, model):
    endless = dataclasses.replace(model, max_positions=None)
    path = prompts(tmp_path / "a.jsonl", "1+" * 40 + "1=")
    config = small_run.config(tmp_path, **from_file(path, sampling__max_new_tokens=500))
    assert build(config, model=endless).prompt_length == 82
    with pytest.raises(ValueError, match="more than 10 tokens"):
        build(
            dataclasses.replace(config, data=dataclasses.replace(config.data, max_prompt_length=10)),
            model=endless,
        )


BAD_GOLDS = ["no real solution", None, float("nan"), ["a", "b"], True, ""]


@pytest.mark.parametrize("gold", BAD_GOLDS, ids=str)
def test_one_bad_gold_is_named_before_the_model_is_loaded(tmp_path, gold):
    """Seen: six of ten steps, then an error without file or line, at every restart (case data-01)."""
    rows = [{"prompt": "1+1=", "answer": "2"}] * 5
    rows[3] = {"prompt": "1+1=", "answer": gold}
    path, good = tmp_path / "a.jsonl", tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good.write_text(json.dumps(rows[0]) + "\n")
    settings = {"rewards": "[{function: numeric_answer}]", "model__hf_model_name": "/no/such/model"}
    message = r"a\.jsonl, line 4: reward `numeric_answer`: .*\(1 of 5 (\w+) rows; data\.on_bad_row: drop leav"
    for files, what in (({"data__train_file": path}, "training"), ({"data__eval_file": path}, "evaluation")):
        config = small_run.config(tmp_path / "run", **{"data__train_file": good, **settings, **files})
        with pytest.raises(ValueError, match=message) as caught:
            build(config)
        assert f" {what} rows" in str(caught.value)


def test_rows_with_a_bad_gold_can_be_dropped(tmp_path, model):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1) if i % 3 else None} for i in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = {"data__train_file": path, "data__eval_file": path, "evaluation__num_prompts": 9}
    rewards = "[{function: numeric_answer}]"
    run = build(small_run.config(tmp_path, **both, rewards=rewards, data__on_bad_row="drop"), model=model)
    prompts_left = [example.prompt for example in run.task.train]
    assert prompts_left == [row["prompt"] for row in rows if row["answer"]]
    assert [example.prompt for example in run.task.evaluation] == prompts_left
    about = [note for note in run.notes if "left out" in note]
    for note, what in zip(about, ("training", "evaluation"), strict=True):
        assert note.startswith(
            f"3 of 9 {what} rows are left out (data.on_bad_row: drop): {path}, line 1: rew"
        )
        assert "; line 4: the same; line 7: the same" in note
    # Rewards that are only logged check the held-out rows alone.
    logged = {
        "rewards": "[{function: length_penalty, arguments: {target: 3}}]",
        "evaluation__rewards": rewards,
    }
    with pytest.raises(ValueError, match=r"line 1: reward `numeric_answer`: .* \(3 of 9 evaluation rows; "):
        build(small_run.config(tmp_path, **both, **logged), model=model)
