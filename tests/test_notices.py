"""Each notice under its condition alone, and not too often."""

import pytest

from grpo_jax.notices import Notices

CALM = {
    "frac_reward_zero_std": 0.25,
    "completions/clipped_ratio": 0.5,
    "reward": 0.5,
    "sampling/logp_difference_max": 1e-5,
    "sampling/kept_mass": 1.0,
    "skipped_updates": 0.0,
    "skipped_updates_in_a_row": 0.0,
    "loss": 0.01,
    "grad_norm": 1.0,
}

CASES = [
    ({"frac_reward_zero_std": 1.0}, "every group's rewards are equal"),
    ({"completions/clipped_ratio": 1.0, "reward": 0.0}, "every completion was cut off at max_new_tokens"),
    ({"sampling/logp_difference_max": 0.25}, "sampler and scorer disagree by 0.25 nats"),
    ({"skipped_updates": 7.0, "skipped_updates_in_a_row": 1.0}, "the update was skipped (7 so far)"),
    ({"sampling/kept_mass": 0.9}, "top_k/top_p/min_p keep 0.900 of the probability"),
    ({"loss": -1e-6}, "a loss of 0 is not a bug"),
]
ONCE = ("top_k", "a loss of 0")


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
        {"completions/clipped_ratio": 1.0},  # with rewards: long answers, nothing wrong
        {"reward": 0.0},
        {"sampling/logp_difference_max": 0.1},
        {"skipped_updates": 7.0},  # some time ago
        {"sampling/kept_mass": 0.9995},
        {"loss": 1e-6, "grad_norm": 0.0},
        {"loss": -0.5},
    ],
)
def test_not_beside_its_condition(changes):
    assert Notices().about(1, {**CALM, **changes}) == []


def test_dead_groups_are_not_told_that_zero_is_fine():
    lines = Notices().about(1, {**CALM, "frac_reward_zero_std": 1.0, "loss": 0.0, "grad_norm": 1e-3})
    assert len(lines) == 1 and "teaches nothing" in lines[0]


@pytest.mark.parametrize(("changes", "text"), CASES, ids=lambda v: str(v)[:30])
def test_at_most_every_hundred_steps(changes, text):
    notices = Notices()
    told = [step for step in range(1, 350) if notices.about(step, {**CALM, **changes})]
    assert told == ([1] if text.startswith(ONCE) else [1, 101, 201, 301])


def test_notices_are_counted_one_by_one():
    notices = Notices()
    first, second = {**CALM, **CASES[0][0]}, {**CALM, **CASES[2][0]}
    assert len(notices.about(1, first)) == 1
    assert len(notices.about(2, second)) == 1
    assert notices.about(3, {**first, **CASES[2][0]}) == []
    assert len(Notices().about(3, first)) == 1  # another run


def test_numbers_of_the_moment():
    notices = Notices()
    skipping = {"skipped_updates_in_a_row": 1.0}
    assert "(1 so far)" in notices.about(1, {**CALM, **skipping, "skipped_updates": 1.0})[0]
    assert "(9 so far)" in notices.about(101, {**CALM, **skipping, "skipped_updates": 9.0})[0]


def test_not_a_number():
    # A broken model: its difference is NaN, and the skipped update says it.
    metrics = {**CALM, "loss": float("nan"), "grad_norm": float("nan"), "skipped_updates_in_a_row": 1.0}
    lines = Notices().about(1, {**metrics, "sampling/logp_difference_max": float("nan")})
    assert len(lines) == 1 and "was skipped" in lines[0]
