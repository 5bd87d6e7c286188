"""Opens the fast tokenizer of a model's directory, whichever version of transformers wrote it.

transformers 5 writes names into tokenizer_config.json that version 4 does not know: the class
`TokenizersBackend`, and a list under `extra_special_tokens`. Its tokenizer.json is complete, so such a
tokenizer is made from that file as it is.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from grpo_jax.models.directories import read_json

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# Notes of transformers 5 about itself, and settings of the backend that tokenizer.json has as well.
_NOTES_OF_V5 = (
    "tokenizer_class",
    "backend",
    "is_local",
    "local_files_only",
    "name_or_path",
    "tokenizer_file",
    "files_loaded",
    "added_tokens_decoder",
    "add_prefix_space",
    "extra_special_tokens",
    "model_specific_special_tokens",
)


def load_tokenizer(directory: Path, source: str) -> PreTrainedTokenizerFast:
    """Loads the fast tokenizer of a directory.

    Args:
        directory: directory with tokenizer.json, or the vocabulary files of a class that transformers knows.
        source: name of the tokenizer in messages.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: the tokenizer does not load, or loads only as a slow one.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{source}: no tokenizer in {directory} (tokenizer.json or vocabulary files)")
    config = read_json(directory / "tokenizer_config.json") or {}
    if "auto_map" in config:
        raise ValueError(
            f"{source}: tokenizer_config.json has `auto_map`, code from the author; it is never run"
        )
    is_v5 = _is_of_v5(config)
    if is_v5 and not (directory / "tokenizer.json").is_file():
        raise ValueError(
            f"{source}: the tokenizer is of class {config.get('tokenizer_class')}, saved by transformers 5, "
            "but there is no tokenizer.json; save it again as a fast tokenizer"
        )
    try:
        if is_v5:
            tokenizer = _from_tokenizer_json(directory, config)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory), use_fast=True, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # the many ways in which transformers says no
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{source}: the tokenizer does not load: {type(error).__name__}: {reason}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{source}: {type(tokenizer).__name__} is a slow tokenizer; a tokenizer.json is needed"
        )
    return tokenizer


def is_fast(tokenizer: Any) -> bool:
    """Says whether an object is a fast tokenizer of transformers."""
    return isinstance(tokenizer, PreTrainedTokenizerFast)


def _is_of_v5(config: dict[str, Any]) -> bool:
    """Says whether transformers 5 wrote the config, or it names a class that only version 5 has."""
    if "backend" in config or isinstance(config.get("extra_special_tokens"), list):
        return True
    name = config.get("tokenizer_class")
    if not isinstance(name, str):
        return False
    names = (name, f"{name.removesuffix('Fast')}Fast")
    return all(tokenizer_class_from_name(known) is None for known in names)


def _from_tokenizer_json(directory: Path, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Makes the tokenizer that tokenizer.json describes, with the settings of a config of version 5."""
    file = directory / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    settings = {key: value for key, value in config.items() if key not in _NOTES_OF_V5}
    settings |= _special_tokens(config)
    # Version 4 would rewrite the pre-tokenizer unless this agrees with it.
    pre_tokenizer = json.loads(file.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    if "add_prefix_space" in pre_tokenizer:
        settings["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if template := _chat_template(directory):
        settings["chat_template"] = template
    flags = {name: settings.pop(name) for name in ("add_bos_token", "add_eos_token") if name in settings}
    settings = PreTrainedTokenizerFast.convert_added_tokens(settings, save=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    if any(value is not None for value in flags.values()):
        _add_around(tokenizer, bos=bool(flags.get("add_bos_token")), eos=bool(flags.get("add_eos_token")))
    return tokenizer


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the special tokens without a role as version 4 spells them, in a list and a dict of names."""
    extra = config.get("extra_special_tokens") or []
    named = dict(config.get("model_specific_special_tokens") or {})
    if isinstance(extra, dict):
        named |= extra
        extra = []
    listed = [*(config.get("additional_special_tokens") or []), *extra]
    unique = [token for i, token in enumerate(listed) if token not in listed[:i]]
    found: dict[str, Any] = {"additional_special_tokens": unique} if unique else {}
    return found | ({"extra_special_tokens": named} if named else {})


def _chat_template(directory: Path) -> str | dict[str, str] | None:
    """Returns the chat template of its own file, or several by name, or `None` if there is no such file."""
    found = {}
    if (directory / "chat_template.jinja").is_file():
        found["default"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    return found["default"] if set(found) == {"default"} else found or None


def _add_around(tokenizer: PreTrainedTokenizerFast, *, bos: bool, eos: bool) -> None:
    """Puts BOS before and EOS behind every text, as version 5 does where its config says so."""
    tokens = [
        (token, tokenizer.convert_tokens_to_ids(token))
        for token, wanted in ((tokenizer.bos_token, bos), (tokenizer.eos_token, eos))
        if wanted and token is not None
    ]
    before = [f"{tokenizer.bos_token}:0"] if bos and tokenizer.bos_token else []
    behind = [f"{tokenizer.eos_token}:0"] if eos and tokenizer.eos_token else []
    single = [*before, "$A:0", *behind]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=tokens
    )
