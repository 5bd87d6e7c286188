"""The reference that a KL term compares with: whether the policy equals it, and how it moves."""

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Real

from grpo_jax.policy.lora import adds_nothing
from grpo_jax.types import Params


@jax.jit
def is_reference(params: Params, ref_params: Params, frozen: Params | None = None) -> Bool[Array, ""]:
    """Says whether every parameter of the policy equals that of its reference: bool [].

    If so, the KL between them is 0, and any other value that two programs give is rounding.

    Args:
        params: parameters of the state.
        ref_params: parameters of the reference.
        frozen: parameters of the base. They are given with LoRA, and only then.
    """
    if frozen is not None:
        return adds_nothing(params) & is_reference(frozen, ref_params)
    equal = jax.tree.map(lambda mine, theirs: jnp.all(mine == theirs), params, ref_params)
    return jax.tree.reduce(jnp.logical_and, equal, jnp.bool_(True))


@jax.jit
def mix_params(params: Params, ref_params: Params, alpha: Real[ArrayLike, ""]) -> Params:
    """Moves a reference towards the policy: ``alpha * params + (1 - alpha) * ref_params``.

    This is the soft update of TR-DPO, https://arxiv.org/abs/2404.09656. An alpha of 1 copies the policy. The
    result shares no array with its arguments. A parameter that is equal in both stays as it is.
    """
    mixed = optax.incremental_update(params, ref_params, alpha)
    # 0.6 x + 0.4 x may round to another number than x, but a reference that equals the policy must stay so.
    return jax.tree.map(lambda new, p, r: jnp.where(p == r, r, new), mixed, params, ref_params)
