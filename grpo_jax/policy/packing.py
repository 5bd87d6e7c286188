"""Packs the real tokens of a padded batch side by side, so that work is done on them alone.

Completions are shorter than their limit, so [B,K] arrays are mostly padding. Layers that treat every token
alike (embeddings, dense layers, norms, the unembedding) can run on [P] packed tokens. Attention needs rows.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Packing:
    """The indices of the real tokens of a [B,K] mask, in row-major order, at most P of them."""

    indices: Array  # [P] int32, flat index in [B*K] of each packed token, or B*K where there is none
    order: Array  # [B,K] int32, index of each real token among the packed ones, or P at padding

    def pack(self, x: Array) -> Array:
        """Gathers [B,K,...] into [P,...]. The rest is 0 where fewer tokens are real.

        The gradient is the value of `unpack`.
        """
        return _move(x.reshape(self.order.size, *x.shape[2:]), self.indices, self.order.reshape(-1))

    def unpack(self, x: Array) -> Array:
        """Spreads [P,...] over [B,K,...], with 0 at padding. The gradient is the value of `pack`."""
        flat = _move(x, self.order.reshape(-1), self.indices)
        return flat.reshape(*self.order.shape, *x.shape[1:])


def make_packing(mask: Array, num_tokens: int) -> Packing:
    """Finds the real tokens of a batch.

    Args:
        mask: mask [B,K] bool, True at real tokens.
        num_tokens: number P of packed tokens. Real tokens beyond it, in row-major order, are lost. The
            caller has to see that there are none.
    """
    flat = mask.reshape(-1)
    order = jnp.where(flat, jnp.cumsum(flat, dtype=jnp.int32) - 1, num_tokens)
    (indices,) = jnp.nonzero(flat, size=num_tokens, fill_value=flat.size)
    return Packing(
        indices=indices.astype(jnp.int32), order=jnp.minimum(order, num_tokens).reshape(mask.shape)
    )


@jax.custom_vjp
def _move(x: Array, source: Array, target: Array) -> Array:
    """Returns x[source], 0 where source is out of range. `target` is the inverse of `source`.

    The gradient of a gather is a scatter, which is slow and, on a CPU, serial. Here every element goes to one
    index, so the gradient is the gather by `target`.
    """
    return _take(x, source)


def _take(x: Array, source: Array) -> Array:
    return jnp.take(x, source, axis=0, mode="fill", fill_value=0)


def _move_forward(x: Array, source: Array, target: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(x, source), (source, target)


def _move_backward(indices: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    _, target = indices
    return _take(gradient, target), None, None


_move.defvjp(_move_forward, _move_backward)
