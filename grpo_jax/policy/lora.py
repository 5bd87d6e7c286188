"""LoRA, https://arxiv.org/abs/2106.09685, keeps the base and adds products of two thin matrices to kernels.

    W + (alpha / rank) A B        A [in, rank], B [rank, out]

Only the pairs (A, B), the *adapters*, are trained. Optimizer state and checkpoints hold nothing else. B
starts at 0, so the policy starts as the base. The base never moves, and it is the reference.

Kernels are merged before a forward pass, instead of x A B being added behind each of them. `merge_adapters`
maps parameters to parameters, so it is exact and the same for every policy, and decoding runs at the speed of
the base. It costs one product of rank `rank` per kernel and a second copy of the merged kernels during
generation and during the update. In the backward pass it also costs the gradient [in, out] of each of them,
on its way to A and B. So an update computes as much as full fine-tuning does. What it saves is memory: there
is no optimizer state, no sum of gradients and no reference of the size of the model.

Dropout zeroes inputs of an adapter, which are rows of A. They are the same ones for all tokens of an update,
because merged kernels have no inputs of their own. These are the row masks of
https://arxiv.org/abs/2404.09610, whereas PEFT samples other ones for each token. Dropout acts in the update
alone. Sampling, log-probs and the exported model have none.
"""

import functools
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from grpo_jax.types import Params

Path = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kernel that gets an adapter.

    Args:
        path: path of the kernel in the parameters.
        inputs: number of inputs.
        outputs: number of outputs.
        output_first: whether the kernel is stored [out, in].
    """

    path: Path
    inputs: int
    outputs: int
    output_first: bool = False

    @property
    def module(self) -> str:
        """Returns the dotted name of the dense layer in PyTorch, such as `model.layers.0.mlp.up_proj`."""
        path = self.path[:-1] if self.path[-1] == "kernel" else self.path
        return ".".join(map(str, path))  # an nnx.List numbers its modules


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What is adapted, and how. It is hashable, because to `jit` it is part of the program.

    Args:
        rank: number r of columns of A and of rows of B.
        alpha: numerator of the factor alpha / rank of the product.
        targets: the kernels.
        dropout: probability p that an input of an adapter is zeroed in an update.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...]
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """Returns alpha / rank."""
        return self.alpha / self.rank


def match_targets(dense: tuple[Target, ...], patterns: tuple[str, ...]) -> tuple[Target, ...]:
    """Returns the dense layers that patterns name, in their order.

    Args:
        dense: the dense layers of a model.
        patterns: globs on the dotted name of the layer or on an end of it that begins at a dot, such as
            `q_proj`, `attn.c_proj` or `layers.0.*`. If there are none, every dense layer of attention and MLP
            is meant, which are those inside a numbered layer.

    Raises:
        ValueError: a pattern matches nothing, or there is no pattern and no layer is numbered. The message
            lists the names.
    """
    if not patterns:
        found = [target for target in dense if any(part.isdecimal() for part in target.path)]
        if not found:
            raise ValueError(f"no dense layer is inside a numbered layer; there are {_kinds(dense)}")
        return tuple(found)

    def matches(target: Target, pattern: str) -> bool:
        return fnmatchcase(target.module, pattern) or fnmatchcase(target.module, f"*.{pattern}")

    for pattern in patterns:
        if not any(matches(target, pattern) for target in dense):
            raise ValueError(f"{pattern!r} matches no dense layer; there are {_kinds(dense)}")
    return tuple(target for target in dense if any(matches(target, pattern) for pattern in patterns))


def _kinds(dense: tuple[Target, ...]) -> str:
    """Lists names. Those that differ only in the number of the layer are listed once."""
    names = dict.fromkeys(
        ".".join("*" if part.isdecimal() else part for part in target.module.split(".")) for target in dense
    )
    return ", ".join(names)


def init_adapters(lora: Lora, key: Array) -> Params:
    """Makes the adapters of step 0. A is uniform in ±1/sqrt(in) (Kaiming's, as in PEFT), and B is zero.

    Args:
        lora: the choice of what is adapted.
        key: PRNG key. It is not consumed but folded with the name of each kernel, so an adapter starts the
            same whatever else is adapted.

    Returns:
        a pytree with {"a" [in, rank], "b" [rank, out]} in the place of each kernel, float32.
    """
    adapters = {}
    for target in lora.targets:
        bound = target.inputs**-0.5
        shape = (target.inputs, lora.rank)
        adapters[(*target.path, "a")] = jax.random.uniform(
            _own_key(target, key), shape, minval=-bound, maxval=bound
        )
        adapters[(*target.path, "b")] = jnp.zeros((lora.rank, target.outputs))
    return unflatten_dict(adapters)


def merge_adapters(lora: Lora, base: Params, adapters: Params, *, dropout_key: Array | None = None) -> Params:
    """Adds the adapters to their kernels.

    It is differentiable by the adapters and by the base. Differentiate by the adapters alone.

    Args:
        lora: the choice of what is adapted.
        base: parameters of the model.
        adapters: pytree as `init_adapters` makes it.
        dropout_key: PRNG key of the dropout. It is not consumed but folded with the name of each kernel. None
            means no dropout.

    Returns:
        a pytree like base, whose other arrays are those of base. While every B is 0, it equals base.

    Raises:
        KeyError: base or adapters lack a target.
        ValueError: base is no nested dict.
    """
    if not isinstance(base, dict | FrozenDict):
        raise ValueError(
            f"LoRA needs the base's parameters as nested dicts, and they are a {type(base).__name__}: for an "
            "nnx module give nnx.to_pure_dict(nnx.state(module, nnx.Param))"
        )
    flat = flatten_dict(base)
    pairs = flatten_dict(adapters)
    kernels = [flat[target.path] for target in lora.targets]
    factors = [(pairs[(*target.path, "a")], pairs[(*target.path, "b")]) for target in lora.targets]
    if dropout_key is not None and lora.dropout > 0:
        factors = [
            (_drop_inputs(lora, t, a, dropout_key), b)
            for t, (a, b) in zip(lora.targets, factors, strict=True)
        ]
    merged = _merge_kernels(lora, kernels, factors)
    return unflatten_dict(flat | {t.path: kernel for t, kernel in zip(lora.targets, merged, strict=True)})


def adds_nothing(adapters: Params) -> Array:
    """Returns bool [], True if every B is 0, as at step 0, so that the merged model is the base."""
    flat = flatten_dict(adapters)
    return jnp.stack([jnp.all(leaf == 0) for path, leaf in flat.items() if path[-1] == "b"]).all()


def _drop_inputs(lora: Lora, target: Target, a: Array, key: Array) -> Array:
    """Zeroes each row of A [in, rank] with probability p and scales the others by 1 / (1 - p)."""
    kept = jax.random.bernoulli(_own_key(target, key), 1.0 - lora.dropout, (target.inputs, 1))
    return jnp.where(kept, a / (1.0 - lora.dropout), 0)


def _own_key(target: Target, key: Array) -> Array:
    return jax.random.fold_in(key, zlib.crc32(target.module.encode()))


@functools.partial(jax.jit, static_argnames="lora")
def _merge_kernels(lora: Lora, kernels: list[Array], factors: list[tuple[Array, Array]]) -> list[Array]:
    """Merges in one program, or as a part of another. Only kernels go in, so the rest is not copied."""
    merged = []
    for target, kernel, (a, b) in zip(lora.targets, kernels, factors, strict=True):
        # It is thin, so it is computed in float32 even where products of float32 are not by default.
        delta = jnp.matmul(lora.scale * a, b, precision=jax.lax.Precision.HIGHEST)
        merged.append(kernel + (delta.T if target.output_first else delta))
    return merged
