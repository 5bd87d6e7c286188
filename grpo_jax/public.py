"""The names that `from grpo_jax import ...` gives: the mathematics, the sampling and the training step."""

from grpo_jax.lazy_names import lazy_names
from grpo_jax.objective.advantages import (
    effective_weights,
    group_advantages,
    informative_groups,
    leave_one_out_advantages,
    normalize_then_sum,
    reward_weights,
    scale_by_batch,
)
from grpo_jax.objective.kl import adapt_kl_coef, kl_exact, kl_k1, kl_k2, kl_k3
from grpo_jax.objective.losses import LossMetrics, grpo_loss, log_ratios, loss_weights
from grpo_jax.objective.recipes import *
from grpo_jax.objective.recipes import __all__ as _recipes
from grpo_jax.objective.shaping import importance_weights, kl_penalty, overlong_penalty, top_entropy_mask
from grpo_jax.objective.surrogates import *
from grpo_jax.objective.surrogates import __all__ as _surrogates
from grpo_jax.policy.decoding import fork, generate, pad_prompts, prefill
from grpo_jax.policy.from_apply import policy_from_apply
from grpo_jax.policy.log_probs import completion_log_probs, token_log_probs
from grpo_jax.policy.lora import Lora, Target, init_adapters, merge_adapters
from grpo_jax.policy.sampling import process_logits, sample_token
from grpo_jax.training.from_rollout import experience_of
from grpo_jax.training.learner import train_step
from grpo_jax.training.optimizers import make_optimizer, make_schedule
from grpo_jax.training.train_state import TrainState, init_train_state
from grpo_jax.types import Experience, Policy, Prompts, Rollout

# Rooms above give these. Each is loaded when its name is asked for.
__getattr__, _of_rooms_above = lazy_names("grpo_jax", {"policy_of": "models.flax_objects"})

__all__ = [
    *_of_rooms_above,
    *_recipes,
    *_surrogates,
    "Experience",
    "Lora",
    "LossMetrics",
    "Policy",
    "Prompts",
    "Rollout",
    "Target",
    "TrainState",
    "adapt_kl_coef",
    "completion_log_probs",
    "effective_weights",
    "experience_of",
    "fork",
    "generate",
    "group_advantages",
    "grpo_loss",
    "importance_weights",
    "informative_groups",
    "init_adapters",
    "init_train_state",
    "kl_exact",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_penalty",
    "leave_one_out_advantages",
    "log_ratios",
    "loss_weights",
    "make_optimizer",
    "make_schedule",
    "merge_adapters",
    "normalize_then_sum",
    "overlong_penalty",
    "pad_prompts",
    "policy_from_apply",
    "prefill",
    "process_logits",
    "reward_weights",
    "sample_token",
    "scale_by_batch",
    "token_log_probs",
    "top_entropy_mask",
    "train_step",
]
