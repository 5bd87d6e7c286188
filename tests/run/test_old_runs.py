"""A run that an older version of the package left behind goes on, to the bits that this version would reach.

scripts/make_run_fixtures.py wrote the fixtures, with the code of commit add4bed.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import small_run
from old_runs import platform, state_of
from safetensors.numpy import load_file

from grpo_jax import export, train

RUNS = Path(__file__).parents[1] / "fixtures" / "old_runs"
# name -> the arrays in its checkpoint, beside the state
NAMES = {"plain": set(), "dapo": {"experience", "leftovers", "reference"}, "lora": {"experience"}}
# On another processor, sums are rounded otherwise.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=NAMES)
def name(request, tmp_path, monkeypatch):
    """The name of a run that broke off, which lies in the working directory, with the same run as a whole."""
    place = tmp_path / "runs"
    shutil.copytree(RUNS, place, ignore=shutil.ignore_patterns("*.tar.gz"))
    with tarfile.open(RUNS / f"{request.param}.tar.gz") as archive:
        archive.extractall(place, filter="data")
    monkeypatch.chdir(place)
    return request.param


def same_platform() -> bool:
    """Says whether this machine computes the same bits as the one that made the fixtures."""
    return json.loads((RUNS / "platform.json").read_text()) == json.loads(json.dumps(platform()))


def assert_close(actual, expected):
    """Asserts that two rows, or arrays by their names, are equal but for rounding."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, str | None):
            assert actual[key] == value, key
        else:
            np.testing.assert_allclose(actual[key], value, **TOLERANCE, err_msg=key)


def weights(run_dir):
    return load_file(Path(run_dir, "hf", "model.safetensors"))


def test_the_fixtures_are_what_they_claim(name):
    broken, whole = state_of(name), state_of(f"{name}_whole")
    assert (broken["step"], whole["step"]) == (3, 8)
    assert broken["items"].keys() == {"state", *NAMES[name]}
    assert [row["step"] for row in small_run.rows(name)][-1] == 4  # the row of step 4 outlived its state
    assert not Path(name, "hf").exists()


def test_the_run_goes_on_to_the_same_bits(name, capsys):
    assert train.main([f"--config={name}"]) == 0
    assert "continuing after step 3 of 8" in capsys.readouterr().out
    assert train.main([f"--config={name}_whole", "--run_dir=today"]) == 0
    assert state_of(name)["step"] == state_of("today")["step"] == 8
    for other in (f"{name}_whole", "today"):
        assert_same_run(name, other)


def assert_same_run(run_dir, other):
    """Asserts that two runs have the same rows and end in the same state.

    On another platform they differ by rounding.
    """
    same = same_platform()
    for table in ("metrics", "completions"):
        mine = small_run.rows(run_dir, table)
        theirs = small_run.rows(other, table)
        if same:
            assert mine == theirs
        for row, expected in zip(mine, theirs, strict=True):
            assert_close(row, expected)
    if same:
        assert state_of(run_dir)["items"]["state"] == state_of(other)["items"]["state"]
        assert_same_bits(weights(run_dir), weights(other))
    assert_close(weights(run_dir), weights(other))


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and actual[key].tobytes() == value.tobytes(), key


def test_its_checkpoint_is_exported(name):
    assert export.main([name, "--to=exported"]) == 0
    assert load_file("exported/model.safetensors").keys() == weights(f"{name}_whole").keys()
