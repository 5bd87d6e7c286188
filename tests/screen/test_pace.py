"""The time left counts evaluations, and neither the first step nor the first evaluation."""

import pytest

from grpo_jax.screen.pace import Pace


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run(pace, clock, steps, *, every, per_step=2.0, per_evaluation=10.0):
    for step in steps:
        clock.now += per_step
        pace.stepped(step)
        if every and step % every == 0:
            pace.enter("evaluating")
            clock.now += per_evaluation
            pace.evaluated()
            pace.enter("sampling")


def test_without_evaluations():
    clock = Clock()
    pace = Pace(100, 0, clock)
    assert pace.seconds_left() is None
    run(pace, clock, [1], every=0, per_step=60)  # compiles
    assert pace.seconds_left() is None
    run(pace, clock, range(2, 11), every=0)
    assert pace.seconds_left() == pytest.approx(90 * 2)


@pytest.mark.parametrize(
    ("done", "total", "evaluations"),
    [(9, 100, 10), (10, 100, 9), (15, 100, 9), (99, 100, 1), (100, 100, 0), (9, 95, 10), (90, 95, 1)],
)
def test_evaluations_still_to_come(done, total, evaluations):
    clock = Clock()
    pace = Pace(total, 10, clock)
    pace.enter("evaluating")
    clock.now += 500  # the first compiles
    pace.evaluated()
    pace.enter("evaluating")
    clock.now += 10
    pace.evaluated()
    run(pace, clock, range(1, done + 1), every=10)
    # Evaluations between the steps do not make a step look slow.
    assert pace.seconds_left() == pytest.approx((total - done) * 2 + evaluations * 10)
    waited = pace.seconds_left()
    clock.now += 1
    assert pace.seconds_left() == max(0, waited - 1)


def test_one_at_the_end():
    clock = Clock()
    pace = Pace(10, 0, clock)
    pace.enter("evaluating")
    clock.now += 30
    pace.evaluated()
    run(pace, clock, range(1, 6), every=0)
    assert pace.seconds_left() == pytest.approx(5 * 2 + 30)
