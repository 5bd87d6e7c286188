"""GRPO for language models: pure JAX functions with a fast, trustworthy training driver on top.

The mathematics, the sampling and the training step are importable from here; this imports neither
transformers nor orbax. Models, data, rewards, checkpoints and the commands are modules of their own.
"""

from grpo_jax.advantages import group_advantages, informative_groups, leave_one_out_advantages
from grpo_jax.decoding import fork, generate, prefill
from grpo_jax.kl import kl_k1, kl_k2, kl_k3
from grpo_jax.learner import TrainState, init_train_state, train_step
from grpo_jax.log_probs import completion_log_probs, token_log_probs
from grpo_jax.losses import (
    LossMetrics,
    cispo_surrogate,
    clipped_surrogate,
    grpo_loss,
    log_ratios,
    loss_weights,
    reinforce_surrogate,
    sapo_surrogate,
)
from grpo_jax.optimizers import make_optimizer, make_schedule
from grpo_jax.recipes import (
    RECIPES,
    Recipe,
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    gspo_token,
    make_recipe,
    reinforce,
    sapo,
)
from grpo_jax.sampling import draw, process_logits
from grpo_jax.types import Experience, Policy, Prompts, Rollout

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Experience",
    "LossMetrics",
    "Policy",
    "Prompts",
    "Recipe",
    "Rollout",
    "TrainState",
    "cispo",
    "cispo_surrogate",
    "clipped_surrogate",
    "completion_log_probs",
    "dapo",
    "dr_grpo",
    "draw",
    "fork",
    "generate",
    "group_advantages",
    "grpo",
    "grpo_loss",
    "gspo",
    "gspo_token",
    "informative_groups",
    "init_train_state",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "leave_one_out_advantages",
    "log_ratios",
    "loss_weights",
    "make_optimizer",
    "make_recipe",
    "make_schedule",
    "prefill",
    "process_logits",
    "reinforce",
    "reinforce_surrogate",
    "sapo",
    "sapo_surrogate",
    "token_log_probs",
    "train_step",
]
