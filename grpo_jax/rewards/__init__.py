"""Reward functions: loading them, calling them, and those that come with the package.

The names below can be imported from here. Each loads its module when it is asked for.
"""

import importlib

_PUBLIC = {
    "check_columns": "loading",
    "check_rows": "loading",
    "close_rewards": "loading",
    "load_rewards": "loading",
    "score": "loading",
    "Reward": "scoring",
    "RewardError": "scoring",
    "REWARDS": "builtin",
}  # name -> the module of this room that has it
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
