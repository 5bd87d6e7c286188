"""The training command, end to end."""

import json
import os
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
import small_run

from grpo_jax.checkpoints.manager import Checkpoints
from grpo_jax.cli import run_command
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.models.directories import PACKAGED
from grpo_jax.models.loading import load_model
from grpo_jax.run import from_config
from grpo_jax.run import loop as run_loop
from grpo_jax.run.build import build
from grpo_jax.run.planning import make_plan
from grpo_jax.train import train


@pytest.fixture
def shared(monkeypatch):
    """Lets the runs of some tests share their compilations."""
    small_run.share_compilations(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("train") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_run.share_compilations(monkeypatch)
        assert train(small_run.config(run_dir)) == 0
    return run_dir


def rewards_from(directory, source: str) -> str:
    """Writes a reward file with a function `f`; returns the setting that names it."""
    (directory / "mine.py").write_text(source)
    return f"[{{function: '{directory}/mine.py:f'}}]"


def stopped(config, capsys) -> str:
    """Runs a config that ends in an error; returns the line."""
    with pytest.raises(SystemExit) as exited:
        run_command(lambda: train(config))
    err = capsys.readouterr().err
    assert exited.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


# What is written


def test_rows_of_a_run(run):
    rows = small_run.rows(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 7]
    assert [row["step"] for row in rows if "eval/greedy_accuracy" in row] == [0, 3, 6, 7]
    training = [row for row in rows if "loss" in row]
    names = {
        "reward", "reward_std", "frac_reward_zero_std", "rewards/exact_match/mean", "completions/mean_length",
        "completions/clipped_ratio", "sampling/logp_difference_max", "loss", "policy_loss", "kl", "entropy",
        "ratio/mean", "ratio/max", "grad_norm", "skipped_updates", "learning_rate", "num_tokens",
    }  # fmt: skip
    for row in training:
        assert names <= row.keys() and None not in row.values()
        assert row["sampling/logp_difference_max"] < 1e-4 and abs(row["ratio/max"] - 1) < 1e-4
    assert training[0]["kl"] == 0 and training[1]["kl"] > 0
    assert [row["learning_rate"] for row in training] == [pytest.approx(1e-4)] * 7
    tokens = np.diff([0, *(row["num_tokens"] for row in training)])
    for row, new in zip(training, tokens, strict=True):
        assert new == pytest.approx(32 * (6 + row["completions/mean_length"]))
    timed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["step_time"] > 0 and row["time/update"] > 0 for row in timed if "loss" in row)


def test_completions_of_a_run(run):
    rows = small_run.rows(run, "completions")
    assert [row["step"] for row in rows] == [2, 2, 4, 4, 6, 6, 7, 7]
    for row in rows:
        answer = sum(map(int, row["prompt"].rstrip("=").split("+")))
        assert row["rewards/exact_match"] == row["reward"] == float(row["completion"] == str(answer))


def test_exported_model_is_the_last_state(run):
    exported = load_model(str(run / "hf"))
    state = small_run.leaves(run)
    assert state[".step"] == 7
    for path, leaf in jax.tree_util.tree_leaves_with_path(exported.params):
        assert state[f".params{jax.tree_util.keystr(path)}"].tobytes() == np.asarray(leaf).tobytes()


def test_reference_is_the_model_of_the_start(run):
    packaged = load_model("packaged:arithmetic").params
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    try:
        assert checkpoints.steps() == [6, 7]  # keep: 2
        reference = checkpoints.restore_reference(packaged)
    finally:
        checkpoints.close()
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), reference, packaged)
    assert all(jax.tree.leaves(same))


def test_the_config_decides_everything(run, tmp_path, shared):
    assert train(small_run.config(tmp_path / "again")) == 0
    small_run.assert_same_run(tmp_path / "again", run)
    assert train(small_run.config(tmp_path / "other", training__seed=1, training__num_steps=1)) == 0
    assert small_run.rows(tmp_path / "other")[1]["reward"] != small_run.rows(run)[1]["reward"]


def test_every_rollout_has_its_own_prompts(tmp_path, shared):
    changes = {"training__num_steps": 6, "algorithm__num_iterations": 2, "tracking__completions_every": 1}
    config = small_run.config(tmp_path, **changes, tracking__num_completions=32, evaluation__num_prompts=0)
    assert train(config) == 0
    rows = small_run.rows(tmp_path, "completions")
    prompts = [{row["prompt"] for row in rows if row["step"] == step} for step in range(1, 7)]
    assert [len(p) for p in prompts] == [4] * 6
    assert prompts[0] == prompts[1] and prompts[2] == prompts[3] and prompts[4] == prompts[5]
    assert len(prompts[0] | prompts[2] | prompts[4]) == 12
    metrics = small_run.rows(tmp_path)
    assert metrics[0]["ratio/max"] == pytest.approx(1, abs=1e-4) and metrics[1]["ratio/max"] > 1.001


def test_every_rollout_has_its_own_noise(tmp_path, shared, monkeypatch):
    keys, collect = [], run_loop.collect

    def noting(actor, params, ref_params, draw, leftovers):
        keys.append(tuple(np.asarray(jax.random.key_data(draw(0)[1])).tolist()))
        return collect(actor, params, ref_params, draw, leftovers)

    monkeypatch.setattr(run_loop, "collect", noting)
    for seed in (0, 1):
        config = small_run.config(tmp_path / f"{seed}", training__seed=seed, evaluation__num_prompts=0)
        assert train(config) == 0
    assert len(keys) == len(set(keys)) == 2 * 7


# Compilations


def prompts_file(path, lengths, *, copies):
    texts = ["1" * (length - 2) + "+=" for length in lengths]
    rows = [{"prompt": text, "answer": "2"} for text in texts for _ in range(copies)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_program_compiles_once(tmp_path, monkeypatch, capsys):
    """Mixed lengths in two buckets: generation and scoring once each, train_step once, as the plan says."""
    data = {
        "data__train_file": prompts_file(tmp_path / "train.jsonl", (4, 7, 8, 9, 12, 14), copies=2),
        "data__eval_file": prompts_file(tmp_path / "eval.jsonl", (4, 15), copies=4),
        "rewards": "[{function: exact_match}]",
        "training__batch_size": 6,
        "algorithm__group_size": 3,
        "training__num_steps": 12,
    }
    config = small_run.config(tmp_path / "run", **data)
    plan = make_plan(build(config))
    assert plan.generate_shapes == (8, 14) and plan.num_compilations == 5
    compiled = small_run.note_compilations(monkeypatch)
    planned = from_config.make_plan

    def before_anything_compiles(run):
        assert not set(compiled) & set(small_run.PROGRAMS)
        return planned(run)

    monkeypatch.setattr(from_config, "make_plan", before_anything_compiles)
    assert train(config) == 0
    counts = Counter(compiled)
    assert counts["train_step"] == 1 and counts["completion_log_probs"] == 2
    assert counts["generate"] == 2 + plan.num_evaluation_compilations
    in_training = counts["generate"] - plan.num_evaluation_compilations
    assert in_training + counts["completion_log_probs"] + counts["train_step"] == plan.num_compilations
    assert plan.text() in capsys.readouterr().out
    # Logged as they come: all of training's after its last step.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    logged = [row["compilations"] for row in rows if "loss" in row]
    assert logged == sorted(logged) and logged[0] >= 2 and logged[-1] == plan.num_compilations


def test_a_continued_run_compiles_once_too(tmp_path, monkeypatch):
    # Restored arrays must look to jit like fresh ones.
    changes = {"algorithm__num_iterations": 2, "evaluation__num_prompts": 0}
    assert train(small_run.config(tmp_path, **changes, training__num_steps=3)) == 0
    compiled = small_run.note_compilations(monkeypatch)
    assert train(small_run.config(tmp_path, **changes, training__num_steps=6)) == 0
    counts = Counter(compiled)
    assert [counts[name] for name in small_run.PROGRAMS] == [1, 1, 1]


# Settings that must not matter, and some that must


def test_micro_batches_change_rounding_only(run, tmp_path, shared):
    changes = {"training__num_microbatches": 4, "training__num_steps": 2, "evaluation__num_prompts": 0}
    assert train(small_run.config(tmp_path, **changes)) == 0
    whole = [row for row in small_run.rows(run) if "loss" in row][:2]
    for sliced, row in zip(small_run.rows(tmp_path), whole, strict=True):
        assert sliced["reward"] == row["reward"]
        assert sliced["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
        assert sliced["kl"] == pytest.approx(row["kl"], abs=1e-5)


def test_bfloat16(tmp_path):
    changes = {"model__dtype": "bfloat16", "training__num_steps": 2, "evaluation__num_prompts": 0}
    assert train(small_run.config(tmp_path, **changes)) == 0
    for row in small_run.rows(tmp_path):
        assert row["skipped_updates"] == 0 and row["grad_norm"] > 0
        assert row["sampling/logp_difference_max"] < 0.2
    assert {leaf.dtype.name for leaf in small_run.leaves(tmp_path).values()} == {"float32", "int32"}


def test_conversations(tmp_path):
    """Messages go through the chat template; the reward gets a message."""
    shutil.copytree(PACKAGED / "arithmetic", tmp_path / "model")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    prompts = [{"prompt": [{"role": "user", "content": f"{a}+{a}"}]} for a in range(10, 18)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    rewards = rewards_from(
        tmp_path,
        "def f(prompts, completions):\n"
        "    assert all(c[0]['role'] == 'assistant' and len(c) == 1 for c in completions)\n"
        "    return [float(int(p[-1]['content'][:2]) * 2 == int(c[0]['content'] or 0))\n"
        "            for p, c in zip(prompts, completions)]\n",
    )
    changes = {"model__hf_model_name": tmp_path / "model", "data__train_file": tmp_path / "chat.jsonl"}
    assert train(small_run.config(tmp_path / "run", **changes, rewards=rewards, training__num_steps=1)) == 0
    (row,) = small_run.rows(tmp_path / "run")  # no evaluation without held-out prompts
    assert 0 < row["reward"] < 1


def test_dead_groups_are_no_update(tmp_path, shared, capsys):
    rewards = rewards_from(tmp_path, "def f(completions):\n    return [0.35] * len(completions)\n")
    changes = {"algorithm__kl_coef": 0, "training__num_steps": 2, "evaluation__num_prompts": 0}
    assert train(small_run.config(tmp_path / "run", **changes, rewards=rewards)) == 0
    assert capsys.readouterr().out.count("every group's rewards are equal") == 1
    for row in small_run.rows(tmp_path / "run"):
        assert row["loss"] == row["grad_norm"] == 0 and row["frac_reward_zero_std"] == 1
    packaged = load_model("packaged:arithmetic").params
    exported = load_model(str(tmp_path / "run" / "hf")).params
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), packaged, exported)))


def test_missing_rewards(tmp_path, shared):
    rewards = rewards_from(tmp_path, "def f(completions):\n    return [None] * len(completions)\n")
    config = small_run.config(tmp_path / "run", rewards=rewards, training__num_steps=2)
    assert train(config) == 0
    assert all(row["skipped_updates"] == 0 for row in small_run.rows(tmp_path / "run") if "loss" in row)


# Breaking down


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_five_skipped_updates_stop_the_run(num_iterations, tmp_path, capsys):
    """A learning rate that throws the weights out of float32: skipped, counted, stopped with a message."""
    changes = {
        "algorithm__num_iterations": num_iterations,
        "evaluation__num_prompts": 0,
        "checkpoints__every": 1,
    }
    config = small_run.config(tmp_path, **changes, training__learning_rate=1e38, training__num_steps=20)
    err = stopped(config, capsys)
    rows = small_run.rows(tmp_path)
    in_a_row = [row["skipped_updates_in_a_row"] for row in rows]
    assert in_a_row[-5:] == [1, 2, 3, 4, 5] and len(rows) < 20
    assert f"step {len(rows)}: loss or gradient was not finite 5 times in a row" in err
    assert "lower training.learning_rate" in err and f"checkpoints.resume: {tmp_path}" in err
    assert not (tmp_path / "hf").exists()
    # Started again it comes to the same end, from its last checkpoint, with the same rows.
    assert "5 times in a row" in stopped(config, capsys)
    assert small_run.rows(tmp_path) == rows


def test_skipped_updates_leave_the_state_alone(tmp_path, capsys, monkeypatch):
    original = run_loop.train_step

    def poisoned(state, experience, **kwargs):
        if int(state.step) in (1, 2):
            experience = experience.replace(advantages=experience.advantages * float("nan"))
        return original(state, experience, **kwargs)

    monkeypatch.setattr(run_loop, "train_step", poisoned)
    changes = {
        "training__num_steps": 4,
        "evaluation__num_prompts": 0,
        "checkpoints__every": 1,
        "checkpoints__keep": 9,
    }
    assert train(small_run.config(tmp_path, **changes)) == 0
    rows = small_run.rows(tmp_path)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 2, 2]
    assert [row["skipped_updates_in_a_row"] for row in rows] == [0, 1, 2, 0]
    states = {step: small_run.leaves(tmp_path, step) for step in (1, 3, 4)}
    params = [name for name in states[1] if name.startswith(".params") or name.startswith(".opt_state")]
    assert all(np.array_equal(states[1][name], states[3][name]) for name in params)
    assert not all(np.array_equal(states[3][name], states[4][name]) for name in params)
    assert "the update was skipped (1 so far)" in capsys.readouterr().out


# Learning


def test_learns_addition(tmp_path):
    """The main configuration for 40 updates: at least 20 points on problems never trained on."""
    config = parse_record(
        Config,
        [
            f"--config={small_run.ROOT}/configs/grpo_config.yaml",
            "--training.num_steps=40",
            "--evaluation.every=0",
            "--evaluation.num_prompts=256",
            f"--run_dir={tmp_path}",
        ],
        command="test",
        description="",
    )
    assert train(config) == 0
    before, after = (row for row in small_run.rows(tmp_path) if "eval/mean@4" in row)
    assert after["eval/mean@4"] >= before["eval/mean@4"] + 0.20
    assert after["eval/greedy_accuracy"] > before["eval/greedy_accuracy"]


def test_a_reward_that_hangs_costs_its_row_and_leaves_nobody_behind(tmp_path, shared, capsys):
    source = (
        "import os, time\n"
        "def f(completions):\n"
        f"    open('{tmp_path}/pids', 'a').write(f'{{os.getpid()}} ')\n"
        f"    if not os.path.exists('{tmp_path}/hung'):\n"
        f"        open('{tmp_path}/hung', 'w').close()\n"
        "        time.sleep(1000)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    rewards = rewards_from(tmp_path, source).replace("}", ", timeout: 2, rows_per_call: 8}")
    config = small_run.config(
        tmp_path / "run", rewards=rewards, evaluation__num_prompts=0, training__num_steps=2
    )
    assert train(config) == 0
    first, second = small_run.rows(tmp_path / "run")
    assert first["rewards/f/timeouts"] == first["rewards/f/missing"] == 8 / 32
    assert second["rewards/f/timeouts"] == second["rewards/f/missing"] == 0
    assert "its worker died: f (25.0%)" in capsys.readouterr().out
    assert len(gone(tmp_path / "pids")) == 2


def gone(file) -> set[str]:
    """Checks that no process that wrote its number into a file is there; returns the numbers."""
    pids = set(file.read_text().split())
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    return pids


def test_a_run_that_breaks_down_ends_its_workers(tmp_path, shared, monkeypatch):
    source = (
        "import os\n"
        "def f(completions):\n"
        f"    open('{tmp_path}/pids', 'a').write(f'{{os.getpid()}} ')\n"
        "    return [0.0] * len(completions)\n"
    )
    rewards = rewards_from(tmp_path, source).replace("}", ", timeout: 60}")
    small_run.crash_at(monkeypatch, "updated", 1)
    with pytest.raises(small_run.Crash) as caught:
        train(small_run.config(tmp_path / "run", rewards=rewards, evaluation__num_prompts=0))
    assert caught.tb is not None  # and with it everything that the run was made of
    assert len(gone(tmp_path / "pids")) == 1
