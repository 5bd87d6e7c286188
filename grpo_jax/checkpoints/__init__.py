"""Durable states of a run.

The names below can be imported from here. Each loads its module when it is asked for.
"""

import importlib

_PUBLIC = {
    "Checkpoints": "manager",
    "CorruptedCheckpoint": "manager",
}  # name -> the module of this room that has it
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
