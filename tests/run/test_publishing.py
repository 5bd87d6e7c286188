"""Uploads to the hub, against an API object that keeps what it is asked."""

from types import SimpleNamespace

import huggingface_hub
import pytest
import requests
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from grpo_jax import export
from grpo_jax.run.publishing import check_push, push


class Repository(str):
    repo_id = "me/adder"


@pytest.fixture
def hub(monkeypatch):
    """What the hub was asked, and its failures by the name of the method."""
    hub = SimpleNamespace(asked=[], failures={})

    def method(name, result=None):
        def call(self, *args, **kwargs):
            hub.asked.append((name, args, kwargs))
            if name in hub.failures:
                raise hub.failures[name]
            return result

        return call

    methods = {
        "whoami": method("whoami"),
        "create_repo": method("create_repo", Repository("https://huggingface.co/me/adder")),
        "upload_folder": method("upload_folder"),
    }
    monkeypatch.setattr(huggingface_hub, "HfApi", type("HfApi", (), methods))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return hub


def refused(status):
    response = requests.Response()
    response.status_code = status
    return HfHubHTTPError("first line\nRequest ID: hf_secret", response=response)


def test_one_commit_of_the_directory(hub, tmp_path):
    check_push("adder", tmp_path / "new")
    address = push("adder", tmp_path, private=True, message="Add the model of step 7")
    assert address == "https://huggingface.co/me/adder"
    settings = {"repo_id": "me/adder", "folder_path": tmp_path, "commit_message": "Add the model of step 7"}
    assert hub.asked == [
        ("whoami", (), {}),
        ("create_repo", ("adder",), {"private": True, "exist_ok": True}),
        ("upload_folder", (), settings),
    ]


def error(function, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert text.startswith("push_to_hub: ") and "\n" not in text and "hf_secret" not in text
    return text


def test_what_is_wrong_is_said_before_the_export(hub, tmp_path, monkeypatch):
    new = tmp_path / "new"
    assert "'a/b/c' is no name of the hub" in error(check_push, "a/b/c", new)
    hub.failures["whoami"] = refused(401)
    assert "does not take the token: status 401" in error(check_push, "adder", new)
    hub.failures["whoami"] = requests.ConnectionError("long text")
    assert "could not be reached (ConnectionError)" in error(check_push, "adder", new)
    hub.failures["whoami"] = OfflineModeIsEnabled("x")
    assert "HF_HUB_OFFLINE is set" in error(check_push, "adder", new)
    (tmp_path / "private.txt").write_text("not for everybody")
    assert "has files already" in error(check_push, "adder", tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "there is no token" in error(check_push, "adder", new)


@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
def test_an_upload_that_fails_leaves_the_directory(hub, tmp_path, method):
    hub.failures[method] = refused(403)
    text = error(push, "me/adder", tmp_path, private=False, message="m")
    assert f"{tmp_path} is written but not published as me/adder: status 403" in text


def test_the_command_publishes_only_when_it_is_asked(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "read_config", lambda run: None)
    monkeypatch.setattr(export, "load_run", lambda run, step: (SimpleNamespace(params=None), 7))
    monkeypatch.setattr(export, "save_model", lambda *args, **kwargs: None)
    monkeypatch.setattr(export, "write_card", lambda *args, **kwargs: None)
    to = tmp_path / "out"
    assert export.main(["run", f"--to={to}"]) == 0
    assert hub.asked == []
    assert export.main(["run", f"--to={to}", "--push_to_hub=me/adder", "--private"]) == 0
    assert [name for name, _, _ in hub.asked] == ["whoami", "create_repo", "upload_folder"]
    assert hub.asked[1][2]["private"] is True
    assert "published it as https://huggingface.co/me/adder" in capsys.readouterr().out


def test_private_is_for_a_repository(monkeypatch):
    monkeypatch.setattr(export, "read_config", lambda run: None)
    with pytest.raises(ValueError, match="private: it is for push_to_hub"):
        export.main(["run", "--to=out", "--private"])
