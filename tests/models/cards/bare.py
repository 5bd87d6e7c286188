"""The card with a bare function: a plain TrainState, two updates towards many different tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import grpo_jax as gj


def apply_fn(params, tokens, mask, positions):
    """Attends from each token to the earlier ones that are real, and returns logits [B,L,V]."""
    length = tokens.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, :]
    x = params["token"][tokens] + params["position"][positions]
    scores = jnp.where(visible, x @ jnp.swapaxes(x, 1, 2), -1e9)
    return (x + jax.nn.softmax(scores) @ x @ params["value"]) @ params["head"]


shapes = {"token": (64, 32), "position": (128, 32), "value": (32, 32), "head": (32, 64)}
params = {name: jax.random.normal(jax.random.key(0), shape) / 6 for name, shape in shapes.items()}
state = TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adamw(1e-3))
policy = gj.policy_from_apply(apply_fn)
recipe = gj.make_recipe("grpo", kl_coef=0.04)
prompts = gj.pad_prompts([[5, 6, 7], [8, 9]], length=3)
settings = {"group_size": 4, "max_new_tokens": 6, "eos_ids": 1}
for step in range(2):
    rollout = gj.generate(policy, state.params, prompts, jax.random.key(step), **settings)
    rewards = np.array([len(set(row.tolist())) for row in np.asarray(rollout.tokens)])
    advantages = gj.group_advantages(rewards.reshape(2, 4))
    ref_log_probs, _ = gj.completion_log_probs(policy, params, rollout, group_size=4)
    experience = gj.experience_of(rollout, recipe, advantages=advantages, ref_log_probs=ref_log_probs)
    state, metrics = gj.train_step(state, experience, recipe=recipe, group_size=4)
    print({name: round(float(value), 6) for name, value in metrics.items()})
