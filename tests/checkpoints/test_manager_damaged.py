"""Checkpoints that are damaged, cannot be written or are cut off by a kill: found out, and whole before."""

import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_state import assert_same_bits, make_state, opened_in

from grpo_jax.checkpoints.manager import CorruptedCheckpoint


@pytest.fixture
def open_checkpoints(tmp_path):
    yield from opened_in(tmp_path / "checkpoints")


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


def test_rows_are_counted_in_the_checkpoint_that_is_restored(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=3)
    for step, count in ((1, 5), (2, 1), (3, 2)):
        checkpoints.save(step, make_state(), {}, {"leftovers": {"tokens": jnp.arange(count)}})
    checkpoints.wait()
    flip_a_bit(tmp_path / "checkpoints/3", "leftovers/tokens")
    (tmp_path / "checkpoints/2/extra/metadata").write_text("{}")
    templates = {"leftovers": lambda num_rows: {"tokens": jnp.zeros(num_rows, jnp.int32)}}
    with pytest.warns(UserWarning, match="going back to the checkpoint of step 1"):
        step, _, _, others = checkpoints.restore_latest(make_state(), templates)
    assert step == 1 and checkpoints.steps() == [1]
    assert_same_bits(others["leftovers"]["tokens"], jnp.arange(5))


def test_a_damaged_reference_is_an_error(open_checkpoints, tmp_path):
    params, checkpoints = make_state()["params"], open_checkpoints()
    checkpoints.save_reference(params)
    flip_a_bit(tmp_path / "checkpoints/reference/0", below="state/h")
    with pytest.raises(CorruptedCheckpoint, match="reference/0/state"):
        checkpoints.restore_reference(params)


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


# --- a full disk ---------------------------------------------------------------------------------


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
from grpo_jax.checkpoints.manager import Checkpoints, CorruptedCheckpoint
from grpo_jax.checkpoints.format import to_host
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
