"""Digests of what a run is made from: examples, and the source of reward functions.

Equal examples have equal digests in every process and on every machine, whatever the types in their columns.
"""

import ast
import hashlib
import inspect
import json
import pickle
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.named_objects import source_file
from grpo_jax.types import Example

_OURS = "grpo_jax"  # an upgrade of the package is no edit of a reward


def digest_examples(examples: Iterable[Example]) -> dict[str, Any]:
    """Digests prompts and columns, in order.

    Args:
        examples: N examples. Where they come from (`place`) does not count.

    Returns:
        a dict of `rows` (N), `digest` (32 hexadecimal digits) and `unordered` (16 more, which do not depend
        on the order).
    """
    whole = hashlib.sha256()
    unordered = 0
    rows = 0
    for example in examples:
        row = hashlib.sha256(_text([example.prompt, example.columns]).encode()).digest()
        whole.update(row)
        unordered += int.from_bytes(row[:8], "big")
        rows += 1
    return {"rows": rows, "digest": whole.hexdigest()[:32], "unordered": f"{unordered % 2**64:016x}"}


def _text(value: Any) -> str:
    """Returns the same text for equal values. Escapes make it ASCII, so lone surrogates do no harm."""
    try:
        return json.dumps(value, sort_keys=True, default=_plain)
    except (TypeError, ValueError):  # keys that are no texts, or that cannot be sorted
        return json.dumps(_without_mappings(value), default=_plain)


def _without_mappings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ["mapping", sorted([_text(key), _text(entry)] for key, entry in value.items())]
    if isinstance(value, (list, tuple)):
        return [_without_mappings(entry) for entry in value]
    return value


def _plain(value: Any) -> Any:
    """Returns a value that JSON can hold, for one that it cannot, together with the type."""
    kind = type(value).__qualname__
    if isinstance(value, Mapping):
        return _without_mappings(dict(value))
    if isinstance(value, (set, frozenset)):  # their order differs from process to process
        return [kind, sorted(map(_text, value))]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [kind, bytes(value).hex()]
    if hasattr(value, "tolist"):  # scalars and arrays of NumPy, and what follows it
        return [str(getattr(value, "dtype", kind)), value.tolist()]
    if hasattr(value, "isoformat"):  # dates and times
        return [kind, value.isoformat()]
    if hasattr(value, "__iter__"):
        return [kind, list(value)]
    text = repr(value)
    if " at 0x" not in text:  # Decimal, Fraction, UUID, timedelta, ...
        return [kind, text]
    try:
        return [kind, hashlib.sha256(pickle.dumps(value, protocol=4)).hexdigest()]
    except Exception:  # whatever a foreign type raises; its type is all that can be said
        return [kind]


def digest_reward(spec: str | Callable[..., Any]) -> dict[str, dict[str, str]] | None:
    """Digests the files of a reward function: its own file, and the user's files that it imports.

    Modules are the user's if they lie in the directory of the file, in the working directory, or in the same
    package.

    Args:
        spec: the function as in `rewards[].function`, already imported, or the function itself.

    Returns:
        file name -> `{"bytes": ..., "code": ...}`. `code` leaves out comments and layout and holds for one
        version of Python. None for a built-in function, and for one that has no file.
    """
    if not isinstance(spec, str):
        spec = _named_by_file(spec)
    file = source_file(spec)
    if file is None or not file.is_file() or _is_of_python(file):
        return None
    top = spec.rpartition(":")[0].removeprefix("verl:").partition(".")[0]
    own_package = None if spec.rpartition(":")[0].endswith(".py") else top
    found: dict[str, dict[str, str]] = {}
    packages = _packages_of(file)
    roots = dict.fromkeys([packages[-1].parents[1] if packages else file.parent, Path.cwd()])
    waiting = [file]
    seen = {file}
    while waiting:
        path = waiting.pop()
        content = path.read_bytes()
        name = next((str(path.relative_to(root)) for root in roots if path.is_relative_to(root)), str(path))
        tree = _parsed(content)
        found[name] = {"bytes": _short(content), "code": _code(content, tree)}
        for other in (*_packages_of(path), *_imported(tree, path, roots, own_package)):
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return dict(sorted(found.items()))


def _named_by_file(function: Callable[..., Any]) -> str:
    """Returns what names the file of a function, or an empty text for one of a notebook or a prompt."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:f" if code and code.co_filename.endswith(".py") else ""


def same_code(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Says whether two entries of `digest_reward` are the same code, comments and layout aside."""
    return before["bytes"] == now["bytes"] or before["code"] == now["code"]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _parsed(content: bytes) -> ast.Module | None:
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError):  # a compiled module
        return None


def _code(content: bytes, tree: ast.Module | None) -> str:
    """Returns a digest of the code alone: comments and layout are not in the syntax tree."""
    text = content if tree is None else ast.dump(tree).encode(errors="surrogatepass")
    return f"{sys.version_info.major}.{sys.version_info.minor}-{_short(text)}"


def _is_of_python(file: Path) -> bool:
    """Says whether a file belongs to Python's own library, whose upgrade is no edit of a reward."""
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return file.is_relative_to(library) and not _is_installed(file)


def _is_installed(file: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(file.parts))


def _packages_of(file: Path) -> list[Path]:
    """Returns the `__init__.py` of every package that a file is in, the innermost first."""
    found = []
    directory = file.parent
    while (directory / "__init__.py").is_file():
        found.append(directory / "__init__.py")
        directory = directory.parent
    return found


def _imported(
    tree: ast.Module | None, path: Path, roots: Iterable[Path], own_package: str | None
) -> Iterator[Path]:
    """Yields the files of modules that a file imports and that are the user's own."""
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            places = list(roots)
        elif isinstance(node, ast.ImportFrom):
            prefix = [node.module] if node.module else []
            names = [".".join([*prefix, alias.name]) for alias in node.names] + prefix
            places = [path.parents[node.level - 1]] if node.level else list(roots)
        else:
            continue
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        for name in names:
            if name.partition(".")[0] == _OURS and not relative:
                continue
            for place in places:
                file = _module_file(place, name)
                own = relative or name.partition(".")[0] == own_package
                if file is not None and (own or not _is_installed(file)):
                    yield file
                    break


def _module_file(place: Path, name: str) -> Path | None:
    stem = place.joinpath(*name.split("."))
    files = (stem.with_name(stem.name + ".py"), stem / "__init__.py")
    return next((file.resolve() for file in files if file.is_file()), None)
