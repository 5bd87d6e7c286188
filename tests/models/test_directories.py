"""The hub, without a network: what is downloaded, in which order, and what each refusal says."""

import fnmatch
import shutil
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from grpo_jax.models.directories import find_directory

FIXTURE = Path(__file__).parents[1] / "fixtures" / "models" / "gpt2"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one model; returns (its files, the local snapshot, the file names downloaded)."""
    files, snapshot, downloaded = tmp_path / "files", tmp_path / "snapshot", []
    shutil.copytree(FIXTURE, files)
    snapshot.mkdir()

    def snapshot_download(name, *, revision, allow_patterns):
        assert (name, revision) == ("owner/model", "v1")
        for file in sorted(files.iterdir()):
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
                downloaded.append(file.name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return files, snapshot, downloaded


def test_weights_are_downloaded_once_and_in_one_format(hub):
    files, snapshot, downloaded = hub
    for name in ("flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"):
        (files / name).write_bytes(b"")
    assert find_directory("owner/model", revision="v1") == snapshot
    assert "model.safetensors" in downloaded
    assert not {"flax_model.msgpack", "pytorch_model.bin", "tf_model.h5", "reference.npz"} & set(downloaded)


def test_msgpack_is_second_choice(hub):
    files, _, downloaded = hub
    (files / "model.safetensors").rename(files / "flax_model.msgpack")
    find_directory("owner/model", revision="v1")
    assert "flax_model.msgpack" in downloaded


def test_a_refused_model_costs_no_download_of_weights(hub):
    files, _, downloaded = hub
    (files / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="owner/model: model type 'mamba' is not supported"):
        find_directory("owner/model", revision="v1")
    assert "model.safetensors" not in downloaded


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RevisionNotFoundError, "the hub has no revision 'v9'"),
        (RepositoryNotFoundError, r"the hub has no such \(public\) model; a local directory works"),
        (ConnectionError, "could not be reached"),
    ],
)
def test_hub_errors_are_one_line(monkeypatch, error, reason):
    failure = (
        error("long\nstory", response=mock.Mock()) if error is not ConnectionError else error("long\nstory")
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=failure))
    with pytest.raises(FileNotFoundError, match=reason) as refused:
        find_directory("owner/model", revision="v9")
    assert "\n" not in str(refused.value)


def test_a_full_disk_is_not_taken_for_a_missing_network(monkeypatch):
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        find_directory("owner/model", revision=None)
