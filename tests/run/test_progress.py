"""Where a run stands: rollouts in mini-batches, what waits, what moves; and that a cut loses none of it."""

import functools
from itertools import cycle, pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_run

import grpo_jax.train as train_module
from grpo_jax.checkpoints.manager import Checkpoints
from grpo_jax.data.loading import batch, load_task
from grpo_jax.models.loading import load_model
from grpo_jax.objective.kl import adapt_kl_coef
from grpo_jax.run import loop as run_loop
from grpo_jax.training import actor

REWARDS = """
def even(completions, answer):
    # Half of the prompts teach nothing: whatever is said about an odd number is right.
    return [1.0 if int(a) % 2 else float(c == a) for c, a in zip(completions, answer)]

def constant(completions):
    return [0.35] * len(completions)
"""

SHARED = {
    "algorithm__num_minibatches": 2,
    "training__batch_size": 16,  # 4 prompts x 8 completions = 32 per rollout
    "evaluation__num_prompts": 0,
    "tracking__completions_every": 1,
    "checkpoints__every": 1,
}
RUNS = {
    # everything that a checkpoint has to carry from one rollout to the next
    "moving": {
        "algorithm__dynamic_sampling": "true",
        "algorithm__num_iterations": 2,
        "algorithm__ref_sync_every": 2,
        "algorithm__kl_target": 0.01,
        "training__num_steps": 9,
        "training__seed": 4,  # leaves groups over in the first and in the second rollout
    },
    # a frozen reference that the update reads, and weights of its own for KL and entropy
    "exact": {
        "algorithm__kl_estimator": "exact",
        "algorithm__entropy_coef": 0.01,
        "algorithm__top_entropy": 0.5,
        "algorithm__kl_on_dead_groups": "false",
        "algorithm__mask_truncated": "true",
        "training__num_steps": 3,
    },
}


pytestmark = pytest.mark.usefixtures("shared_compilations")


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    directory = tmp_path_factory.mktemp("progress")
    (directory / "mine.py").write_text(REWARDS)

    def make(run_dir, name, *, reward="even", **changes):
        rewards = f"[{{function: '{directory}/mine.py:{reward}'}}]"
        return small_run.arguments(run_dir, **SHARED | RUNS[name] | {"rewards": rewards} | changes)

    return make


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """The run that nobody cut, by name: its directory, its rows and what passed through its parts."""

    @functools.cache
    def get(name):
        run = SimpleNamespace(dir=tmp_path_factory.mktemp(name), drawn=[], collected=[], used=[])
        with pytest.MonkeyPatch.context() as monkeypatch:
            watch(monkeypatch, run)
            assert train_module.main(argv(run.dir, name, checkpoints__keep=99)) == 0
        run.rows = small_run.rows(run.dir)
        return run

    return get


def watch(monkeypatch, run) -> None:
    """Notes what every rollout draws and collects, and the Experience of every update."""
    collect, train_step = run_loop.collect, run_loop.train_step

    def collecting(actor, params, ref_params, draw, leftovers):
        def drawing(round_):
            examples, key = draw(round_)
            run.drawn.append(([e.prompt for e in examples], jax.random.key_data(key).tolist()))
            return examples, key

        run.collected.append(collect(actor, params, ref_params, drawing, leftovers))
        return run.collected[-1]

    def updating(state, experience, **settings):
        run.used.append(jax.device_get(experience))
        return train_step(state, experience, **settings)

    monkeypatch.setattr(run_loop, "collect", collecting)
    monkeypatch.setattr(run_loop, "train_step", updating)


def checkpoint(run_dir, step):
    """Returns (extra, parameters, reference) as they are stored with a step."""
    params = load_model("packaged:arithmetic").params
    checkpoints = Checkpoints(Path(run_dir) / "checkpoints", read_only=True)
    try:
        state, extra, others = checkpoints.restore(step, small_run.template(), {"reference": params})
    finally:
        checkpoints.close()
    return extra, state.params, others.get("reference")


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# Rounds, rollouts, mini-batches


def test_every_round_has_its_own_prompts_and_noise(whole):
    run = whole("moving")
    rounds = [got.num_rounds for got in run.collected]
    assert len(rounds) == 3 and max(rounds) > 1  # one rollout for four updates, the third for one
    assert len(run.drawn) == sum(rounds) == len({str(key) for _, key in run.drawn})
    examples = load_task("arithmetic").train
    for index, (prompts, key) in enumerate(run.drawn):  # rounds are the clock, whatever a rollout needs
        assert prompts == [e.prompt for e in batch(examples, seed=4, step=index, num_prompts=4)]
        assert key == jax.random.key_data(jax.random.fold_in(jax.random.key(4), index)).tolist()
    stored = [checkpoint(run.dir, step)[0]["num_rounds"] for step in (1, 4, 5, 9)]
    assert stored == [rounds[0], rounds[0], sum(rounds[:2]), sum(rounds)]


def test_mini_batches_are_the_rollout_cut_in_two(whole):
    run = whole("moving")
    assert len(run.used) == 9
    for n, got in enumerate(run.collected):
        whole_batch = jax.device_get(got.experience)
        assert whole_batch.tokens.shape[0] == 32
        for i, used in enumerate(run.used[4 * n : 4 * n + 4]):  # two passes over two disjoint halves
            half = slice(0, 16) if i % 2 == 0 else slice(16, 32)
            assert bits(used) == bits(jax.tree.map(lambda x, half=half: x[half], whole_batch))


def test_only_the_first_update_of_a_rollout_is_on_policy(whole):
    ratios = [row["ratio/max"] for row in whole("moving").rows]
    assert ratios[0] == pytest.approx(1, abs=1e-4)
    assert all(ratio > 1.005 for i, ratio in enumerate(ratios) if i % 4)
    ratios = [row["ratio/max"] for row in whole("exact").rows]
    assert [ratio == pytest.approx(1, abs=1e-4) for ratio in ratios] == [True, False, True]


def test_leftovers_are_pending_in_the_checkpoints(whole):
    run = whole("moving")
    kept = [int(row["dynamic_sampling/leftover_groups"]) for row in run.rows]
    assert kept[0] > 0 and kept[4] > 0
    for step, count in enumerate(kept, start=1):
        assert len(checkpoint(run.dir, step)[0]["leftover_samples"]) == 8 * count
    # They are the first groups of the next rollout.
    left, later = run.collected[0].leftovers, run.collected[1].experience
    np.testing.assert_array_equal(later.tokens[: 8 * kept[0]], left.judged.rollout.tokens)


def test_leftovers_are_stored_as_ever(whole):
    """Their totals follow from the scores, so checkpoints made before there were totals still resume."""
    run = whole("moving")
    stored = Path(run.dir) / "checkpoints" / "1" / "leftovers"
    found = {str(path.parent.relative_to(stored)) for path in stored.rglob(".zarray")}
    parts = ("finished", "kept_mass", "log_probs", "mask", "prompt_mask", "prompt_tokens", "tokens")
    leaves = {*(f"rollout/{part}" for part in parts), "scores", "old_log_probs", "ref_log_probs", "entropies"}
    assert found == leaves
    assert run.collected[0].leftovers.judged.totals.signal.all()


# What moves between updates


def test_the_coefficient_follows_the_controller(whole):
    run = whole("moving")
    coefs = [row["kl_coef"] for row in run.rows]
    assert coefs[0] == 0.04 and all(row["grad_norm"] > 0 for row in run.rows)
    for row, following in pairwise(run.rows):
        moved = adapt_kl_coef(row["kl_coef"], row["kl"], kl_target=0.01, kl_adaptation=0.1)
        assert following["kl_coef"] == float(moved) == float(checkpoint(run.dir, row["step"])[0]["kl_coef"])
    ups = [later > earlier for earlier, later in pairwise(coefs)]
    assert any(ups) and not all(ups)
    assert {row["kl_coef"] for row in whole("exact").rows} == {0.04}  # without a target it is a setting


def test_the_reference_follows_every_second_update(whole):
    run = whole("moving")
    before = load_model("packaged:arithmetic").params
    for step in range(1, 10):
        _, params, reference = checkpoint(run.dir, step)
        if step % 2:
            assert bits(reference) == bits(before), step
        else:
            for new, old, mixed in zip(*map(jax.tree.leaves, (params, before, reference)), strict=True):
                expected = 0.6 * np.asarray(new, np.float64) + 0.4 * np.asarray(old, np.float64)
                np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-7)
            assert bits(reference) != bits(before)
        before = reference
    assert not (run.dir / "checkpoints" / "reference").exists()
    assert run.rows[0]["kl"] == 0  # it is a copy of the policy at the start


def test_a_frozen_reference_stays_what_it_was(whole):
    run, packaged = whole("exact"), load_model("packaged:arithmetic").params
    checkpoints = Checkpoints(run.dir / "checkpoints", read_only=True)
    try:
        assert bits(checkpoints.restore_reference(packaged)) == bits(packaged)
    finally:
        checkpoints.close()
    assert all(checkpoint(run.dir, step)[2] is None for step in (1, 2, 3))
    kls = [row["kl"] for row in run.rows]
    assert kls[0] == pytest.approx(0, abs=1e-6) and min(kls[1:]) > 1e-5
    assert all(used.ref_log_probs is None and used.penalty_weights is not None for used in run.used)


def test_without_any_signal_nothing_moves(argv, tmp_path, capsys):
    changes = {"algorithm__max_sampling_rounds": 2, "training__num_steps": 3, "training__weight_decay": 0.1}
    assert train_module.main(argv(tmp_path, "moving", reward="constant", **changes)) == 0
    rows = small_run.rows(tmp_path)
    assert [row["idle_updates"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["loss"] == row["grad_norm"] == row["kl"] == 0 and row["skipped_updates"] == 0
        assert (row["dynamic_sampling/rounds"], row["dynamic_sampling/missing_groups"]) == (2, 4)
        # No token was there to measure a KL on: its 0 is no reason to lower the coefficient.
        assert row["kl_coef"] == 0.04
    exported = load_model(str(tmp_path / "hf")).params
    assert bits(exported) == bits(load_model("packaged:arithmetic").params)
    assert "groups too few in 2 rounds" in " ".join(capsys.readouterr().out.split())


def test_an_exact_kl_to_itself_moves_nothing(argv, tmp_path, capsys):
    changes = {
        "algorithm__entropy_coef": 0,
        "algorithm__kl_on_dead_groups": "true",
        "algorithm__kl_coef": 0.5,
    }
    assert train_module.main(argv(tmp_path, "exact", reward="constant", **changes)) == 0
    for count, row in enumerate(small_run.rows(tmp_path), start=1):
        assert row["idle_updates"] == count
        assert row["grad_norm"] == row["kl"] == row["loss"] == 0
    assert bits(load_model(str(tmp_path / "hf")).params) == bits(load_model("packaged:arithmetic").params)
    assert "nothing moved (1 idle updates so far)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_two_programs_that_differ_as_in_bfloat16_move_nothing(rank, argv, tmp_path, monkeypatch):
    score, calls = actor._log_probs, []

    def rounding(*arguments):
        calls.append(1)
        log_probs, entropies = score(*arguments)
        return log_probs + 1e-3 * len(calls), entropies

    monkeypatch.setattr(actor, "_log_probs", rounding)
    changes = {
        "algorithm__kl_estimator": "k3",
        "algorithm__entropy_coef": 0,
        "algorithm__top_entropy": "null",
    }
    changes |= {
        "algorithm__kl_on_dead_groups": "true",
        "algorithm__mask_truncated": "false",
        "lora__rank": rank,
    }
    assert train_module.main(argv(tmp_path, "exact", reward="constant", **changes)) == 0
    for count, row in enumerate(small_run.rows(tmp_path), start=1):
        assert row["idle_updates"] == count and row["grad_norm"] == row["kl"] == 0
    assert calls  # the reference was scored


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, [True, False]),  # three updates, and the third need not ask
        ({"algorithm__ref_sync_every": 1, "algorithm__ref_mixup_alpha": 1.0}, [True, True, True]),
    ],
    ids=["frozen", "moving"],
)
def test_a_policy_is_compared_until_it_has_left_a_frozen_reference(
    changes, found, argv, tmp_path, monkeypatch
):
    compare, results = run_loop.is_reference, []

    def comparing(*arguments):
        results.append(compare(*arguments))
        return results[-1]

    monkeypatch.setattr(run_loop, "is_reference", comparing)
    assert train_module.main(argv(tmp_path, "exact", algorithm__kl_estimator="k3", **changes)) == 0
    assert [bool(result) for result in results] == found
    assert all(row["grad_norm"] > 0 for row in small_run.rows(tmp_path))


# Cut and continued


@pytest.mark.parametrize("name", RUNS)
def test_cut_at_every_step(name, argv, whole, tmp_path, monkeypatch):
    command = argv(tmp_path, name)
    steps = RUNS[name]["training__num_steps"]
    # In turn: an update that is lost, and a crash right after a save (the first save is a frozen reference).
    lost, saved = ("updated", 2), ("saved", 1)
    for cut, (place, call) in zip(range(1, steps), cycle((lost, saved)), strict=False):
        with monkeypatch.context() as context:
            small_run.crash_at(context, place, call)
            with pytest.raises(small_run.Crash):
                train_module.main(command)
        assert small_run.rows(tmp_path)[-1]["step"] == cut
    assert train_module.main(command) == 0
    small_run.assert_same_run(tmp_path, whole(name).dir)


@pytest.mark.parametrize(("place", "call"), [("rewarded", 2), ("updated", 7)])
def test_cut_between_checkpoints(place, call, argv, whole, tmp_path, monkeypatch):
    """A rollout that used leftovers is lost and made again, from the checkpoint before it."""
    command = argv(tmp_path, "moving", checkpoints__every=3)
    with monkeypatch.context() as context:
        small_run.crash_at(context, place, call)
        with pytest.raises(small_run.Crash):
            train_module.main(command)
    assert train_module.main(command) == 0
    small_run.assert_same_run(tmp_path, whole("moving").dir)


@pytest.mark.parametrize(
    ("setting", "value", "before"),
    [
        ("num_minibatches", 1, 2),
        ("num_iterations", 1, 2),
        ("dynamic_sampling", "false", True),
        ("max_sampling_rounds", 3, 4),
        ("ref_sync_every", 3, 2),
        ("ref_mixup_alpha", 1.0, 0.6),
        ("kl_target", 0.02, 0.01),
        ("kl_adaptation", 0.2, 0.1),
        ("kl_estimator", "exact", "k3"),
        ("aggregation", "gdpo", "sum_then_normalize"),
        ("missing", "skip", "drop"),
        ("overlong_buffer", 2, 0),
        ("mask_truncated", "true", False),
        ("top_entropy", 0.5, None),
        ("importance_cap", 2.0, None),
        ("max_staleness", 1.0, None),
        ("entropy_coef", 0.1, None),
        ("kl_on_dead_groups", "false", True),
    ],
)
def test_a_changed_setting_is_refused(setting, value, before, argv, whole):
    run_dir, name = whole("moving").dir, f"algorithm__{setting}"
    with pytest.raises(ValueError, match=rf"algorithm\.{setting} is {before!r} there and .* here\. Give"):
        train_module.main(argv(run_dir, "moving", **{name: value}))


def test_another_run_goes_on_with_its_own_settings(argv, whole, tmp_path):
    """Continued from a run whose coefficient and reference moved: both stay, as this one says."""
    source = whole("moving").dir
    changes = {"kl_target": "null", "kl_coef": 0.5, "ref_sync_every": 0}
    changes = {f"algorithm__{name}": value for name, value in changes.items()}
    command = argv(tmp_path, "moving", **changes, training__num_steps=10, checkpoints__resume=source)
    assert train_module.main(command) == 0
    (row,) = small_run.rows(tmp_path)
    assert (row["step"], row["kl_coef"]) == (10, 0.5)
    _, params, reference = checkpoint(source, 9)
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    try:
        assert bits(checkpoints.restore_reference(params)) == bits(reference)
    finally:
        checkpoints.close()
