"""The card with a module of flax.nnx: a plain TrainState, two updates towards many different tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import grpo_jax as gj


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.token = nnx.Embed(64, 32, rngs=rngs)
        self.position = nnx.Embed(128, 32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.head = nnx.Linear(32, 64, rngs=rngs)

    def __call__(self, tokens, mask, positions):
        length = tokens.shape[1]
        visible = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, None, :]
        x = self.token(tokens) + self.position(positions)
        return self.head(self.norm(x + self.attention(x, mask=visible)))


model = Transformer(nnx.Rngs(0))
params = nnx.state(model, nnx.Param)
state = TrainState.create(apply_fn=model, params=params, tx=optax.adamw(1e-3))
policy = gj.policy_of(model)
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
