"""GRPO for language models: pure JAX functions with a fast, trustworthy training driver on top.

The mathematics, the sampling and the training step are importable from here; this imports neither
transformers nor orbax. Models, data, rewards, checkpoints and the commands are modules of their own.
"""

import importlib
from typing import TYPE_CHECKING, Any

from grpo_jax import moved
from grpo_jax.version import __version__ as __version__

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow `__getattr__`
    from grpo_jax.public import *

moved.install()


def __getattr__(name: str) -> Any:
    """Gives a public name, and loads all of them when the first is asked for (PEP 562).

    So `grpo-jax` lists its commands at once, and `grpo-jax env` can tell what is wrong with JAX.
    """
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module(f"{__name__}.public")
    if name in globals():  # a room, which has just been loaded
        return globals()[name]
    return getattr(public, moved.new_name(name))


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module(f"{__name__}.public").__all__})
