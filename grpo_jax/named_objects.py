"""Finds the object that `package.module:name` or `path/file.py:name` names: a reward, a task, a recipe, ...

Every failure is one line.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_jax.error_places import user_frame
from grpo_jax.spelling import nearest, suggest

IN_PYTHON = "python"  # stands for where an object comes from that no import can find again


def find_function(
    spec: str, *, kind: str = "reward function", built_in: Sequence[str] = ()
) -> tuple[str, Callable[..., Any], str]:
    """Finds an object as `find_object` does, and checks that it is a function or can be called like one.

    Raises:
        ValueError: as in `find_object`, or it is a class, or cannot be called.
    """
    name, function, line = find_object(spec, kind=kind, built_in=built_in)
    if inspect.isclass(function) or not callable(function):
        what = "class" if inspect.isclass(function) else type(function).__name__
        advice = f"; make an object of it in the file, and name that: judge = {name}()"
        advice = advice if inspect.isclass(function) and "__call__" in vars(function) else ""
        raise ValueError(f"{kind} {spec!r}: `{name}` at {line} is a {what}, not a function{advice}")
    return name, function, line


def find_object(spec: str, *, kind: str, built_in: Sequence[str] = ()) -> tuple[str, Any, str]:
    """Imports the module or file of a spec and takes the object from it.

    A file is found relative to the working directory. It may import its neighbours. It is executed once, and
    again after it was edited.

    Args:
        spec: `package.module:name` or `path/file.py:name`.
        kind: what it should be, for messages, such as `reward function`.
        built_in: names that need no colon, from which the nearest is suggested.

    Returns:
        (the object's name, the object, where it comes from).

    Raises:
        ValueError: the message names the spec and its fault, with file and line if there are any.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        hint = suggest(spec, built_in, f"built in are {', '.join(built_in)}.") if built_in else ""
        if not colon and "." in spec and not spec.endswith(".py"):
            hint = f"did you mean `{':'.join(spec.rsplit('.', 1))}`?"
        hint += " " if hint else ""
        raise ValueError(
            f"{kind} {spec!r} is unknown; {hint}Your own is package.module:function or path/file.py:function"
        )
    if where == IN_PYTHON:
        raise ValueError(
            f"{kind} {spec!r} was an object of a Python program, which no file names; start it from that "
            "program again, or use the model that the run has exported"
        )
    word = kind.partition(" ")[0]
    module = _load_file(Path(where).expanduser(), word) if where.endswith(".py") else _import(where, word)
    lines = _definitions(module)
    if name not in vars(module):
        near = nearest(name, lines)
        hint = f"did you mean `{near}` (line {lines[near]})?" if near else "it defines "
        hint += "" if near else (", ".join(lines) or "nothing")
        raise ValueError(f"{kind} {spec!r}: {where} has no `{name}`; {hint}")
    line = f"{where}:{lines[name]}" if name in lines else where
    return name, vars(module)[name], line


def source_file(spec: str) -> Path | None:
    """Returns the file that a spec's function comes from, or None if it is built in or has no file.

    Args:
        spec: a spec as in `find_function` that was imported already, or `verl:` and such a spec.
    """
    where = spec.removeprefix("verl:").rpartition(":")[0]
    if where.endswith(".py"):
        return _resolved(Path(where).expanduser())
    file = getattr(sys.modules.get(where), "__file__", None)
    return None if file is None else Path(file).resolve()


def _resolved(path: Path) -> Path:
    return path.resolve() if path.is_absolute() else (Path.cwd() / path).resolve()


def _load_file(path: Path, word: str) -> ModuleType:
    path = _resolved(path)
    if not path.is_file():
        raise ValueError(f"{word} file {path} does not exist")
    # There is one module per file, so that all objects used from it share the file's state.
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()
    name = f"grpo_jax_rewards_{path.stem}_{digest[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name of the file ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(_at_import(path, error)) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _import(name: str, word: str) -> ModuleType:
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and (name + ".").startswith(f"{error.name}."):
            raise ValueError(
                f"{word} module {name!r}: no module named {error.name!r}; install it, run in its directory, "
                "or name a file as path/file.py:function"
            ) from None
        raise ValueError(_at_import(name, error)) from error


def _at_import(module: Path | str, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frame = user_frame(error, str(module))
    place = str(module) if frame is None else f"{frame.filename}:{frame.lineno}"
    return f"{place}: importing it raised {error!r}"


def _definitions(module: ModuleType) -> dict[str, int]:
    """Returns the line of every name that the module's source defines at its top level."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):  # a compiled module has no source
        return {}
    lines = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            lines |= {target.id: node.lineno for target in node.targets if isinstance(target, ast.Name)}
    return lines
