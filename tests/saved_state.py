"""What the tests of checkpoints save and compare. Opened checkpoints are closed when a test ends."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.checkpoints.manager import Checkpoints


@flax.struct.dataclass
class Batch:
    tokens: jax.Array
    ref_log_probs: jax.Array | None = None


def make_state(seed=0, size=64):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "h": [{"w": jax.random.normal(keys[0], (size, 8))}, {"w": jax.random.normal(keys[1], (8,))}],
        "half": jax.random.normal(keys[2], (3, 5)).astype(jnp.bfloat16),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "params": params,
        "opt_state": tx.init(params),
        "step": jnp.asarray(seed, jnp.int32),
        "flags": jnp.array([True, False]),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32),
        "key": jax.random.key_data(jax.random.key(seed)),
    }


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert a.tobytes() == e.tobytes()


def opened_in(default):
    """Yields a function that opens checkpoints, in the default directory unless it is given another."""
    opened = []

    def open_(directory=default, **keywords):
        opened.append(Checkpoints(directory, **{"keep": 2, **keywords}))
        return opened[-1]

    yield open_
    for checkpoints in opened:
        checkpoints.close()
