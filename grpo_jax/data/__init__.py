"""Prompts: files, data sets and tasks, and their order as a function of (seed, step).

The names below can be imported from here. Each loads its module when it is asked for.
"""

from grpo_jax.lazy_names import lazy_names

_MODULES = {
    "Example": "loading",
    "batch": "loading",
    "load_data": "loading",
    "RowTask": "tasks",
    "Task": "tasks",
    "load_task": "tasks",
}
__getattr__, __all__ = lazy_names(__name__, _MODULES)
