"""Checkpoints: bit-exact, strict and quiet. What damages them is in test_checkpoints_damaged.py."""

import json
import logging
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from saved_state import Batch, assert_same_bits, make_state, opened_in

from grpo_jax.checkpoints.format import to_host
from grpo_jax.checkpoints.manager import Checkpoints, CorruptedCheckpoint


@pytest.fixture
def open_checkpoints(tmp_path):
    yield from opened_in(tmp_path / "checkpoints")


# --- what comes back is what went in -------------------------------------------------------------


@pytest.mark.parametrize("template", ["concrete", "abstract"])
def test_round_trip_is_bit_exact(open_checkpoints, template):
    state, extra = make_state(3), {"epoch": 1.1, "best": None, "name": "π", "list": [1, {"a": True}]}
    checkpoints = open_checkpoints()
    assert checkpoints.latest_step() is None and checkpoints.steps() == []
    checkpoints.save(7, state, extra)
    checkpoints.close()
    again = open_checkpoints()
    assert again.steps() == [7] and again.latest_step() == 7
    like = make_state(9) if template == "concrete" else jax.eval_shape(lambda: make_state(9))
    step, restored, restored_extra, others = again.restore_latest(like)
    assert_same_bits(restored, state)
    assert (step, restored_extra, others) == (7, extra, {})
    assert again.extra(7) == extra


def test_others_may_be_present_or_absent(open_checkpoints):
    state, batch = make_state(), Batch(tokens=jnp.arange(6).reshape(2, 3))
    moving = jax.tree.map(lambda x: x + 1, state["params"])
    checkpoints = open_checkpoints(keep=3)
    checkpoints.save(1, state, {}, {"experience": batch})
    checkpoints.save(2, state, {})
    checkpoints.save(3, state, {"cursor": 3}, {"reference": moving, "leftovers": batch})
    like = jax.eval_shape(lambda: {"experience": batch, "reference": moving})
    others = [checkpoints.restore(step, state, like)[2] for step in (1, 2, 3)]
    assert [set(item) for item in others] == [{"experience"}, set(), {"reference"}]
    assert_same_bits(others[0]["experience"], batch)
    assert_same_bits(others[2]["reference"], moving)
    assert checkpoints.restore(1, state)[2] == {}
    step, restored, extra, latest = checkpoints.restore_latest(state, {"leftovers": batch})
    assert (step, extra) == (3, {"cursor": 3})
    assert_same_bits(restored, state)
    assert_same_bits(latest, {"leftovers": batch})
    with pytest.raises(ValueError, match=r"another configuration.*experience: ref_log_probs: found nothing"):
        checkpoints.restore(1, state, {"experience": batch.replace(ref_log_probs=jnp.zeros((2, 3)))})


def test_a_template_may_be_a_function_of_the_stored_rows(open_checkpoints):
    state, asked = make_state(), []

    def rows(count):
        # The first leaf in the order of the fields, not of the alphabet.
        return Batch(tokens=jnp.arange(3 * count).reshape(count, 3), ref_log_probs=jnp.zeros(()))

    def template(num_rows):
        asked.append(num_rows)
        return jax.eval_shape(lambda: rows(num_rows))

    checkpoints = open_checkpoints(keep=3)
    checkpoints.save(1, state, {})
    for step, count in ((2, 5), (3, 1)):
        checkpoints.save(step, state, {}, {"leftovers": rows(count)})
        others = checkpoints.restore(step, state, {"leftovers": template})[2]
        assert_same_bits(others["leftovers"], rows(count))
    assert checkpoints.restore(1, state, {"leftovers": template})[2] == {} and asked == [5, 1]
    with pytest.raises(ValueError, match=r"tokens: found int32\[5, 3\], expected int32\[6, 3\]"):
        checkpoints.restore(2, state, {"leftovers": lambda num_rows: rows(num_rows + 1)})


def test_others_that_cannot_be_stored_are_refused(open_checkpoints):
    state, checkpoints = make_state(), open_checkpoints()
    with pytest.raises(
        ValueError, match=r"items \['state'\] are unknown; there are experience, leftovers, ref"
    ):
        checkpoints.save(1, state, {}, {"state": state})
    with pytest.raises(ValueError, match=r"leaf leftovers/tokens has shape \(0, 3\): empty arrays are not"):
        checkpoints.save(1, state, {}, {"leftovers": Batch(tokens=jnp.zeros((0, 3)))})
    with pytest.raises(ValueError, match="item experience: the pytree has no leaves"):
        checkpoints.save(1, state, {}, {"experience": None})
    assert checkpoints.steps() == []
    checkpoints.save(1, state, {}, {"leftovers": {"count": jnp.zeros(())}})
    for restore in (checkpoints.restore_latest, lambda *templates: checkpoints.restore(1, *templates)):
        with pytest.raises(ValueError, match=r"items \['rest'\] are unknown"):
            restore(state, {"rest": state})
        with pytest.raises(ValueError, match="item leftovers has no rows to count: its first leaf count is"):
            restore(state, {"leftovers": lambda num_rows: state})


def test_the_caller_may_donate_its_state_right_after_saving(open_checkpoints):
    # Large enough that the write is still under way while XLA overwrites the donated buffers.
    state = {"w": jax.random.normal(jax.random.key(0), (2_000_000,)), "n": jnp.zeros((), jnp.int32)}
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    jax.block_until_ready(update(jax.tree.map(jnp.copy, state)))  # compiled beforehand
    # Orbax may copy once more, which would hide that we did not.
    assert not np.shares_memory(to_host(state, "state")["w"], np.asarray(state["w"]))
    checkpoints = open_checkpoints()
    pointer = state["w"].unsafe_buffer_pointer()
    checkpoints.save(1, state, {})
    new = jax.block_until_ready(update(state))
    assert state["w"].is_deleted()
    assert new["w"].unsafe_buffer_pointer() == pointer  # it was overwritten in place
    assert_same_bits(checkpoints.restore(1, new)[0], expected)


def test_numpy_state_may_be_overwritten_right_after_saving(open_checkpoints):
    state = {"w": np.ones((1_000_000,), np.float32)}
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {})
    state["w"][:] = 5
    assert (np.asarray(checkpoints.restore(1, state)[0]["w"]) == 1).all()


def test_a_restored_state_compiles_nothing_new_and_can_be_donated(open_checkpoints):
    traces = []

    def step(state, x):
        traces.append(1)
        return state.apply_gradients(grads={"w": state.params["w"] * x})

    jitted = jax.jit(step, donate_argnums=0)
    start = {"w": jnp.arange(4.0)}
    # flax starts its step counter at the Python int 0, so that it is weakly typed.
    fresh = TrainState.create(apply_fn=None, params=start, tx=optax.adam(1e-2))
    checkpoints = open_checkpoints()
    checkpoints.save(1, fresh, {})
    template = jax.eval_shape(lambda: fresh)
    state = jitted(fresh, 2.0)
    checkpoints.save(2, state, {})
    expected = jitted(state, 2.0)
    count = len(traces)
    for saved in (2, 1):
        restored = checkpoints.restore(saved, template)[0]
        for leaf in jax.tree.leaves(restored):
            assert not leaf.committed and leaf.devices() == {jax.devices()[0]}
        assert restored.step.weak_type
        restored = jitted(restored, 2.0)
        if saved == 2:
            assert_same_bits(restored, expected)
    assert len(traces) == count == 1


def test_restored_arrays_follow_the_template_structure(open_checkpoints):
    state = make_state()
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {})
    assert type(checkpoints.restore(1, state)[0]["opt_state"][1][0]).__name__ == "ScaleByAdamState"


# --- strictness ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "odd": jnp.zeros(5)}, r"odd: found float32\[4\], expected float32\[5\]"),
        (
            lambda s: {**s, "odd": s["odd"].astype(jnp.bfloat16)},
            r"found float32\[4\], expected bfloat16\[4\]",
        ),
        (lambda s: {**s, "new": jnp.zeros(2)}, r"new: found nothing, expected float32\[2\]"),
        (lambda s: {k: v for k, v in s.items() if k != "odd"}, r"odd: found float32\[4\], expected nothing"),
        (lambda s: {"other": s["odd"]}, r"other: found nothing.*\(and \d+ more\)"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(open_checkpoints, change, message):
    checkpoints = open_checkpoints()
    checkpoints.save(1, make_state(), {})
    with pytest.raises(ValueError, match="written by another configuration: .*" + message) as raised:
        checkpoints.restore_latest(change(make_state()))
    assert not isinstance(raised.value, CorruptedCheckpoint)
    assert "\n" not in str(raised.value)
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"k": jax.random.key(0)}, r"k is a typed PRNG key"),
        ({"n": np.arange(3)}, r"n is int64, which jit turns into int32"),
        ({"e": jnp.zeros((0, 3))}, r"e has shape \(0, 3\)"),
        ({"w": jnp.stack([jnp.asarray(1.0), jnp.asarray(2.0)])}, "w is a weakly typed array"),
        ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, "two leaves have this name"),
        ({}, "no leaves"),
    ],
)
def test_a_state_that_cannot_be_stored_faithfully_is_refused(open_checkpoints, state, message):
    checkpoints = open_checkpoints()
    with pytest.raises(ValueError, match=message):
        checkpoints.save(1, state, {})
    assert checkpoints.steps() == []


@pytest.mark.parametrize(
    "extra", [{"a": (1, 2)}, {1: 2}, {"a": float("nan")}, {"a": np.float32(1)}, {"_leaves": 1}]
)
def test_extra_that_is_not_plain_json_is_refused(open_checkpoints, extra):
    with pytest.raises(ValueError, match="checkpoint extra"):
        open_checkpoints().save(1, make_state(), extra)


def test_steps_only_grow_and_old_ones_go(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=2)
    for step in (1, 5, 9):
        checkpoints.save(step, make_state(step), {})
    assert checkpoints.steps() == [5, 9]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"5", "9"}
    for step in (9, 3):
        with pytest.raises(ValueError, match=f"step {step} is not after step 9"):
            checkpoints.save(step, make_state(), {})
    with pytest.raises(ValueError, match=r"no checkpoint of step 1 .*there are \[5, 9\]"):
        checkpoints.restore(1, make_state())
    with pytest.raises(ValueError, match="no checkpoint in"):
        open_checkpoints(tmp_path / "empty").restore_latest(make_state())


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written"):
            Checkpoints(path, keep=1)
    with pytest.raises(ValueError, match="keep at least 1"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="does not exist"):
        Checkpoints(tmp_path / "missing", read_only=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_write_protected_directory_is_refused_at_once(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        Checkpoints(tmp_path, keep=1)


def test_a_relative_directory_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run/checkpoints", keep=1)
    checkpoints.save(1, make_state(), {})
    monkeypatch.chdir("/")
    checkpoints.close()
    assert (tmp_path / "run/checkpoints/1/state").is_dir()


# --- the frozen reference ------------------------------------------------------------------------


def test_the_reference_is_saved_once(open_checkpoints):
    params = make_state()["params"]
    checkpoints = open_checkpoints()
    assert not checkpoints.has_reference()
    with pytest.raises(ValueError, match="no reference"):
        checkpoints.restore_reference(params)
    checkpoints.save_reference(params)
    with pytest.raises(ValueError, match="saved once"):
        checkpoints.save_reference(params)
    checkpoints.save(1, make_state(1), {})
    checkpoints.close()
    checkpoints = open_checkpoints()
    assert checkpoints.has_reference() and checkpoints.steps() == [1]
    assert_same_bits(checkpoints.restore_reference(jax.eval_shape(lambda: params)), params)
    assert_same_bits(open_checkpoints(read_only=True).restore_reference(params), params)


# --- manners -------------------------------------------------------------------------------------


def test_an_ordinary_run_prints_nothing(tmp_path):
    code = """
import logging, sys, numpy as np
logging.basicConfig(level=logging.INFO)
from grpo_jax.checkpoints.manager import Checkpoints, CorruptedCheckpoint
from grpo_jax.checkpoints.format import to_host
checkpoints = Checkpoints(sys.argv[1], keep=1)
for step in (1, 2, 3):
    checkpoints.save(step, {"w": np.ones(10, np.float32)}, {})
checkpoints.restore_latest({"w": np.ones(10, np.float32)})
checkpoints.save_reference({"w": np.ones(10, np.float32)})
checkpoints.close()
Checkpoints(sys.argv[1], read_only=True).close()
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ours = [line for line in (result.stdout + result.stderr).splitlines() if "jax._src" not in line]
    assert ours == []


def test_other_users_of_absl_keep_their_log(tmp_path, caplog):
    Checkpoints(tmp_path).close()
    with caplog.at_level(logging.WARNING, logger="absl"):
        logging.getLogger("absl").warning("somebody else's")
    assert "somebody else's" in caplog.text


def test_a_small_state_is_saved_fast(open_checkpoints):
    state = {f"w{i}": jnp.ones((2500,)) for i in range(100)}  # 1 MB
    checkpoints = open_checkpoints()
    seconds = []
    for step in range(5):
        start = time.monotonic()
        checkpoints.save(step, state, {})
        checkpoints.wait()
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.3, seconds


def test_checkpoints_are_plain_orbax(open_checkpoints, tmp_path):
    import orbax.checkpoint as ocp

    checkpoints = open_checkpoints()
    checkpoints.save(1, make_state(), {"cursor": 4})
    checkpoints.wait()
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "checkpoints/1/state")
    assert (
        np.asarray(tree["params/h/1/w"]).tobytes()
        == np.asarray(make_state()["params"]["h"][1]["w"]).tobytes()
    )
    assert json.loads((tmp_path / "checkpoints/1/extra/metadata").read_text())["cursor"] == 4
