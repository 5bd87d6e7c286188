"""Evaluation: estimators against enumeration, the model against a direct computation, the command."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import evaluate as command
from grpo_jax.cli import run_command
from grpo_jax.decoding import generate
from grpo_jax.evaluate import evaluate, pass_at_k
from grpo_jax.models import decode, encode, load_model, pad_prompts
from grpo_jax.rewards import Reward
from grpo_jax.tasks import load_task
from grpo_jax.train import train

SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
EXAMPLES = load_task("arithmetic").evaluation[:10]


def match(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def length(completions):
    return [None if len(c) == 3 else len(c) / 2 for c in completions]


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


def evaluate_with(model, **changes):
    arguments = {"num_samples": 4, "max_new_tokens": 5, "sampling": SAMPLING, "batch_size": 40} | changes
    return evaluate(model, model.params, EXAMPLES, REWARDS, **arguments)


@settings(deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4),
            st.integers(1, n),
        )
    )
)
def test_pass_at_k_against_enumeration(case):
    correct, k = np.array(case[0], bool), case[1]
    subsets = list(itertools.combinations(range(correct.shape[1]), k))
    expected = np.mean([[row[list(subset)].any() for subset in subsets] for row in correct])
    assert pass_at_k(correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_edges():
    assert pass_at_k(np.array([[True] * 300, [False] * 300]), 200) == 0.5  # no overflow
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples per prompt; there are 3"):
            pass_at_k(np.ones((2, 3), bool), k)


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
    assert results["eval/rewards/length/mean"] == pytest.approx(np.nanmean(lengths))
    total = correct.reshape(-1) + 2 * np.nan_to_num(lengths)
    assert results["eval/reward"] == pytest.approx(total.mean(), rel=1e-6)
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
            "error: there are no held-out prompts: give data.eval_file, and num_prompts above 0",
        ),
        (["--num_samples=0"], "error: evaluation.num_samples: 0; at least 1"),
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
