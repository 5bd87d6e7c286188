"""A reward that is too slow for its timeout: the row leaves its group, and nobody is punished for it."""

import numpy as np
import pytest
import small_run

from grpo_jax.objective.recipes import make_recipe
from grpo_jax.train import train

pytestmark = pytest.mark.slow

GROUP = 8
SLOW_ROW = 3  # index within the first batch

# The first reward is fast. The second runs in a worker, judges one row per call, and oversleeps once.
SOURCE = """\
import os, time

def fast(completions):
    return [float(sum(map(ord, text)) % 3) for text in completions]

def slow(completions, calls):
    with open(calls[0], "a") as file:
        file.write(".")
    if os.path.getsize(calls[0]) == {slow_row} + 1:
        time.sleep(1000)
    return [0.5] * len(completions)
"""


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """The first step's metrics and samples of a run in which one call really is too slow."""
    small_run.share_compilations(monkeypatch)
    (tmp_path / "mine.py").write_text(SOURCE.format(slow_row=SLOW_ROW))
    calls = tmp_path / "calls"
    prompts = [f'{{"prompt": "{a}+{a}=", "calls": "{calls}"}}' for a in range(10, 30)]
    (tmp_path / "train.jsonl").write_text("\n".join(prompts))
    rewards = (
        f"[{{function: '{tmp_path}/mine.py:fast'}}, "
        f"{{function: '{tmp_path}/mine.py:slow', timeout: 1, rows_per_call: 1}}]"
    )
    config = small_run.config(
        tmp_path / "run",
        rewards=rewards,
        data__train_file=tmp_path / "train.jsonl",
        evaluation__num_prompts=0,
        algorithm__group_size=GROUP,
        training__num_steps=1,
        tracking__completions_every=1,
        tracking__num_completions=32,
    )
    assert config.algorithm.missing is None  # the default is what is tried
    assert train(config) == 0
    (metrics,) = small_run.rows(tmp_path / "run")
    samples = small_run.rows(tmp_path / "run", "completions")
    assert len(samples) == 32
    return metrics, samples


def test_a_slow_reward_takes_its_row_out_of_the_group_and_punishes_nobody(rows):
    metrics, samples = rows
    assert metrics["rewards/slow/timeouts"] == metrics["rewards/slow/missing"] == 1 / 32
    assert metrics["rewards/fast/missing"] == 0
    lost = samples[SLOW_ROW]
    assert lost["rewards/slow"] is None and lost["rewards/fast"] is not None
    # The row does not train, and its fast reward does not move the others' baseline.
    assert lost["advantage"] == 0
    siblings = [row for i, row in enumerate(samples[:GROUP]) if i != SLOW_ROW]
    totals = np.array([[row["rewards/fast"] + row["rewards/slow"] for row in siblings]], np.float32)
    alone = make_recipe("grpo").advantage(totals, valid=np.ones_like(totals, bool))[0]
    np.testing.assert_allclose([row["advantage"] for row in siblings], alone, atol=1e-6)
    punished = np.append(totals, np.float32(lost["rewards/fast"]))[None]  # as if a missing reward were 0
    assert not np.allclose(make_recipe("grpo").advantage(punished, valid=punished == punished)[0, :-1], alone)
    assert [row["reward"] for row in siblings] == totals[0].tolist()


def test_the_other_groups_are_as_they_would_have_been(rows):
    _, samples = rows
    others = samples[GROUP:]
    totals = np.array([row["rewards/fast"] + row["rewards/slow"] for row in others], np.float32)
    groups = totals.reshape(-1, GROUP)
    expected = make_recipe("grpo").advantage(groups, valid=np.ones_like(groups, bool)).reshape(-1)
    np.testing.assert_allclose([row["advantage"] for row in others], expected, atol=1e-6)
