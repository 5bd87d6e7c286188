"""Opens the fast tokenizer of a model's directory."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grpo_jax.sources import read_json

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_tokenizer(directory: Path, source: str) -> PreTrainedTokenizerFast:
    """Loads the fast tokenizer of a directory; `source` is what messages call it."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{source}: no tokenizer in {directory} (tokenizer.json or vocabulary files)")
    if "auto_map" in (read_json(directory / "tokenizer_config.json") or {}):
        raise ValueError(
            f"{source}: tokenizer_config.json has `auto_map`, code from the author; it is never run"
        )
    try:
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
