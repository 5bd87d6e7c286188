"""The section `algorithm` of the configuration: it names a recipe and what is changed in it."""

import math
from dataclasses import dataclass
from typing import Literal

from grpo_jax.config.checks import check_ranges
from grpo_jax.named_objects import IN_PYTHON, find_object
from grpo_jax.objective.advantages import ADVANTAGES, AGGREGATIONS, MISSING
from grpo_jax.objective.losses import RATIO_LEVELS, REDUCTIONS
from grpo_jax.objective.recipes import KL_NAMES, KL_PLACEMENTS, RECIPES, Recipe
from grpo_jax.objective.surrogates import SURROGATES


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """A recipe, and what is changed in it. A key that is `null` keeps the recipe's own choice.

    Args:
        name: name of the recipe: {recipes}. A `grpo_jax.Recipe` of your own is `package.module:name` or
            `path/file.py:name`.
        group_size: G, the number of completions that are sampled for each prompt, at least 2.
        num_iterations: mu, the number of optimizer passes over one rollout, at least 1.
        num_minibatches: number of optimizer batches that one rollout is split into. A rollout has
            num_minibatches * training.batch_size completions, and each pass over it makes num_minibatches
            updates.
        advantage: what happens to the centred rewards of a group. They are divided by the standard deviation
            of the group (`std`), by that of the `batch`, or by nothing (`none`). With `leave_one_out`, the
            mean of the other completions is subtracted instead.
        aggregation: how several reward functions become one advantage: `sum_then_normalize`,
            `normalize_then_sum`, or `gdpo`, which is `normalize_then_sum` divided by the standard deviation
            over the batch.
        missing: what happens to a completion that lacks some of its rewards. `drop` leaves it out (but a
            function that gave no value to a whole group is left out for that group instead). `skip` leaves
            the missing terms out of the sum, as if they were 0. `renormalize` scales up the weights of the
            other functions.
        ratio_level: level of the importance ratio: one ratio per token, one per sequence, or the value of the
            sequence with the gradient of the token.
        surrogate: policy loss of a token, see `grpo_jax.objective.surrogates`.
        clip_range: distance from 1 at which PPO clips the ratio below 1 (and above it, unless clip_range_high
            is given).
        clip_range_high: distance from 1 at which PPO clips the ratio above 1.
        delta: largest ratio where the advantage is negative (two-sided clipping), above 1.
        dual_clip: largest loss where the advantage is negative, in units of that advantage, above 1.
        cap: largest importance weight of `cispo`, an absolute ratio.
        tau: sharpness of `sapo`'s gate where the advantage is positive.
        tau_negative: sharpness of `sapo`'s gate where the advantage is not positive.
        log_clip_range: bound at which `gmpo` clips log ratios below 0 (and above it, unless
            log_clip_range_high is given).
        log_clip_range_high: bound at which `gmpo` clips log ratios above 0.
        kl_coef: weight of the KL term that pulls towards the reference. With 0 there is no reference.
        kl_estimator: estimator of the KL term: `k1`, `k2`, `k3`, or a variant. `ratio_k1` and `ratio_k3`
            are `k1` and `k3` times the importance ratio. `exact` sums over the whole vocabulary, which needs
            one more pass of the reference in every update.
        kl_placement: where the KL term goes: into the `loss`, or into the `reward` (minus kl_coef times the
            sum of k1).
        kl_on_dead_groups: whether the KL and entropy terms act on groups whose rewards are all equal.
        kl_target: KL in nats per token. kl_coef is raised or lowered until the KL has this value. `null`
            keeps kl_coef constant.
        kl_adaptation: gain of the controller that moves kl_coef towards kl_target, in (0, 5).
        ref_sync_every: number of updates after which the reference moves towards the policy. 0 freezes the
            reference.
        ref_mixup_alpha: share of the way that the reference moves each time, in (0, 1]. 1 copies the policy.
        reduction: what the loss is a mean or a sum over, see `grpo_jax.objective.losses.loss_weights`.
        entropy_coef: weight of an entropy bonus.
        top_entropy: share of the batch's tokens, those of the highest entropy, that train the policy, in (0,
            1].
        max_staleness: largest drop of a completion's mean log-prob since it was sampled, in nats. A
            completion with a negative advantage that dropped further does not train the policy.
        importance_cap: largest importance weight between sampler and scorer, at least 1. Larger weights are
            truncated to it.
        mask_truncated: whether completions that max_new_tokens truncated are left out. They then neither
            train nor count in the mean and standard deviation of their group.
        overlong_buffer: number of tokens before max_new_tokens over which a penalty on the reward grows to 1.
            0 switches it off. With `dapo`, `null` means a fifth of max_new_tokens.
        dynamic_sampling: whether only groups whose rewards differ train the policy. More prompts are then
            sampled until there are enough such groups.
        max_sampling_rounds: largest number of rounds per rollout that dynamic_sampling may sample.
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
        named = self.name
        if isinstance(named, Recipe):  # from Python
            if named == RECIPES.get(named.name):
                object.__setattr__(self, "name", named.name)
        elif named not in RECIPES and ":" not in named:
            raise ValueError(
                f"algorithm.name: {named!r} is not a recipe; choose one of {', '.join(RECIPES)}, or name "
                "your own as package.module:name or path/file.py:name"
            )
        check_ranges("algorithm.", vars(self), _RANGES)

    @property
    def is_in_memory(self) -> bool:
        """Whether the name stands for a recipe that a Python program gave as an object."""
        return isinstance(self.name, str) and self.name.startswith(f"{IN_PYTHON}:")

    @property
    def recipe(self) -> Recipe:
        """The recipe that `name` stands for, without what is changed in it.

        Raises:
            ValueError: the module or file has no such recipe.
        """
        if isinstance(self.name, Recipe):
            return self.name
        if self.name in RECIPES:
            return RECIPES[self.name]
        _, found, place = find_object(self.name, kind="recipe", built_in=tuple(RECIPES))
        if not isinstance(found, Recipe):
            raise ValueError(
                f"algorithm.name: {self.name!r} at {place} is a {type(found).__name__}, and it must be a "
                'grpo_jax.Recipe, such as grpo.replace(reduction="token")'
            )
        return found


# The help text lists the recipes.
AlgorithmConfig.__doc__ = AlgorithmConfig.__doc__.format(recipes=", ".join(f"`{name}`" for name in RECIPES))

_RANGES = (
    ("group_size", lambda x: x >= 2, "at least 2"),
    ("num_iterations num_minibatches max_sampling_rounds", lambda x: x >= 1, "at least 1"),
    ("delta dual_clip", lambda x: 1 < x < math.inf, "a finite ratio above 1"),
    ("cap tau tau_negative kl_target", lambda x: 0 < x < math.inf, "finite and above 0"),
    (
        "kl_coef clip_range clip_range_high log_clip_range log_clip_range_high max_staleness",
        lambda x: 0 <= x < math.inf,
        "finite and not negative",
    ),
    ("entropy_coef", math.isfinite, "a finite number"),
    ("importance_cap", lambda x: 1 <= x < math.inf, "a finite ratio of at least 1"),
    ("top_entropy ref_mixup_alpha", lambda x: 0 < x <= 1, "in (0, 1]"),
    ("kl_adaptation", lambda x: 0 < x < 5, "in (0, 5)"),
    ("overlong_buffer ref_sync_every", lambda x: x >= 0, "0 (off) or more"),
)
