"""Lets a folder export names whose modules are loaded when they are first used (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """Returns `__getattr__` and `__all__` of a package, so that importing it loads none of its modules.

    Args:
        package: `__name__` of the package.
        modules: exported names, each with the module of the package that defines it.

    >>> get, names = lazy_names("grpo_jax.objective", {"kl_k3": "kl"})
    >>> get("kl_k3").__name__, names
    ('kl_k3', ['kl_k3'])
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return get, [*modules]
