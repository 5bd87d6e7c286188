"""Uploads an exported model to the Hugging Face hub, when the user asks for it."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled


def check_push(name: str, directory: str | Path) -> None:
    """Checks that a model can be published, before it takes minutes to write it.

    Args:
        name: name of the repository, `owner/name`, or `name` for the owner of the token.
        directory: directory that is going to be written.

    Raises:
        ValueError: the name is none of the hub, there is no token, the hub refuses it or cannot be reached,
            or the directory holds files already.
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"push_to_hub: {name!r} is no name of the hub; give owner/name or name, of letters, digits, `-`, "
            "`_` and `.`"
        ) from None
    if huggingface_hub.get_token() is None:
        raise ValueError(
            "push_to_hub: there is no token of the Hugging Face hub; run `hf auth login`, or set HF_TOKEN"
        )
    if Path(directory).is_dir() and any(Path(directory).iterdir()):
        raise ValueError(
            f"push_to_hub: {directory} has files already, which would be published as well; give a new "
            "directory"
        )
    try:
        huggingface_hub.HfApi().whoami()
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(f"push_to_hub: the hub does not take the token: {_reason(error)}") from None


def push(name: str, directory: str | Path, *, private: bool, message: str) -> str:
    """Uploads all files of a directory as one commit. The repository is made if it does not exist.

    Args:
        name: name of the repository, `owner/name`, or `name` for the owner of the token.
        directory: directory of the exported model.
        private: whether a new repository is private. One that exists stays as it is.
        message: message of the commit.

    Returns:
        the address of the repository.

    Raises:
        ValueError: the hub refuses it or cannot be reached.
    """
    api = huggingface_hub.HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=directory, commit_message=message)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"push_to_hub: {directory} is written but not published as {name}: {_reason(error)}"
        ) from None
    return str(repository)


def _reason(error: Exception) -> str:
    """Returns one line for an error of the hub, whose own text is long and has an id of the request."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"status {response.status_code}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"it could not be reached ({type(error).__name__})"
