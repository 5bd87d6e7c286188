"""Finds the local directory of a model's name, which is a path, a hub id, or a packaged model."""

import json
from importlib.resources import files
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from grpo_jax.models.hf_config import read_config
from grpo_jax.models.implementations import choose_implementation

PACKAGED = Path(str(files("grpo_jax"))) / "packaged"
ADAPTER_CONFIG = "adapter_config.json"
# Patterns of everything but the weights.
_SMALL_FILES = [
    "README.md",  # for the license
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.index.json",
    ADAPTER_CONFIG,
]


def find_directory(name: str, *, revision: str | None) -> Path:
    """Returns the local directory of a model. It downloads a model named by a hub id."""
    path = local_directory(name)
    if path is None:
        return _download(name, revision)
    packaged = name.removeprefix("packaged:")
    if revision is not None:
        raise ValueError(f"revision {revision!r} is for hub ids; {name} is local")
    if packaged != name and ("/" in packaged or not path.is_dir()):
        names = ", ".join(sorted(p.name for p in PACKAGED.glob("*/"))) or "none"
        raise FileNotFoundError(f"{name}: no such packaged model; there are: {names}")
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: no such directory")
    return path


def local_directory(name: str) -> Path | None:
    """Returns the path that a model's name means, which may not exist, or None for a hub id."""
    packaged = name.removeprefix("packaged:")
    if packaged != name:
        return PACKAGED / packaged
    if name.startswith("python:"):  # a model that a Python program gave as an object
        return Path(name.removeprefix("python:"))
    path = Path(name).expanduser()
    is_path = path.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1
    return path if is_path else None


def check_no_adapter(directory: Path, name: str) -> None:
    """Raises ValueError if a directory holds a PEFT adapter and no model."""
    content = read_json(directory / ADAPTER_CONFIG)
    weights = ("model*.safetensors", "flax_model*.msgpack", "*.index.json")
    if content is None or any(any(directory.glob(pattern)) for pattern in weights):
        return
    base = content.get("base_model_name_or_path") or "its base model"
    raise ValueError(
        f"{name}: this is a PEFT adapter, not a model. To go on from it, give {base} as model.hf_model_name "
        "and the adapter as lora.start_from; or merge it first, by merge_and_unload() in PEFT"
    )


def _download(name: str, revision: str | None) -> Path:
    # The configuration comes first, so that a model that will be refused costs no gigabytes. Then comes the
    # first format that exists.
    stages = (_SMALL_FILES, ["model.safetensors", "model-*.safetensors"], ["flax_model*.msgpack"])
    try:
        for patterns in stages:
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
            if patterns is _SMALL_FILES:
                raw = read_json(folder / "config.json")
                if raw is None:
                    check_no_adapter(folder, name)
                else:
                    choose_implementation(read_config(raw, name), "auto", source=name)
            if any(folder.glob("*.safetensors")) or any(folder.glob("*.msgpack")):
                break
        return folder
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{name}: the hub has no revision {revision!r} of it") from None
    except (RepositoryNotFoundError, HFValidationError):
        reason = "the hub has no such (public) model"
    except OSError as error:
        if error.errno is not None:  # the disk, not the client's connection errors
            raise
        reason = "the hub could not be reached, and the model is not in the local cache"
    raise FileNotFoundError(f"{name}: no such directory here, and {reason}; a local directory works offline")


def read_json(path: Path) -> dict | None:
    """Returns the contents of a JSON file, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content
