"""One run: what it is made of, its directory, its progress. `run` trains from Python.

The names below can be imported from here. Each loads its module when it is asked for.
"""

from grpo_jax.lazy_names import lazy_names

_MODULES = {"run": "from_python", "run_config": "from_config", "Result": "from_config"}
__getattr__, __all__ = lazy_names(__name__, _MODULES)
