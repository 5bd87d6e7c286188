"""Checkpoints: bit-exact, strict, verified, and whole after a kill at any time."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from grpo_jax.checkpoints import Checkpoints, CorruptedCheckpoint, _to_host


def make_state(seed=0, size=64):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "h": [{"w": jax.random.normal(keys[0], (size, 8))}, {"w": jax.random.normal(keys[1], (8,))}],
        "half": jax.random.normal(keys[2], (3, 5)).astype(jnp.bfloat16),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "params": params,
        "opt_state": tx.init(params),
        "step": jnp.asarray(seed, jnp.int32),
        "flags": jnp.array([True, False]),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32),
        "key": jax.random.key_data(jax.random.key(seed)),
    }


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert a.tobytes() == e.tobytes()


@pytest.fixture
def open_checkpoints(tmp_path):
    opened = []

    def open_(directory=tmp_path / "checkpoints", **keywords):
        opened.append(Checkpoints(directory, **{"keep": 2, **keywords}))
        return opened[-1]

    yield open_
    for checkpoints in opened:
        checkpoints.close()


@flax.struct.dataclass
class Batch:
    tokens: jax.Array
    ref_log_probs: jax.Array | None = None


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


def test_a_template_may_be_a_function_of_the_stored_rows(open_checkpoints, tmp_path):
    state, asked = make_state(), []

    def rows(count):
        # The first leaf in the order of the fields, not of the alphabet.
        return Batch(tokens=jnp.arange(3 * count).reshape(count, 3), ref_log_probs=jnp.zeros(()))

    def template(num_rows):
        asked.append(num_rows)
        return jax.eval_shape(lambda: rows(num_rows))

    checkpoints = open_checkpoints(keep=4)
    checkpoints.save(1, state, {})
    for step, count in ((2, 5), (3, 1), (4, 2)):
        checkpoints.save(step, state, {}, {"leftovers": rows(count)})
        assert_same_bits(
            checkpoints.restore(step, state, {"leftovers": template})[2]["leftovers"], rows(count)
        )
    assert checkpoints.restore(1, state, {"leftovers": template})[2] == {} and asked == [5, 1, 2]
    with pytest.raises(ValueError, match=r"tokens: found int32\[5, 3\], expected int32\[6, 3\]"):
        checkpoints.restore(2, state, {"leftovers": lambda num_rows: rows(num_rows + 1)})
    # Rows are counted in the checkpoint that is restored, not in the newest.
    flip_a_bit(tmp_path / "checkpoints/4", "leftovers/tokens")
    (tmp_path / "checkpoints/3/extra/metadata").write_text("{}")
    with pytest.warns(UserWarning, match="going back to the checkpoint of step 2"):
        step, _, _, others = checkpoints.restore_latest(state, {"leftovers": template})
    assert step == 2 and asked == [5, 1, 2, 2, 5]
    assert_same_bits(others["leftovers"], rows(5))
    assert checkpoints.steps() == [1, 2]


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
    assert not np.shares_memory(_to_host(state, "state")["w"], np.asarray(state["w"]))
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


# --- damage --------------------------------------------------------------------------------------


def a_chunk(step, below="state/params"):
    chunks = sorted((step / below).rglob("[0-9]*"))
    return next(path for path in chunks if path.is_file())


def flip_a_bit(step, below="state/params"):
    path = a_chunk(step, below)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def lose_a_chunk(step):
    a_chunk(step).unlink()


def change_extra(step):
    path = step / "extra" / "metadata"
    path.write_text(path.read_text().replace('"cursor": 2', '"cursor": 3'))


def truncate_everything(step):
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def lose_everything(step):
    for path in step.rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lose_a_chunk, change_extra, truncate_everything, lose_everything]
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(open_checkpoints, tmp_path, damage):
    checkpoints = open_checkpoints()
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"cursor": step})
    checkpoints.close()
    damage(tmp_path / "checkpoints" / "2")
    checkpoints = open_checkpoints()
    with pytest.raises(CorruptedCheckpoint, match=r"corrupted checkpoint: .*/2/"):
        checkpoints.restore(2, make_state())
    with pytest.warns(
        UserWarning, match=r"corrupted checkpoint: .*/2/.*going back to the checkpoint of step 1"
    ):
        step, state, extra, _ = checkpoints.restore_latest(make_state())
    assert (step, extra) == (1, {"cursor": 1})
    assert_same_bits(state, make_state(1))
    assert checkpoints.steps() == [1]
    assert (tmp_path / "checkpoints/corrupted/2").is_dir()
    checkpoints.save(2, make_state(5), {})  # the run goes on over the same steps
    assert_same_bits(checkpoints.restore_latest(make_state())[1], make_state(5))


def test_damage_everywhere_is_an_error(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    checkpoints.save(1, make_state(), {})
    checkpoints.wait()
    flip_a_bit(tmp_path / "checkpoints" / "1")
    with pytest.raises(ValueError, match=r"no step is whole: corrupted checkpoint: .*/1/state"):
        checkpoints.restore_latest(make_state())
    assert checkpoints.steps() == [1]


def test_read_only_leaves_a_running_save_alone(open_checkpoints, tmp_path):
    writer = open_checkpoints()
    for step in (1, 2):
        writer.save(step, make_state(step), {})
    writer.wait()
    directory = tmp_path / "checkpoints"
    flip_a_bit(directory / "2")
    (directory / "3.orbax-checkpoint-tmp").mkdir()  # another process is writing
    reader = open_checkpoints(read_only=True)
    before = sorted(p.name for p in directory.iterdir())
    with pytest.warns(UserWarning, match="going back"):
        assert reader.restore_latest(make_state())[0] == 1
    with pytest.raises(ValueError, match="read only"):
        reader.save(4, make_state(), {})
    reader.close()
    assert sorted(p.name for p in directory.iterdir()) == before


def test_an_error_in_the_background_surfaces_and_saving_goes_on(open_checkpoints, tmp_path, capfd):
    big = {"w": jax.random.normal(jax.random.key(0), (1_000_000,))}
    checkpoints = open_checkpoints(keep=1)
    checkpoints.save(1, big, {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for surface in (checkpoints.wait, lambda: checkpoints.save(3, big, {}), checkpoints.latest_step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # a full disk, nearly
        try:
            with pytest.raises(RuntimeError, match="the checkpoint of step 2 could not be written") as raised:
                checkpoints.save(2, big, {})
                surface()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(raised.value)
        assert checkpoints.steps() == [1]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]  # no space is lost
    other = open_checkpoints(tmp_path / "other")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="the checkpoint of step 2 could not be written"):
            other.save(2, big, {})
            other.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in capfd.readouterr().err
    checkpoints.save(2, big, {})
    assert checkpoints.steps() == [2]
    assert_same_bits(checkpoints.restore_latest(big)[1], big)


# --- killed at any time --------------------------------------------------------------------------

KILLED = """
import sys, numpy as np
from grpo_jax.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
state = {f"w{i}": np.full((100_000,), i, np.float32) for i in range(300)}
if sys.argv[2] == "reference":
    checkpoints.save_reference(state)
checkpoints.save(1, state, {"cursor": 1})
checkpoints.wait()
checkpoints.save(2, state, {"cursor": 2})
checkpoints.wait()
"""


def kill_when(pattern, directory, what):
    """Runs KILLED and sends it SIGKILL as soon as a path matches."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(directory), what])
    deadline = time.monotonic() + 60
    while not any(directory.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_checkpoint(open_checkpoints, tmp_path):
    directory = tmp_path / "checkpoints"
    kill_when("2.*/state*/w*", directory, "state")
    left = [p.name for p in directory.iterdir()]
    assert "2" not in left and any(name.startswith("2.") for name in left), left
    checkpoints = open_checkpoints()
    assert {p.name for p in directory.iterdir()} == {"1"}
    template = {f"w{i}": np.zeros((100_000,), np.float32) for i in range(300)}
    step, state, extra, _ = checkpoints.restore_latest(template)
    assert (step, extra) == (1, {"cursor": 1})
    assert all((np.asarray(state[f"w{i}"]) == i).all() for i in range(300))
    checkpoints.save(2, state, {})
    assert checkpoints.steps() == [1, 2]


def test_a_kill_in_the_middle_of_saving_the_reference_lets_it_be_saved_again(open_checkpoints, tmp_path):
    directory = tmp_path / "checkpoints"
    kill_when("reference/0.*/state*/w*", directory, "reference")
    checkpoints = open_checkpoints()
    assert not checkpoints.has_reference()
    checkpoints.save_reference({"w": jnp.arange(3.0)})
    assert {p.name for p in (directory / "reference").iterdir()} == {"0"}


def test_the_reference_is_saved_once_and_verified(open_checkpoints, tmp_path):
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
    flip_a_bit(tmp_path / "checkpoints/reference/0", below="state/h")
    with pytest.raises(CorruptedCheckpoint, match="reference/0/state"):
        checkpoints.restore_reference(params)


# --- manners -------------------------------------------------------------------------------------


def test_an_ordinary_run_prints_nothing(tmp_path):
    code = """
import logging, sys, numpy as np
logging.basicConfig(level=logging.INFO)
from grpo_jax.checkpoints import Checkpoints
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
