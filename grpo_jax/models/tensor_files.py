"""Reads and writes checkpoint files. No tensor may be missing, have a wrong shape or be left over.

It reads safetensors (PyTorch or Flax names, one file or shards) and Flax msgpack, and it writes safetensors
with PyTorch names. Nothing here unpickles, and nothing needs torch.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo_jax.types import Params

SAFETENSORS = "model.safetensors"
MSGPACK = "flax_model.msgpack"
MAX_SHARD_SIZE = 5 * 10**9  # bytes
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_FLAX_LEAVES = {"kernel", "embedding", "scale"}
# The dtypes that files may be written in.
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_FLOATS = [np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]

Read = Callable[[], np.ndarray]


def read_params(
    directory: Path, shapes: Params, *, embedding: tuple[str, ...], buffers: tuple[str, ...]
) -> Params:
    """Reads a checkpoint directory into float32 parameters.

    Args:
        directory: directory with model.safetensors or flax_model.msgpack, or shards with their index.
        shapes: the parameters' pytree, as shapes.
        embedding: path of the token embedding. Its first part is the base model's prefix, which the
            files may leave out.
        buffers: patterns of constants that PyTorch files may hold besides the parameters.

    Returns:
        the pytree of `shapes`, float32 whatever the file's dtype.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: a file is broken, or tensors are missing, unexpected or wrongly shaped. The message names
            them.
    """
    tensors = _open(directory)
    expected = flatten_dict(shapes)
    is_flax = any(name.rsplit(".", 1)[-1] in _FLAX_LEAVES for name in tensors)
    names = {(".".join(path) if is_flax else torch_name(path)): path for path in expected}
    prefix = embedding[0] + "."
    if not any(name.startswith(prefix) for name in tensors):  # saved from the base model
        names = {name.removeprefix(prefix): path for name, path in names.items()}

    if missing := [name for name in names if name not in tensors]:
        hint = _what_it_holds([*tensors], missing, expected=len(names))
        raise ValueError(f"{directory}: missing {_listed(missing)}{hint}")
    unexpected = [
        name for name in tensors if name not in names and not any(re.search(b, name) for b in buffers)
    ]
    tied_name = "lm_head.kernel" if is_flax else "lm_head.weight"
    if ("lm_head", "kernel") not in expected and tied_name in unexpected:
        unexpected.remove(tied_name)
        head = tensors[tied_name]()
        table = tensors[next(name for name, path in names.items() if path == embedding)]()
        if not np.array_equal(head.T if is_flax else head, table):
            raise ValueError(
                f"{directory}: {tied_name} differs from the embedding it is tied to in config.json"
            )
    if unexpected:
        raise ValueError(f"{directory}: unexpected {_listed(unexpected)}")

    params = {}
    for name, path in names.items():
        params[path] = _convert(
            name, tensors[name](), expected[path].shape, not is_flax and path[-1] == "kernel"
        )
    return unflatten_dict(params)


def write_params(
    directory: Path, params: Params, *, max_shard_size: int = MAX_SHARD_SIZE, dtype: str = "float32"
) -> None:
    """Writes parameters as safetensors with PyTorch names and layouts, in place of older weights.

    Args:
        directory: directory for model.safetensors or, if that would be larger than max_shard_size, for shards
            with an index. An existing file is replaced only when the new one is complete.
        params: pytree of float32 arrays.
        max_shard_size: largest size in bytes of the tensors in one file. A single larger tensor has a file of
            its own.
        dtype: dtype of the tensors in the files, `float32`, `bfloat16` or `float16`.

    Raises:
        ValueError: a parameter does not fit into float16, whose largest number is 65,504.
    """
    size_of_one = DTYPES[dtype].itemsize
    shards = _into_shards(flatten_dict(params), max_shard_size, size_of_one)
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SAFETENSORS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {}
        for key, value in shard.items():
            value = _rounded(torch_name(key), np.asarray(jax.device_get(value)), DTYPES[dtype])
            tensors[torch_name(key)] = np.ascontiguousarray(value.T if key[-1] == "kernel" else value)
        write_tensors(directory / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = directory / f"{SAFETENSORS}.index.json"
    if count > 1:
        content = {"metadata": {"total_size": _count(params) * size_of_one}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    # Weights of an earlier export would be read first, or fill the disk.
    older = {*directory.glob("model-?????-of-?????.safetensors"), directory / SAFETENSORS}
    for path in older - {directory / file for file in weight_map.values()}:
        path.unlink(missing_ok=True)
    if count == 1:
        index.unlink(missing_ok=True)


def _rounded(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # the error below says it
        rounded = value.astype(dtype)
    if dtype == np.float16 and not np.all(np.isfinite(rounded) | ~np.isfinite(value)):
        raise ValueError(
            f"tensor {name} has values up to {np.max(np.abs(value)):.3g}, and float16 ends at 65504; save as "
            "bfloat16 or float32"
        )
    return rounded


def _count(tree: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _into_shards(leaves: dict[tuple[str, ...], jax.Array], max_size: int, size_of_one: int) -> list[dict]:
    """Distributes parameters, in their order, over as many files as are needed."""
    shards: list[dict] = [{}]
    size = 0
    for key, leaf in leaves.items():
        if shards[-1] and size + leaf.size * size_of_one > max_size:
            shards.append({})
            size = 0
        shards[-1][key] = leaf
        size += leaf.size * size_of_one
    return shards


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes contiguous arrays as a safetensors file. Only the complete file replaces an existing one."""
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # safetensors writes files that only their owner can read
    os.replace(unfinished, path)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file of floating-point arrays.

    Raises:
        ValueError: the file is no such file, or has other numbers.
    """
    tensors = {name: read() for name, read in _open_safetensors(path).items()}
    for name, value in tensors.items():
        if value.dtype not in _FLOATS:
            raise ValueError(f"{path}: tensor {name} is {value.dtype}; it must be floating-point")
    return tensors


def torch_name(path: tuple[str, ...]) -> str:
    """Returns the PyTorch name of a Flax parameter. It is the path, with leaves named `weight` and `bias`."""
    return ".".join((*path[:-1], "weight" if path[-1] in _FLAX_LEAVES else path[-1]))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(sorted(names)[:5])}{more}"


def _what_it_holds(names: list[str], missing: list[str], *, expected: int) -> str:
    """Says what a file without some of the `expected` tensors holds, and what that looks like."""
    holds = f"; the file holds {_listed(names)}" if names else "; the file is empty"
    if any(".base_layer." in name or ".lora_" in name for name in names):
        return (
            f"{holds}: a PEFT model that was saved without merging. Call merge_and_unload() and save again, "
            "or save the adapter and give its directory as lora.start_from"
        )
    ends = tuple(f".{name}" for name in missing)
    prefixes = {name[: -len(end) + 1] for name in names for end in ends if name.endswith(end)}
    prefix = min(prefixes, key=len, default="")
    if prefix and all(name.startswith(prefix) for name in names):
        return (
            f"{holds}: every name begins with {prefix!r}, which is a wrapper's. Save the model inside of it, "
            "or take that off the names"
        )
    return holds if 2 * len(missing) > expected else ""


def _convert(name: str, value: np.ndarray, shape: tuple[int, ...], transpose: bool) -> jax.Array:
    if value.dtype not in _FLOATS:
        raise ValueError(
            f"tensor {name} is {value.dtype}; weights must be float32, float16, bfloat16 or float64"
        )
    wanted = shape[::-1] if transpose else shape
    if value.shape != wanted:
        raise ValueError(f"tensor {name} has shape {value.shape}, the configuration says {wanted}")
    # JAX has to own this copy, because the parameters will be donated to the update.
    return jnp.array(value.T if transpose else value, jnp.float32)


def _open(directory: Path) -> Mapping[str, Read]:
    """Returns every tensor in the checkpoint as a function that reads it."""
    for file, read in ((SAFETENSORS, _open_safetensors), (MSGPACK, _open_msgpack)):
        if (directory / file).is_file():
            return read(directory / file)
        index = directory / f"{file}.index.json"
        if index.is_file():
            return _open_shards(index, read)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ValueError(
            f"{directory}: {pickles[0]} is a pickle, which can run any code when loaded: never read here; "
            f"convert it to {SAFETENSORS} (in PyTorch: model.save_pretrained(path, safe_serialization=True))"
        )
    raise FileNotFoundError(
        f"{directory}: no weights: neither {SAFETENSORS} nor {MSGPACK}, nor an index of shards"
    )


def _open_shards(index: Path, read: Callable[[Path], Mapping[str, Read]]) -> Mapping[str, Read]:
    try:
        weight_map = {name: str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index}: not an index of shards (no `weight_map`)") from None
    tensors: dict[str, Read] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ValueError(f"{index}: shard {file!r} is outside the directory")
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index.parent}: shard {file} is missing; {index.name} names it")
        shard = read(index.parent / file)
        if twice := [name for name in shard if name in tensors]:
            raise ValueError(f"{index.parent}: {_listed(twice)} in more than one shard")
        tensors |= shard
    if absent := [name for name in weight_map if name.replace("/", ".") not in tensors]:
        raise ValueError(f"{index.parent}: {_listed(absent)} named by {index.name} but in no shard")
    return tensors


def _open_safetensors(path: Path) -> Mapping[str, Read]:
    try:
        file = safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    return {name: functools.partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118


def _open_msgpack(path: Path) -> Mapping[str, Read]:
    try:
        tree = flatten_dict(flax.serialization.msgpack_restore(path.read_bytes()), sep="/")
    except Exception as error:  # msgpack raises a dozen unrelated types
        raise ValueError(f"{path}: not a Flax msgpack file ({error})") from None
    return {name.replace("/", "."): functools.partial(np.asarray, value) for name, value in tree.items()}
