"""Pytrees as they are stored: named arrays on the host, each described by its dtype, shape and CRC-32.

`manager` writes and reads them. Invalid pytrees are rejected here, before anything is written.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Template = PyTree | Callable[[int], PyTree]  # a pytree with shapes and dtypes, or a function num_rows -> one
Leaves = dict[str, np.ndarray]
Descriptions = dict[str, list]  # leaf -> [dtype, shape, CRC-32], as JSON has them
# Our keys in the stored JSON.
_LEAVES = "_leaves"
_CRC = "_crc32"


def to_host(tree: PyTree, item: str) -> Leaves:
    """Copies every leaf to the host. It refuses leaves that would come back as something else.

    Args:
        tree: pytree of arrays and Python scalars.
        item: name of the tree in errors.

    Returns:
        The leaves by their paths ("params/h/0/w"). They share no memory with the tree.

    Raises:
        ValueError: a leaf, named in the message, cannot be stored faithfully.
    """
    leaves: Leaves = {}
    for name, leaf, struct in _named(tree):
        where = f"checkpoint leaf {item}/{name}"
        if jnp.issubdtype(struct.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{where} is a typed PRNG key: store jax.random.key_data(key)")
        # This has to be a copy, not a view. The caller donates its state to the next train_step while we are
        # still writing, and on CPU np.asarray(jax array) is the very buffer that XLA then overwrites.
        value = np.array(leaf, dtype=struct.dtype if np.isscalar(leaf) else None, order="C", copy=True)
        if value.dtype != struct.dtype:
            raise ValueError(f"{where} is {value.dtype}, which jit turns into {struct.dtype}")
        if struct.weak_type and struct.ndim:
            raise ValueError(f"{where} is a weakly typed array: give it a dtype of its own")
        if value.size == 0:
            raise ValueError(f"{where} has shape {value.shape}: empty arrays are not stored")
        if name in leaves:
            raise ValueError(f"{where}: two leaves have this name")
        leaves[name] = value
    if not leaves:
        raise ValueError(f"checkpoint item {item}: the pytree has no leaves")
    return leaves


def to_device(leaves: Leaves, template: PyTree) -> PyTree:
    """Fills the template's pytree with the leaves, as uncommitted arrays, weakly typed where it is."""
    arrays = [_to_array(leaves[name], struct) for name, _, struct in _named(template)]
    return jax.tree.unflatten(jax.tree.structure(template), arrays)


def describe(value: np.ndarray) -> list:
    """Returns the dtype, shape and CRC-32 of an array, as they come back from JSON."""
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return [str(value.dtype), list(value.shape), zlib.crc32(data.data)]


def fingerprint(tree: PyTree) -> str:
    """Returns a short text that differs between trees whose names, shapes, dtypes or values differ."""
    described = {name: describe(np.asarray(leaf)) for name, leaf, _ in _named(tree)}
    return f"{_crc(described):08x}"


def fill_template(template: Template, saved: Descriptions, item: str) -> PyTree:
    """Returns the template. If it is a function, it is called with the stored number of rows.

    Raises:
        ValueError: the template is a function and the first stored leaf has no axis 0.
    """
    if not callable(template):
        return template
    leaf, (_, shape, _) = next(iter(saved.items()))
    if not shape:
        raise ValueError(f"checkpoint item {item} has no rows to count: its first leaf {leaf} is a scalar")
    return template(shape[0])


def check_fits(saved: Descriptions, template: PyTree, path: Path) -> None:
    """Raises ValueError with the path and the first differences, unless the template fits what was stored."""
    expected = {name: f"{struct.dtype}{list(struct.shape)}" for name, _, struct in _named(template)}
    found = {name: f"{dtype}{shape}" for name, (dtype, shape, _) in saved.items()}
    wrong = [
        f"{name}: found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in {**expected, **found}
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(
            f"the checkpoint was written by another configuration: {path}: {'; '.join(wrong[:3])}{more}"
        )


def seal(extra: dict[str, Any], items: dict[str, Leaves]) -> dict[str, Any]:
    """Puts the caller's JSON, a description of every leaf and a CRC-32 of both into one document.

    Raises:
        ValueError: `extra` would not come back from JSON equal to itself, or has one of our keys.
    """
    if {_LEAVES, _CRC} & set(extra):
        raise ValueError(f"checkpoint extra: the keys {_LEAVES!r} and {_CRC!r} are ours")
    try:
        faithful = json.loads(json.dumps(extra, allow_nan=False)) == extra
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint extra is not JSON: {error}") from error
    if not faithful:
        raise ValueError("checkpoint extra changes on its way through JSON: use str keys and lists")
    leaves = {item: {name: describe(value) for name, value in v.items()} for item, v in items.items()}
    document = {**extra, _LEAVES: leaves}
    return {**document, _CRC: _crc(document)}


def unseal(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Descriptions]]:
    """Verifies what `seal` made and separates the caller's JSON from the leaves of every item.

    Raises:
        ValueError, KeyError: the document is not what was sealed.
    """
    extra = {key: value for key, value in document.items() if key != _CRC}
    if document[_CRC] != _crc(extra):
        raise ValueError("its checksum does not match")
    leaves = extra.pop(_LEAVES)
    return extra, leaves


def _named(tree: PyTree) -> list[tuple[str, Any, jax.ShapeDtypeStruct]]:
    """Lists (name, value, shape with dtype and weak type as `jit` sees them) of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    structs = jax.tree.leaves(jax.eval_shape(lambda t: t, tree))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or "array" for path, _ in leaves]
    return [(name, leaf, s) for name, (_, leaf), s in zip(names, leaves, structs, strict=True)]


def _to_array(value: np.ndarray, struct: jax.ShapeDtypeStruct) -> jax.Array:
    # Only a Python scalar makes a weakly typed array. Anything else would compile train_step again.
    return jnp.array(value if not struct.weak_type or value.ndim else value.item())


def _crc(document: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())
