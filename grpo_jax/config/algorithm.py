"""The section of the configuration that names the objective: a recipe, and what to change in it."""

import math
from dataclasses import dataclass
from typing import Literal

from grpo_jax.objective.advantages import ADVANTAGES, AGGREGATIONS, MISSING
from grpo_jax.objective.losses import RATIO_LEVELS, REDUCTIONS
from grpo_jax.objective.recipes import KL_NAMES, KL_PLACEMENTS, RECIPES
from grpo_jax.objective.surrogates import SURROGATES


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Which recipe, and what to change in it. None keeps the recipe's own choice.

    Args:
        name: Name of the recipe: {recipes}.
        group_size: G, completions sampled for each prompt; at least 2.
        num_iterations: mu, optimizer passes over one rollout; at least 1.
        num_minibatches: optimizer batches that one rollout is cut into; it has num_minibatches *
            training.batch_size completions, and each pass over it makes num_minibatches updates.
        advantage: what is done to the centred rewards of a group: divided by its `std`, by that of the
            `batch`, `none`; or `leave_one_out`: the mean of the others is subtracted.
        aggregation: several reward functions: `sum_then_normalize`, `normalize_then_sum`, or `gdpo`: the
            latter, divided by the standard deviation over the batch.
        missing: a completion without some of its rewards: `drop` it (a function that gave nothing to a whole
            group is left out there instead), `skip` the terms as if they were 0, or `renormalize` the weights
            of the others.
        ratio_level: Level of the importance ratio: one per token, one per sequence, or the value of the
            sequence with the gradient of the token.
        surrogate: Policy loss of a token, see `grpo_jax.objective.surrogates`.
        clip_range: PPO clip below 1 (and above it unless clip_range_high is given).
        clip_range_high: PPO clip above 1.
        delta: two-sided clipping: largest ratio where the advantage is negative; above 1.
        dual_clip: largest loss where the advantage is negative, in units of it; above 1.
        cap: largest importance weight of `cispo`, an absolute ratio.
        tau: sharpness of `sapo`'s gate where the advantage is positive.
        tau_negative: the same where it is not.
        log_clip_range: `gmpo`'s clip of log ratios below 0 (and above it unless the next is given).
        log_clip_range_high: `gmpo`'s clip of log ratios above 0.
        kl_coef: weight of the KL term to the reference; 0 switches the reference off.
        kl_estimator: `k1`, `k2`, `k3`; `ratio_k1`, `ratio_k3`: times the importance ratio; or `exact`:
            over the whole vocabulary, for one more pass of the reference in every update.
        kl_placement: in the `loss`, or in the `reward` (minus kl_coef times the sum of k1).
        kl_on_dead_groups: whether groups whose rewards are all equal feel KL and entropy terms.
        kl_target: KL in nats per token that kl_coef is steered to; None: kl_coef is constant.
        kl_adaptation: gain of that controller, in (0, 5).
        ref_sync_every: updates after which the reference moves towards the policy; 0: it is frozen.
        ref_mixup_alpha: how far it moves then, in (0, 1]; 1 copies the policy.
        reduction: What the loss is a mean or a sum over, see `grpo_jax.objective.losses.loss_weights`.
        entropy_coef: weight of an entropy bonus.
        top_entropy: share of the batch's tokens, those of highest entropy, that train the policy; (0, 1].
        max_staleness: nats by which the mean log-prob of a completion with a negative advantage may have
            fallen since it was sampled; beyond, it does not train the policy.
        importance_cap: largest truncated importance weight between sampler and scorer; at least 1.
        mask_truncated: completions cut off at max_new_tokens do not train, nor do they count in the mean and
            standard deviation of their group.
        overlong_buffer: tokens before max_new_tokens over which a penalty on the reward grows to 1; 0: off
            (None with `dapo`: a fifth of max_new_tokens).
        dynamic_sampling: train only on groups whose rewards differ, and sample more until there are enough.
        max_sampling_rounds: rounds of sampling per rollout at most, with dynamic_sampling.
    """

    name: str = "grpo"
    group_size: int = 8
    num_iterations: int = 1
    num_minibatches: int = 1
    advantage: Literal[*ADVANTAGES] | None = None
    aggregation: Literal[*AGGREGATIONS] | None = None
    missing: Literal[*MISSING] | None = None
    ratio_level: Literal[*RATIO_LEVELS] | None = None
    surrogate: Literal[*SURROGATES] | None = None
    clip_range: float | None = None
    clip_range_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    cap: float | None = None
    tau: float | None = None
    tau_negative: float | None = None
    log_clip_range: float | None = None
    log_clip_range_high: float | None = None
    kl_coef: float | None = None
    kl_estimator: Literal[*KL_NAMES] | None = None
    kl_placement: Literal[*KL_PLACEMENTS] | None = None
    kl_on_dead_groups: bool | None = None
    kl_target: float | None = None
    kl_adaptation: float = 0.1
    ref_sync_every: int = 0
    ref_mixup_alpha: float = 0.6
    reduction: Literal[*REDUCTIONS] | None = None
    entropy_coef: float | None = None
    top_entropy: float | None = None
    max_staleness: float | None = None
    importance_cap: float | None = None
    mask_truncated: bool | None = None
    overlong_buffer: int | None = None
    dynamic_sampling: bool | None = None
    max_sampling_rounds: int = 4

    def __post_init__(self):
        if self.name not in RECIPES:
            raise ValueError(
                f"algorithm.name: {self.name!r} is not a recipe; choose one of {', '.join(RECIPES)}"
            )
        for names, holds, wanted in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if not (value is None or holds(value)):
                    raise ValueError(f"algorithm.{name}: {value}; {wanted}")


# The help text names the recipes there are.
AlgorithmConfig.__doc__ = AlgorithmConfig.__doc__.format(recipes=", ".join(f"`{name}`" for name in RECIPES))

# names -> what must hold of them, in code and in words
_RANGES = (
    ("group_size", lambda x: x >= 2, "a group needs at least 2"),
    ("num_iterations num_minibatches max_sampling_rounds", lambda x: x >= 1, "at least 1"),
    ("delta dual_clip", lambda x: 1 < x < math.inf, "a finite ratio above 1"),
    ("cap tau tau_negative kl_target", lambda x: 0 < x < math.inf, "finite, above 0"),
    (
        "kl_coef clip_range clip_range_high log_clip_range log_clip_range_high max_staleness",
        lambda x: 0 <= x < math.inf,
        "a finite number, not negative",
    ),
    ("entropy_coef", math.isfinite, "a finite number"),
    ("importance_cap", lambda x: 1 <= x < math.inf, "a finite ratio, at least 1"),
    ("top_entropy ref_mixup_alpha", lambda x: 0 < x <= 1, "in (0, 1]"),
    ("kl_adaptation", lambda x: 0 < x < 5, "in (0, 5)"),
    ("overlong_buffer ref_sync_every", lambda x: x >= 0, "0 (off) or more"),
)
