"""The rehearsal: figures by hand, the same completions as evaluation would sample, the command end to end."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from grpo_jax import score as command
from grpo_jax.cli import run_command
from grpo_jax.config.parsing import parse_record
from grpo_jax.config.run import Config
from grpo_jax.data.loading import batch
from grpo_jax.models.loading import decode, encode, load_model, pad_prompts
from grpo_jax.objective.advantages import MISSING
from grpo_jax.policy.decoding import generate
from grpo_jax.run.build import build
from grpo_jax.run.rehearsal import advice, dead_group_share, rehearse, report, shown_samples
from grpo_jax.score import ScoreArguments
from grpo_jax.training.experience import add_up_rewards, make_experience
from grpo_jax.types import Judged, Rollout

REWARDS = """
def match(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]

def length(completions):
    return [None if len(c) == 2 else len(c) / 2 for c in completions]

def silent(completions):
    return [None] * len(completions)

def never(completions):
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def model():
    return load_model("packaged:arithmetic")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The setting that names reward functions of a file."""
    directory = tmp_path_factory.mktemp("score")
    (directory / "mine.py").write_text(REWARDS)

    def make(**weights):
        entries = [f"{{function: '{directory}/mine.py:{name}', weight: {w}}}" for name, w in weights.items()]
        return f"[{', '.join(entries)}]"

    return make


def run_for(model, **changes):
    # 3 prompts of 8 samples at a time: one compilation for all of this file
    return build(small_run.config("unused", evaluation__batch_size=24, **changes), model=model)


def printed_json(capsys, *argv):
    base = ["--sampling.max_new_tokens=5", "--num_prompts=6", "--num_samples=8", "--evaluation.batch_size=24"]
    assert command.main([*base, *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def without_times(figures):
    rewards = {
        name: {k: v for k, v in reward.items() if k != "seconds_per_call"}
        for name, reward in figures["rewards"].items()
    }
    return {**{k: v for k, v in figures.items() if k != "tokens_per_second"}, "rewards": rewards}


# What is sampled and judged


@pytest.fixture(scope="module")
def rehearsal(model, mine):
    run = run_for(model, rewards=mine(match=1.0, length=2.0), algorithm__missing="skip")
    return run, rehearse(run, num_prompts=5, num_samples=8)


def test_completions_against_a_direct_computation(model, rehearsal):
    """One prompt at a time, unpadded, through the model itself."""
    run, got = rehearsal
    examples = batch(run.task.train, seed=0, step=0, num_prompts=5)
    key, texts = jax.random.fold_in(jax.random.key(0), 2**31 - 1), []
    for i, example in enumerate(examples):
        sequences = encode(model, [example.prompt])
        rollout = generate(
            model.policy, model.params, pad_prompts(sequences, len(sequences[0])), key, group_size=8,
            max_new_tokens=5, eos_ids=jnp.asarray(model.eos_ids), temperature=1.0, first_row=i * 8,
        )  # fmt: skip
        texts += decode(model, np.asarray(rollout.tokens), np.asarray(rollout.mask))
    assert got.examples == examples and got.texts == texts
    answers = [example.columns["answer"] for example in examples for _ in range(8)]
    matches = np.array([float(t == a) for t, a in zip(texts, answers, strict=True)])
    lengths = np.array([np.nan if len(t) == 2 else len(t) / 2 for t in texts])
    np.testing.assert_array_equal(got.scores, np.stack([matches, lengths], axis=1))
    np.testing.assert_allclose(got.rewards, matches + 2 * np.nan_to_num(lengths))
    assert got.valid.all() and got.finished.all()
    np.testing.assert_array_equal(got.lengths, [len(t) + 1 for t in texts])  # and the eos
    assert got.tokens_per_second > 0 and set(got.seconds_per_call) == {"match", "length"}
    assert got.rows_per_call == 32
    assert 0 < matches.mean() < 1 and np.isnan(lengths).any()  # the test can tell


def test_figures_against_loops(rehearsal):
    run, got = rehearsal
    figures = report(run, got)
    groups, correct = got.rewards.reshape(5, 8), (got.scores[:, 0] == 1).reshape(5, 8)
    for size in (2, 4, 8):
        subsets = [list(subset) for subset in itertools.combinations(range(8), size)]
        dead = [[len(set(row[subset])) == 1 for subset in subsets] for row in groups]
        assert figures["dead_groups"][str(size)] == pytest.approx(np.mean(dead))
    assert list(figures["dead_groups"]) == ["2", "4", "8"]
    for k in (1, 2, 4, 8):
        subsets = [list(subset) for subset in itertools.combinations(range(8), k)]
        right = [[row[subset].any() for subset in subsets] for row in correct]
        assert figures["pass@k"][str(k)] == pytest.approx(np.mean(right))
    there = got.scores[:, 1][~np.isnan(got.scores[:, 1])].astype(float)
    expected = {
        "weight": 2.0, "mean": there.mean(), "std": there.std(ddof=1), "min": there.min(),
        "25%": np.quantile(there, 0.25), "50%": np.median(there), "75%": np.quantile(there, 0.75),
        "max": there.max(), "missing": 1 - len(there) / 40,
    }  # fmt: skip
    found = figures["rewards"]["length"]
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    totals = got.rewards.astype(float)
    width = (totals.max() - totals.min()) / 8
    part = [min(int((x - totals.min()) / width), 7) for x in totals]
    assert figures["total"]["histogram"] == [part.count(i) for i in range(8)]
    assert figures["total"]["mean"] == pytest.approx(got.rewards.mean())
    assert figures["total"]["missing"] == 0 and figures["clipped_ratio"] == 0
    assert figures["mean_length"] == got.lengths.mean()


@pytest.mark.parametrize("missing", ["skip", "drop"])
def test_missing_rewards_are_treated_as_in_training(missing, model, mine):
    run = run_for(model, rewards=mine(match=1.0, length=1.0), algorithm__missing=missing)
    got = rehearse(run, num_prompts=3, num_samples=8)
    lacks = np.isnan(got.scores[:, 1])
    applies = np.repeat(~lacks.reshape(3, 8).all(axis=1), 8)  # to the group at all
    out = lacks & applies if missing == "drop" else np.zeros(24, bool)
    assert lacks.any() and (got.valid == ~out).all()
    figures = report(run, got)
    assert figures["total"]["missing"] == pytest.approx(out.mean())
    shown = shown_samples(run, got, 24)
    assert [row["reward"] is None for row in shown] == (~got.valid).tolist()
    assert [row["rewards/length"] is None for row in shown] == lacks.tolist()


def test_the_penalty_of_overlong_completions_counts(model):
    run = run_for(model, algorithm__overlong_buffer=5)
    got = rehearse(run, num_prompts=3, num_samples=8)
    np.testing.assert_allclose(got.rewards, got.scores[:, 0] - got.lengths / 5, rtol=1e-6)


def test_groups_without_a_signal_are_those_of_training(model, mine):
    """Two rewards of weight 1 that are normalised alone: [1, None] and [0, 1] cannot be told apart."""
    rewards = mine(match=1.0, never=0.0, length=1.0)
    for aggregation, missing in itertools.product(("normalize_then_sum", "sum_then_normalize"), MISSING):
        choices = {"algorithm__aggregation": aggregation, "algorithm__missing": missing}
        run = run_for(model, rewards=rewards, **choices, algorithm__mask_truncated=True)
        got = rehearse(run, num_prompts=4, num_samples=8)
        got.finished[::7] = False
        # Every group of 4 that might have been sampled, in one rollout.
        rows = [
            row
            for start in range(0, 32, 8)
            for group in itertools.combinations(range(start, start + 8), 4)
            for row in group
        ]
        empty = np.zeros((len(rows), 5), np.float32)
        rollout = Rollout(
            prompt_tokens=empty[:, :1].astype(int), prompt_mask=empty[:, :1] == 0, tokens=empty.astype(int),
            mask=np.arange(5) < got.lengths[rows][:, None], log_probs=empty, kept_mass=empty + 1,
            finished=got.finished[rows],
        )  # fmt: skip
        settings = {"reward_weights": [1.0, 0.0, 1.0], "group_size": 4, "max_length": 5}
        scores = got.scores[rows]
        totals = add_up_rewards(scores, got.lengths[rows], rollout.finished, run.recipe, **settings)
        judged = Judged(
            rollout=rollout, old_log_probs=empty, entropies=None, ref_log_probs=None, scores=scores,
            totals=totals,
        )  # fmt: skip
        advantages = make_experience(judged, run.recipe, prompt_length=1, **settings).advantages
        dead = np.all(advantages.reshape(-1, 4) == 0, axis=1)
        assert dead_group_share(run, got, 4) == pytest.approx(np.mean(dead)), choices
        assert 0 < np.mean(dead) < 1


def test_more_prompts_than_there_are(model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"1{i}+10=", "answer": "2"}) + "\n" for i in range(5)))
    run = run_for(model, data__train_file=path, rewards="[{function: exact_match}]")
    got = rehearse(run, num_prompts=64, num_samples=2)
    assert len({example.prompt for example in got.examples}) == len(got.examples) == 5


# Advice


def figures(**changes):
    reward = {"missing": 0.0, "min": 0.0, "max": 1.0}
    plain = {
        "rewards": {"a": reward, "b": reward}, "clipped_ratio": 0.0,
        "dead_groups": {"2": 0.5, "8": 0.2}, "pass@k": {"1": 0.3, "8": 0.8},
        "correct": {"reward": "a", "threshold": 1.0},
    }  # fmt: skip
    return plain | changes


NONE = {"1": 0.0, "8": 0.0}


def of(least, most):
    return {"missing": 0.0, "min": least, "max": most}


@pytest.mark.parametrize(
    ("changes", "group_size", "expected"),
    [
        ({}, 8, []),
        (
            {"rewards": {"a": {"missing": 1.0, "min": None, "max": None}}},
            8,
            ["reward a gives no value at all"],
        ),
        (
            {"rewards": {"a": {"missing": 0.5, "min": 0, "max": 1}}},
            8,
            ["no value for 50% of the completions"],
        ),
        (
            {"rewards": {"a": {"missing": 0, "min": 0, "max": 1}, "b": {"missing": 0, "min": 2, "max": 2}}},
            8,
            ["the reward b is 2 for every completion"],
        ),
        ({"clipped_ratio": 0.5}, 8, ["50% of the completions are cut off at max_new_tokens"]),
        ({"dead_groups": {"2": 1.0, "8": 0.9}}, 8, ["90% of groups of 8 .*a larger algorithm.group_size"]),
        ({"dead_groups": {"2": 1.0, "8": 0.8}}, 8, []),
        ({"dead_groups": {"2": 1.0, "8": 0.8}}, 2, ["100% of groups of 2 have equal rewards"]),
        ({"dead_groups": {"2": 1.0, "8": 0.9}}, 16, ["90% of groups of 8 have"]),  # more than was sampled
        (
            {"dead_groups": {"8": 1.0}, "pass@k": NONE, "rewards": {"a": of(0.0, 0.0)}},
            8,
            ["equal rewards .*a is 0 for every completion. First compare .*easier prompts"],
        ),
        # Not right by the threshold, which the reward never reaches: the prompts are not too hard.
        (
            {"pass@k": NONE, "rewards": {"a": of(0.0, 0.9)}},
            8,
            ["a gives at most 0.9, and correct means 1 or more, so pass@k is 0 .*see evaluation.correct$"],
        ),
        (
            {"pass@k": NONE, "rewards": {"a": of(-2.0, 0.0)}, "dead_groups": {"8": 0.9}},
            8,
            ["a gives at most 0.0, and correct means", "equal rewards and teach nothing: a larger"],
        ),
        (
            {"pass@k": NONE, "rewards": {"a": of(0.0, 0.0), "b": of(0.0, 1.0)}},
            8,
            ["the reward a is 0 for every completion"],
        ),
        ({"dead_groups": {"8": 1.0}, "pass@k": {"1": 0.95, "8": 1.0}}, 8, ["can do this already"]),
    ],
)
def test_advice(changes, group_size, expected):
    lines = advice(figures(**changes), group_size=group_size)
    assert len(lines) == len(expected) and all("\n" not in line for line in lines)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern, line), line


# The command


def test_command_end_to_end(capsys):
    got = printed_json(capsys)
    again = printed_json(capsys)
    assert without_times(got) == without_times(again)
    assert (got["model"], got["num_prompts"], got["num_samples"]) == ("packaged:arithmetic", 6, 8)
    assert list(got["dead_groups"]) == ["2", "4", "8"] and list(got["pass@k"]) == ["1", "2", "4", "8"]
    chances, shares = list(got["pass@k"].values()), list(got["dead_groups"].values())
    assert chances == sorted(chances) and shares == sorted(shares, reverse=True) and 0 < shares[0] < 1
    assert got["rewards"]["exact_match"]["mean"] == got["total"]["mean"] == pytest.approx(chances[0])
    assert len(got["samples"]) == 8 and got["advice"] == []
    other = printed_json(capsys, "--training.seed=1")
    assert [row["prompt"] for row in other["samples"]] != [row["prompt"] for row in got["samples"]]


def test_command_prints_tables(capsys, mine):
    argv = ["--sampling.max_new_tokens=1", "--num_prompts=4", "--num_samples=4", "--num_shown=3"]
    argv += [f"--rewards={mine(match=1.0, silent=0.5)}"]
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("packaged:arithmetic: 4 training prompts × 4 completions\n")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["match"][:-2] == ["1", "0", "0", "0", "0", "0", "0", "0", "0"]
    assert by_name["silent"][:-2] == ["0.5", *["-"] * 7, "1"] and float(by_name["silent"][-2]) >= 0
    assert by_name["total"] == ["-", "0", "0", "0", "0", "0", "0", "0", "0", "-", "....█..."]
    assert by_name["silent"][-1] == ""
    assert by_name["expected share"] == ["100.0%", "100.0%"]
    assert by_name["pass@k"] == ["0.0%"] * 3
    assert sum("=" in row[0] for row in rows) == 3  # samples
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert "100.0% cut off at the limit" in out
    expected = (
        "a completion is correct in evaluation where match gives 1 or more",
        "match is 0 for every",
        "silent gives no value",
        "are cut off",
        "match is 0 for every completion. First compare",
    )
    assert "correct: match gives 1 or more" in out
    for note, text in zip(notes, expected, strict=True):
        assert text in note


def test_a_runs_config_is_what_it_takes(tmp_path, capsys):
    """The same file as for training, and what stands on the command line."""
    content = {
        "sampling": {"max_new_tokens": 5}, "algorithm": {"group_size": 3}, "training": {"batch_size": 6},
        "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    path = small_run.write_yaml(tmp_path / "c.yaml", content)
    got = printed_json(capsys, "--config", path, "--training.seed=2")
    assert list(got["dead_groups"]) == ["2", "3", "4", "8"] and got["rows_per_call"] == 6
    assert not (tmp_path / "run").exists()
    arguments = parse_record(ScoreArguments, ["--config", path], command="", description="")
    assert arguments.config() == parse_record(Config, ["--config", path], command="", description="")


def test_a_reward_that_fails_is_named(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def bad(completions):\n    raise KeyError('x')\n")
    argv = [
        f"--rewards=[{{function: '{tmp_path}/bad.py:bad'}}]",
        "--num_prompts=2",
        "--sampling.max_new_tokens=2",
    ]
    with pytest.raises(SystemExit) as exited:
        run_command(lambda: command.main(argv))
    err = capsys.readouterr().err
    assert exited.value.code == 2 and err.startswith("error: reward `bad`") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--num_prompts=0", "num_prompts: 0; it must be at least 1"),
        ("--num_samples=1", "num_samples: 1; it must be at least 2"),
        ("--num_shown=-1", "num_shown: -1; it must be 0 or more"),
    ],
)
def test_command_errors(option, message, capsys):
    with pytest.raises(SystemExit) as exited:
        run_command(lambda: command.main([option]))
    assert exited.value.code == 2 and message in capsys.readouterr().err
