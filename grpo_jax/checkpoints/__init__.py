"""Durable states of a run.

The names below can be imported from here. Each loads its module when it is asked for.
"""

from grpo_jax.lazy_names import lazy_names

_MODULES = {
    "Checkpoints": "manager",
    "CorruptedCheckpoint": "manager",
}
__getattr__, __all__ = lazy_names(__name__, _MODULES)
