"""Each notice under its condition alone, and not too often."""

import dataclasses
import re

import pytest
import small_run
from calm import CALM

from grpo_jax.config.run import Config
from grpo_jax.run import diagnostics as notices_module
from grpo_jax.run.diagnostics import Notices
from grpo_jax.train import train

# A healthy update of several from one rollout.
DEAD = {"frac_reward_zero_std": 1.0, "reward_std": 0.0, "policy_loss": 0.0, "grad_norm": 0.0}
FRESH = {"ratio/max": 1.00001, "clip_ratio/region_mean": 0.0, "policy_loss": -1e-6}
DYNAMIC = {"dynamic_sampling/rounds": 4.0, "dynamic_sampling/missing_groups": 0.0}
CORRECTED = {"sampling/importance_mean": 1.0, "sampling/importance_capped": 0.0}

CASES = [
    ({**DEAD, "idle_updates": 3.0}, "teaches nothing and nothing moved (3 idle updates so far)"),
    ({**DEAD, "kl": 0.2, "grad_norm": 0.01}, "only the KL term, or an entropy bonus, moved the policy"),
    ({"rewards/exact_match/missing": 1.0}, "no value for any completion from the reward exact_match, which"),
    ({"rewards/a/missing": 1.0, "rewards/b/missing": 1.0}, "from the reward a, b, which"),
    ({**DEAD, "rewards/exact_match/missing": 1.0, "reward": 0.0}, "no value for any completion"),
    (
        {"rewards/exact_match/timeouts": 0.125, "rewards/exact_match/missing": 0.125},
        "as the call ran over its timeout or its worker died: exact_match (12.5%)",
    ),
    ({"completions/clipped_ratio": 1.0, "reward": 0.0}, "every completion was cut off at max_new_tokens"),
    ({"completions/clipped_ratio": 1.0, "reward": -1.0}, "every completion was cut off at max_new_tokens"),
    ({"completions/clipped_ratio": 0.5}, "50% of the completions were cut off"),
    ({"completions/clipped_ratio": 1.0}, "100% of the completions were cut off"),
    (
        {**DYNAMIC, "dynamic_sampling/missing_groups": 3.0, "frac_reward_zero_std": 0.9},
        "dynamic sampling found 3 groups too few in 4 rounds",
    ),
    ({**DYNAMIC, **DEAD, "dynamic_sampling/missing_groups": 8.0}, "dynamic sampling found 8 groups too few"),
    ({"sampling/logp_difference_max": 0.25}, "sampler and scorer disagree by 0.25 nats"),
    ({**CORRECTED, "sampling/importance_mean": 0.9}, "the importance weights average 0.900, and 0.0%"),
    ({**CORRECTED, "sampling/importance_capped": 0.02}, "average 1.000, and 2.0% of the tokens"),
    ({"skipped_updates": 7.0, "skipped_updates_in_a_row": 1.0}, "the update was skipped (7 so far)"),
    ({"grad_norm": 0.0, "idle_updates": 2.0}, "nothing moved (2 idle updates so far)"),
    ({**DEAD, "reward_std": 0.3, "idle_updates": 2.0}, "all that could train is masked as truncated"),
    ({"kl": 3.5}, "the policy is 3.5 nats per token from the reference"),
    ({"ratio/max": 12.3}, "the largest ratio pi / pi_old is 12.3"),
    ({"stale_tokens": 0.25}, "25% of the tokens are in completions dropped as stale"),
    ({"entropy": 0.005}, "all but deterministic (0.005 nats per token)"),
    ({"sampling/kept_mass": 0.9}, "top_k/top_p/min_p keep 0.900 of the probability"),
    (FRESH, "a policy loss near 0 and a clip_ratio of 0 are no bugs"),
]
ONCE = ("top_k", "a policy loss near 0")


def test_silence_when_all_is_well():
    assert Notices().about(1, CALM) == []


@pytest.mark.parametrize(("changes", "text"), CASES, ids=lambda v: str(v)[:30])
def test_each_under_its_condition(changes, text):
    lines = Notices().about(12, {**CALM, **changes})
    assert len(lines) == 1 and lines[0].startswith("step 12: ") and text in lines[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"frac_reward_zero_std": 0.99},
        {"frac_reward_zero_std": 1.0, "policy_loss": 0.01},  # a KL in the reward, or leftover groups
        {"rewards/exact_match/missing": 0.99},
        {"completions/clipped_ratio": 0.49},
        {"reward": 0.0},
        DYNAMIC,
        {"sampling/logp_difference_max": 0.1},
        {"sampling/logp_difference_max": None},  # absent
        {**CORRECTED, "sampling/logp_difference_max": 0.25},
        {**CORRECTED, "sampling/importance_mean": 0.951, "sampling/importance_capped": 0.01},
        {"skipped_updates": 7.0},  # some time ago
        {"idle_updates": 7.0},
        {"sampling/kept_mass": 0.9995},
        {"rewards/exact_match/timeouts": 0.0},
        {"kl": 3.0},
        {"kl": 0.0},
        {"ratio/max": 10.0},
        {"stale_tokens": 0.2},
        {"entropy": 0.01},
        {"entropy": 0.0, "ratio/max": 0.0},  # a batch without any token
        {**FRESH, "ratio/max": 1.01},
        {**FRESH, "policy_loss": -0.5},  # CISPO, or the plain policy gradient
        {**FRESH, "clip_ratio/region_mean": 0.1},
    ],
    ids=str,
)
def test_not_beside_its_condition(changes):
    metrics = {name: value for name, value in {**CALM, **changes}.items() if value is not None}
    assert Notices().about(1, metrics) == []


def test_dead_groups_are_not_told_that_zero_is_fine():
    lines = Notices().about(1, {**CALM, **FRESH, **DEAD, "grad_norm": 1e-3})
    assert len(lines) == 1 and "teach nothing" in lines[0]


@pytest.mark.parametrize(("changes", "text"), CASES, ids=lambda v: str(v)[:30])
def test_at_most_every_hundred_steps(changes, text):
    notices = Notices()
    told = [step for step in range(1, 350) if notices.about(step, {**CALM, **changes})]
    assert told == ([1] if text.startswith(ONCE) else [1, 101, 201, 301])


def test_notices_are_counted_one_by_one():
    notices = Notices()
    first, second = {**CALM, "kl": 5.0}, {**CALM, "entropy": 0.0}
    assert len(notices.about(1, first)) == 1
    assert len(notices.about(2, second)) == 1
    assert notices.about(3, {**first, "entropy": 0.0}) == []
    assert len(Notices().about(3, first)) == 1  # another run


def test_numbers_of_the_moment():
    notices = Notices()
    skipping = {"skipped_updates_in_a_row": 1.0}
    assert "(1 so far)" in notices.about(1, {**CALM, **skipping, "skipped_updates": 1.0})[0]
    assert "(9 so far)" in notices.about(101, {**CALM, **skipping, "skipped_updates": 9.0})[0]


def test_not_a_number():
    # A broken model: everything it computes is NaN, and the skipped update says it.
    broken = ("loss", "policy_loss", "grad_norm", "kl", "entropy", "ratio/mean", "ratio/max")
    metrics = {**CALM, **dict.fromkeys(broken, float("nan")), "skipped_updates_in_a_row": 1.0}
    lines = Notices().about(1, {**metrics, "sampling/logp_difference_max": float("nan")})
    assert len(lines) == 1 and "was skipped" in lines[0]


def test_every_setting_they_name_exists():
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    texts = " ".join(notice.text for notice in notices_module._NOTICES)
    named = set(re.findall(r"\b([a-z]+)\.([a-z]\w*)", texts))
    assert len(named) > 10
    for section, key in named:
        assert key in {field.name for field in dataclasses.fields(sections[section])}, f"{section}.{key}"


def run(tmp_path, capsys, monkeypatch, reward: str, **changes) -> list[str]:
    """Runs three steps with a reward function `f`; returns the notices printed, without their steps."""
    (tmp_path / "mine.py").write_text(reward)
    small_run.share_compilations(monkeypatch)
    settings = {"training__num_steps": 3, "evaluation__num_prompts": 0, "algorithm__kl_coef": 0, **changes}
    config = small_run.config(tmp_path / "run", rewards=f"[{{function: '{tmp_path}/mine.py:f'}}]", **settings)
    assert train(config) == 0
    return re.findall(r"^step \d+: ((?!completions).*)$", capsys.readouterr().out, re.MULTILINE)


HALF = "def f(completions):\n    return [float(i % 2) for i in range(len(completions))]\n"
NONE = "def f(completions):\n    return [None] * len(completions)\n"


def test_a_run_says_that_it_is_on_policy_and_nothing_else(tmp_path, capsys, monkeypatch):
    (line,) = run(tmp_path, capsys, monkeypatch, HALF)
    assert line.startswith("a policy loss near 0 and a clip_ratio of 0 are no bugs")


def test_a_run_without_any_reward(tmp_path, capsys, monkeypatch):
    (line,) = run(tmp_path, capsys, monkeypatch, NONE)
    assert line.startswith("no value for any completion from the reward f")


def test_a_run_whose_answers_do_not_fit(tmp_path, capsys, monkeypatch):
    lines = run(tmp_path, capsys, monkeypatch, HALF, sampling__max_new_tokens=1)
    assert [line for line in lines if line.startswith("100% of the completions were cut off")]


def test_a_run_that_masks_them_all(tmp_path, capsys, monkeypatch):
    changes = {"sampling__max_new_tokens": 1, "algorithm__mask_truncated": True}
    lines = run(tmp_path, capsys, monkeypatch, HALF, **changes)
    assert [line for line in lines if line.startswith("the gradient is exactly 0 and nothing moved (1 idle")]


def test_a_dynamic_run_that_finds_nothing(tmp_path, capsys, monkeypatch):
    equal = "def f(completions):\n    return [1.0] * len(completions)\n"
    changes = {
        "algorithm__name": "dapo",
        "algorithm__overlong_buffer": 0,
        "algorithm__max_sampling_rounds": 2,
    }
    (line,) = run(tmp_path, capsys, monkeypatch, equal, **changes)
    assert line.startswith("dynamic sampling found 4 groups too few in 2 rounds")
