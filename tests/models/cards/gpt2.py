"""The card: a plain TrainState of a Flax GPT-2, two updates towards many different tokens."""

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from transformers import FlaxAutoModelForCausalLM, GPT2Config

import grpo_jax as gj

config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, eos_token_id=1)
model = FlaxAutoModelForCausalLM.from_config(config)  # or .from_pretrained("gpt2")
state = TrainState.create(apply_fn=model.__call__, params=model.params, tx=optax.adamw(1e-3))
policy = gj.policy_of(model)
recipe = gj.make_recipe("grpo", kl_coef=0.04)
prompts = gj.pad_prompts([[5, 6, 7], [8, 9]], length=3)
settings = {"group_size": 4, "max_new_tokens": 6, "eos_ids": config.eos_token_id}
for step in range(2):
    rollout = gj.generate(policy, state.params, prompts, jax.random.key(step), **settings)
    rewards = np.array([len(set(row.tolist())) for row in np.asarray(rollout.tokens)])
    advantages = gj.group_advantages(rewards.reshape(2, 4))
    ref_log_probs, _ = gj.completion_log_probs(policy, model.params, rollout, group_size=4)
    experience = gj.experience_of(rollout, recipe, advantages=advantages, ref_log_probs=ref_log_probs)
    state, metrics = gj.train_step(state, experience, recipe=recipe, group_size=4)
    print({name: round(float(value), 6) for name, value in metrics.items()})
