"""Evaluation: the model against a direct computation, by category, by rewards of its own; the command."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from safetensors.numpy import load_file, save_file

from grpo_jax import evaluate as command
from grpo_jax.cli import run_command
from grpo_jax.data.held_out import sample_held_out
from grpo_jax.data.tasks import load_task
from grpo_jax.evaluation.categories import rows_by_category
from grpo_jax.evaluation.outcomes import observe, summarize
from grpo_jax.models.loading import decode, encode, load_model, pad_prompts
from grpo_jax.policy.decoding import generate
from grpo_jax.rewards.loading import Reward
from grpo_jax.run.build import build
from grpo_jax.run.evaluation import evaluate_run
from grpo_jax.train import train
from grpo_jax.types import Example

SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
EXAMPLES = sample_held_out(load_task("arithmetic").evaluation, 10)


def match(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def length(completions):
    return [None if len(c) == 3 else len(c) / 2 for c in completions]


def wrong(completions, answer):
    return [1 - value for value in match(completions, answer)]


REWARDS = (
    Reward(name="match", function=match),
    Reward(name="length", function=length, weight=2.0),
)


@pytest.fixture(scope="module")
def model():
    return load_model("packaged:arithmetic")


@pytest.fixture(scope="module")
def results(model):
    return evaluate_with(model)


def evaluate(model, params, examples, rewards, *, eval_rewards=(), categories=None, **settings):
    """Observes and summarizes, as `evaluate_run` does for a run."""
    outcome = observe(model, params, examples, rewards, eval_rewards=eval_rewards, **settings)
    return summarize(outcome, [*rewards, *eval_rewards], categories or {})


def evaluate_with(model, **changes):
    arguments = {"num_samples": 4, "max_new_tokens": 5, "sampling": SAMPLING, "batch_size": 40} | changes
    return evaluate(model, model.params, EXAMPLES, REWARDS, **arguments)


def test_against_a_direct_computation(model, results):
    """One prompt at a time, unpadded, through the model itself."""
    greedy, sampled = [], []
    key = jax.random.fold_in(jax.random.key(0), 2**31 - 1)
    for i, example in enumerate(EXAMPLES):
        sequences = encode(model, [example.prompt])
        prompts = pad_prompts(sequences, len(sequences[0]))
        for texts, group_size, temperature in ((greedy, 1, 0.0), (sampled, 4, 1.0)):
            rollout = generate(
                model.policy, model.params, prompts, key, group_size=group_size, max_new_tokens=5,
                eos_ids=jnp.asarray(model.eos_ids), temperature=temperature, first_row=i * group_size,
            )  # fmt: skip
            texts += decode(model, np.asarray(rollout.tokens), np.asarray(rollout.mask))
    answers = [example.columns["answer"] for example in EXAMPLES]
    correct = np.array(match(sampled, [a for a in answers for _ in range(4)])).reshape(10, 4)
    lengths = np.array([np.nan if len(t) == 3 else len(t) / 2 for t in sampled])
    assert results["eval/greedy_accuracy"] == np.mean(match(greedy, answers))
    assert results["eval/mean@4"] == results["eval/rewards/match/mean"] == correct.mean()
    assert results["eval/pass@4"] == correct.any(axis=1).mean()
    pairs = [correct[:, [i, j]].any(axis=1) for i in range(4) for j in range(i)]
    assert results["eval/pass@2"] == pytest.approx(np.mean(pairs))
    assert "eval/pass@1" not in results  # that is mean@4
    assert results["eval/rewards/length/mean"] == pytest.approx(np.nanmean(lengths))
    assert results["eval/rewards/length/missing"] == pytest.approx(np.isnan(lengths).mean()) != 0
    assert "eval/rewards/match/missing" not in results
    total = correct.reshape(-1) + 2 * np.nan_to_num(lengths)
    # A sample without a length does not count where its siblings have one.
    judged = ~np.isnan(lengths.reshape(10, 4))
    counts = judged | ~judged.any(axis=1, keepdims=True)
    assert results["eval/reward"] == pytest.approx(total[counts.reshape(-1)].mean(), rel=1e-6)
    assert results["eval/clipped_ratio"] == 0.0
    assert results["eval/mean_length"] == pytest.approx(np.mean([len(t) for t in sampled]) + 1)  # and the eos
    assert 0 < results["eval/mean@4"] < 1  # the test can tell


@pytest.mark.parametrize("batch_size", [12, 1])
def test_batch_size_changes_nothing(batch_size, model, results):
    # 12: three prompts a time, and the last part is filled up; 1: less than one group.
    assert evaluate_with(model, batch_size=batch_size) == results


def test_padding_changes_nothing(model, results):
    assert evaluate_with(model, prompt_length=20) == results


def test_the_seed_decides(model, results):
    assert evaluate_with(model) == results
    other = evaluate_with(model, seed=1)
    assert other != results and other["eval/greedy_accuracy"] == results["eval/greedy_accuracy"]


def test_settings_are_traced(model, results, monkeypatch):
    compiled = small_run.note_compilations(monkeypatch)
    cold = evaluate_with(model, sampling={**SAMPLING, "top_k": 1})
    assert cold["eval/mean@4"] == cold["eval/pass@4"] == results["eval/greedy_accuracy"]
    assert "generate" not in compiled


def test_missing_rewards_are_not_correct(model):
    def never(completions):
        return [None] * len(completions)

    got = evaluate(
        model, model.params, EXAMPLES, (Reward(name="never", function=never),), num_samples=4,
        max_new_tokens=5, sampling=SAMPLING, batch_size=40,
    )  # fmt: skip
    assert (
        got["eval/greedy_accuracy"] == got["eval/mean@4"] == got["eval/pass@4"] == got["eval/reward"] == 0.0
    )
    assert "eval/rewards/never/mean" not in got


def test_results_of_each_category_are_those_of_its_prompts_alone(model, results):
    rows = {"odd": [1, 3, 4], "even": [0, 2, 5, 6, 7, 8, 9]}
    got = evaluate_with(model, categories=rows)
    assert {name: got[name] for name in results} == results
    assert set(got) - set(results) == {
        f"eval/{category}/{name}" for category in rows for name in ("greedy_accuracy", "mean@4", "pass@4")
    }
    for name in ("greedy_accuracy", "mean@4", "pass@4"):
        parts = [got[f"eval/{category}/{name}"] * len(indices) for category, indices in rows.items()]
        assert sum(parts) / 10 == pytest.approx(results[f"eval/{name}"])
    # A prefix of the prompts has the same noise alone.
    first = {"num_samples": 4, "max_new_tokens": 5, "sampling": SAMPLING, "batch_size": 40}
    alone = evaluate(model, model.params, EXAMPLES[:3], REWARDS, **first)
    got = evaluate_with(model, categories={"first": [0, 1, 2]})
    for name in ("greedy_accuracy", "mean@4", "pass@4"):
        assert got[f"eval/first/{name}"] == alone[f"eval/{name}"]


def test_rewards_of_evaluation_decide_and_do_not_add_up(model, results):
    judges = [Reward(name=f"judge_{i}", function=f) for i, f in enumerate((wrong, length))]
    got = evaluate_with(model, eval_rewards=judges)
    assert got["eval/mean@4"] == got["eval/rewards/judge_0/mean"] == pytest.approx(1 - results["eval/mean@4"])
    assert got["eval/greedy_accuracy"] == pytest.approx(1 - results["eval/greedy_accuracy"])
    assert got["eval/rewards/judge_1/mean"] == results["eval/rewards/length/mean"]
    for name in ("eval/reward", "eval/rewards/match/mean", "eval/rewards/length/mean"):
        assert got[name] == results[name]


def test_a_configs_temperature_rewards_and_category(model, results, tmp_path):
    """By way of the config: the temperature is that of evaluation alone, and names stay apart."""
    changes = {
        "evaluation__temperature": 1e-6, "evaluation__category": "answer", "evaluation__num_prompts": 10,
        "evaluation__rewards": "[{function: exact_match}]",
    }  # fmt: skip
    run = build(small_run.config(tmp_path, **changes), model=model)
    assert [reward.name for reward in (*run.rewards, *run.eval_rewards)] == [
        "exact_match",
        "exact_match_2",
    ]
    assert run.sampling["temperature"] == 1.0
    got = evaluate_run(run, model.params)
    assert got["eval/mean@2"] == got["eval/greedy_accuracy"] == results["eval/greedy_accuracy"]
    assert (
        got["eval/rewards/exact_match_2/mean"] == got["eval/rewards/exact_match/mean"] == got["eval/mean@2"]
    )
    answers = [example.columns["answer"] for example in EXAMPLES]
    assert {f"eval/{answer}/mean@2" for answer in answers} <= set(got)


def test_a_reward_of_evaluation_has_no_weight(model, tmp_path):
    changes = {"evaluation__rewards": "[{function: exact_match, weight: 2}]"}
    with pytest.raises(
        ValueError, match=r"evaluation.rewards: exact_match has the weight 2.0, but these rewards"
    ):
        build(small_run.config(tmp_path, **changes), model=model)


def test_a_reward_of_evaluation_needs_its_columns_only_there(model, tmp_path):
    train_file, eval_file = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train_file.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)
    eval_file.write_text('{"prompt": "1+1=", "answer": "2", "truth": "2"}\n')
    (tmp_path / "mine.py").write_text("def f(completions, truth):\n    return [1.0] * len(completions)\n")
    changes = {
        "data__train_file": train_file, "data__eval_file": eval_file, "rewards": "[{function: exact_match}]",
        "evaluation__rewards": f"[{{function: '{tmp_path}/mine.py:f'}}]",
    }  # fmt: skip
    assert build(small_run.config(tmp_path, **changes), model=model).eval_rewards[0].name == "f"
    eval_file.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    with pytest.raises(ValueError, match="needs `truth`, which is neither a column"):
        build(small_run.config(tmp_path, **changes), model=model)


def test_no_examples(model):
    with pytest.raises(ValueError, match="evaluation needs at least one held-out prompt; there are none"):
        evaluate(model, model.params, [], REWARDS, num_samples=1, max_new_tokens=5, sampling=SAMPLING)


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_run.share_compilations(monkeypatch)
        assert train(small_run.config(run_dir, training__num_steps=2)) == 0
    return run_dir


def printed_json(capsys, *argv):
    assert command.main([*map(str, argv), "--json=true"]) == 0
    return json.loads(capsys.readouterr().out)


def test_command_on_a_run_repeats_its_last_evaluation(run, capsys):
    last = small_run.rows(run)[-1]
    got = printed_json(capsys, f"--model={run}")
    assert got == {"model": str(run), "num_prompts": 4, **{k: v for k, v in last.items() if k != "step"}}


def test_command_on_an_exported_model(run, capsys, tmp_path):
    same = printed_json(capsys, f"--model={run}/hf", f"--config={run}/config.yaml")
    assert same == {**printed_json(capsys, f"--model={run}"), "model": f"{run}/hf"}


def test_command_with_options(run, capsys):
    got = printed_json(capsys, f"--model={run}", "--num_prompts=6", "--num_samples=3", "--seed=5")
    assert got["num_prompts"] == 6 and {"eval/mean@3", "eval/pass@3"} <= set(got)
    cold = printed_json(capsys, f"--model={run}", "--num_prompts=6", "--num_samples=3", "--temperature=1e-6")
    assert cold["eval/mean@3"] == cold["eval/pass@3"] == cold["eval/greedy_accuracy"]


def test_command_prints_lines(run, capsys):
    assert command.main([f"--model={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run} on 4 held-out prompts"
    assert lines[1].split() == ["greedy_accuracy", f"{small_run.rows(run)[-1]['eval/greedy_accuracy']:.4f}"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--num_prompts=0"],
            "error: there are no held-out prompts; give data.eval_file, and num_prompts above 0",
        ),
        (["--num_samples=0"], "error: evaluation.num_samples: 0; it must be at least 1"),
        (["--temperature=-1"], "error: sampling.temperature: -1.0;"),
        (["--config=nowhere.yaml"], "error: --config: File does not exist"),
        (["--model=/nowhere/model"], "error: FileNotFoundError: /nowhere/model: no such directory"),
    ],
)
def test_command_errors(argv, message, run, capsys):
    with pytest.raises(SystemExit) as exited:
        run_command(lambda: command.main([f"--model={run}", *argv]))
    err = capsys.readouterr().err
    assert exited.value.code == 2 and err.startswith(message) and err.count("\n") == 1


# Two models compared


def test_comparison_of_a_model_with_a_run(run, capsys):
    settings = ("--num_prompts=40", "--num_samples=3", f"--config={run}/config.yaml")
    got = printed_json(capsys, "--model=packaged:arithmetic", f"--baseline={run}", *settings)
    mine = printed_json(capsys, "--model=packaged:arithmetic", *settings)
    theirs = printed_json(capsys, f"--model={run}", *settings)
    difference, baseline = got.pop("difference"), got.pop("baseline")
    assert got == mine
    del theirs["num_prompts"]
    assert baseline == theirs
    assert set(difference) == {"eval/greedy_accuracy", "eval/mean@3", "eval/reward"}
    for name, figures in difference.items():
        assert figures["value"] == pytest.approx(mine[name] - theirs[name], abs=1e-6)
        assert figures["low"] <= figures["value"] <= figures["high"]
    assert difference["eval/mean@3"]["low"] < difference["eval/mean@3"]["high"]


def test_a_model_does_not_differ_from_itself(run, capsys):
    argv = [f"--model={run}", f"--baseline={run}/hf", "--num_prompts=20"]
    difference = printed_json(capsys, *argv)["difference"]
    assert all(figures == {"value": 0, "low": 0, "high": 0} for figures in difference.values())
    assert command.main(argv) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{run} minus {run}/hf on 20 held-out prompts, with 95 % intervals"
    assert [line.split()[:4] for line in lines] == [
        [name, "+0.0000", "[+0.0000,", "+0.0000]"] for name in ("greedy_accuracy", "mean@2", "reward")
    ]
    greedy = printed_json(capsys, *argv)["eval/greedy_accuracy"]
    assert lines[0].split()[4:] == [f"{greedy:.4f}", "against", f"{greedy:.4f}"]


def test_what_the_figures_cannot_tell_is_said(run, capsys, tmp_path):
    """A threshold that nothing reaches: one line per model, and none where completions are told apart."""
    content = {
        "sampling": {"max_new_tokens": 5},
        "evaluation": {"num_prompts": 4, "num_samples": 2, "batch_size": 8, "correct": {"threshold": 1.5}},
    }
    config = small_run.write_yaml(tmp_path / "c.yaml", content)
    words = "no completion counts as correct: the largest value of exact_match is 1.0 and correct means 1.5"
    argv = [f"--model={run}", f"--config={config}"]
    (note,) = printed_json(capsys, *argv)["notes"]
    assert note.startswith(words)
    assert command.main(argv) == 0 and f"note: {words}" in capsys.readouterr().out
    both = [*argv, f"--baseline={run}/hf"]
    mine, theirs = printed_json(capsys, *both)["notes"]
    assert mine.startswith(f"{run}: {words}") and theirs.startswith(f"{run}/hf: {words}")
    assert command.main(both) == 0 and capsys.readouterr().out.count("note: ") == 2
    assert "notes" not in printed_json(capsys, f"--model={run}")


def test_different_prompts_are_not_compared(run, tmp_path):
    """One of the models has no room for one of the prompts."""
    short = tmp_path / "short"
    shutil.copytree(run / "hf", short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "n_positions": 16, "n_ctx": 16}))
    tensors = load_file(short / "model.safetensors")
    cut = {name: value[:16] if "wpe" in name else value for name, value in tensors.items()}
    save_file(cut, short / "model.safetensors", metadata={"format": "pt"})
    prompts = tmp_path / "prompts.jsonl"
    texts = ["11+11=", "1+1+1+1+1+1+1+1="]
    prompts.write_text("".join(json.dumps({"prompt": text, "answer": "2"}) + "\n" for text in texts))
    content = {
        "data": {"train_file": str(prompts), "eval_file": str(prompts), "over_length": "drop"},
        "rewards": [{"function": "exact_match"}],
        "sampling": {"max_new_tokens": 5},
    }
    config = small_run.write_yaml(tmp_path / "c.yaml", content)
    argv = [f"--model={run}", f"--baseline={short}", f"--config={config}"]
    with pytest.raises(
        ValueError, match="drop different prompts as too long, so they cannot be compared; set"
    ):
        command.main(argv)


# Categories


def with_column(*values):
    return [Example("1+1=", {"kind": value}) for value in values]


def test_rows_by_category():
    examples = with_column("b", "a/c", 3, True, "b", "3")
    assert rows_by_category(examples, "kind") == {"b": [0, 4], "a_c": [1], "3": [2, 5], "True": [3]}
    assert rows_by_category(examples, None) == rows_by_category([], "kind") == {}
    assert len(rows_by_category(with_column(*range(20)), "kind")) == 20


@pytest.mark.parametrize(
    ("examples", "column", "message"),
    [
        (
            with_column("a"),
            "knd",
            "evaluation.category: 'knd' is no column of the held-out prompts, which have `kind`",
        ),
        ([Example("1+1=", {})], "kind", "'kind' is no column of the held-out prompts, which have none"),
        (
            with_column("a", None),
            "kind",
            "`kind` of held-out prompt 1 is None; a category is a text, a number",
        ),
        (with_column(["a"]), "kind", r"`kind` of held-out prompt 0 is \['a'\]; a category"),
        (with_column(""), "kind", "`kind` of held-out prompt 0 is ''; a category"),
        (
            with_column(*range(21)),
            "kind",
            "`kind` has 21 values among 21 held-out prompts; 20 at most",
        ),
    ],
)
def test_what_is_no_category(examples, column, message):
    with pytest.raises(ValueError, match=message):
        rows_by_category(examples, column)
