"""Ids without a token. Many models have them, to round their vocabulary up to a multiple of 64 or 128."""

import jax.numpy as jnp
from jax import Array

from grpo_jax.types import Params, Policy


def limit_vocabulary(policy: Policy, num_tokens: int) -> Policy:
    """Gives the logits of all ids from num_tokens on the value -inf.

    Such an id is then never sampled, and it has no part in a probability, an entropy or a KL. Its row of the
    head has no gradient. Sampler and scorer agree, since both have their logits from here.

    Args:
        policy: the model's functions.
        num_tokens: number of ids that have a token. They are the first ones of the vocabulary.
    """

    def unembed(params: Params, hidden: Array) -> Array:
        logits = policy.unembed(params, hidden)
        return jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)

    return policy.replace(unembed=unembed)
