"""Hugging Face checkpoints: configurations, tensor files, tokenizers, adapters.

The names below can be imported from here. Each loads its module when it is asked for.
"""

import importlib

_PUBLIC = {
    "Model": "loading",
    "load_model": "loading",
    "save_model": "loading",
    "decode": "text",
    "encode": "text",
    "load_tokenizer": "tokenizer_files",
    "policy_of": "flax_objects",
}  # name -> the module of this room that has it
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
