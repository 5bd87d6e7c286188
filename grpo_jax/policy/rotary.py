"""Rotary positions and the ways in which models stretch them to longer sequences."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """It divides positions by a factor, as https://arxiv.org/abs/2306.15595 does."""

    factor: float

    def scale(self, frequencies: Array) -> Array:
        """Returns the frequencies [head_dim/2] for longer sequences."""
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """It divides low frequencies by a factor, keeps high ones and blends those between, as Llama 3.1 does.

    See https://arxiv.org/abs/2407.21783, and `_compute_llama3_parameters` of transformers.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def scale(self, frequencies: Array) -> Array:
        """Returns the frequencies [head_dim/2] for longer sequences."""
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        low = self.low_freq_factor
        kept = jnp.clip((turns - low) / (self.high_freq_factor - low), 0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions, https://arxiv.org/abs/2104.09864, with the halves rotated against each other."""

    theta: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | None = None

    def frequencies(self, head_dim: int) -> Array:
        """Returns the angles per position, float32 [head_dim/2]."""
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        frequencies = 1.0 / self.theta**exponents
        return frequencies if self.scaling is None else self.scaling.scale(frequencies)

    def angles(self, positions: Array, head_dim: int) -> tuple[Array, Array]:
        """Returns (cosines, sines) [...,1,head_dim/2] of positions [...], as `rotate` takes them."""
        angle = positions[..., None, None].astype(jnp.float32) * self.frequencies(head_dim)
        return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cosines: Array, sines: Array) -> Array:
    """Rotates heads x [...,heads,d] by angles [...,1,d/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
