"""Ids that no token has: many models round their vocabulary up to a multiple of 64 or 128."""

import jax.numpy as jnp

from grpo_jax.types import Array, Params, Policy


def limit_vocabulary(policy: Policy, num_tokens: int) -> Policy:
    """Gives the logits of all ids from num_tokens on the value -inf.

    Such an id is then never sampled, and has no part in a probability, an entropy or a KL; its row of the
    head has no gradient. Sampler and scorer agree, since both have their logits from here.

    Args:
        policy: the model's functions.
        num_tokens: ids that stand for something, the first ones of the vocabulary.
    """

    def unembed(params: Params, hidden: Array) -> Array:
        logits = policy.unembed(params, hidden)
        return jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)

    return policy.replace(unembed=unembed)
