"""Settings that have no effect in a run: they are refused, or a line before the first step names them."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from grpo_jax.config.run import Config, EvaluationConfig
from grpo_jax.objective.kl import kl_k1
from grpo_jax.objective.recipes import Recipe
from grpo_jax.objective.surrogates import reinforce_surrogate


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts that decide whether a setting has an effect.

    Args:
        config: config of the run.
        recipe: recipe that the config makes.
        num_rewards: number of reward functions that train.
    """

    config: Config
    recipe: Recipe
    num_rewards: int


class _Setting(NamedTuple):
    section: str
    key: str
    works: Callable[[Facts], bool]
    needs: str  # the setting has no effect without this


def _has_kl(facts: Facts) -> bool:
    return facts.recipe.kl_coef > 0


def _has_penalty(facts: Facts) -> bool:
    return _has_kl(facts) or bool(facts.recipe.entropy_coef)


def _has_several_rewards(facts: Facts) -> bool:
    return facts.num_rewards > 1


def _has_several_terms(facts: Facts) -> bool:
    # A penalty is one more term of the sum, and gdpo divides even a single term by the batch's deviation.
    recipe = facts.recipe
    penalty = recipe.overlong_tokens(facts.config.sampling.max_new_tokens) or recipe.kl_placement == "reward"
    return _has_several_rewards(facts) or bool(penalty) or recipe.aggregation == "gdpo"


_KL = "a KL term: set algorithm.kl_coef above 0"
_REFUSED = (
    _Setting("algorithm", "kl_adaptation", lambda facts: facts.config.algorithm.kl_target is not None,
             "algorithm.kl_target"),
    _Setting("algorithm", "ref_mixup_alpha", lambda facts: facts.config.algorithm.ref_sync_every > 0,
             "algorithm.ref_sync_every"),
    _Setting("algorithm", "max_sampling_rounds", lambda facts: facts.recipe.dynamic_sampling,
             "algorithm.dynamic_sampling"),
    _Setting("algorithm", "kl_estimator", _has_kl, _KL),
    _Setting("algorithm", "kl_placement", _has_kl, _KL),
    _Setting("algorithm", "kl_on_dead_groups", _has_penalty, f"{_KL}, or algorithm.entropy_coef"),
    _Setting("algorithm", "missing", _has_several_rewards, "a second reward"),
    _Setting("algorithm", "aggregation", _has_several_terms, "a second reward"),
    _Setting("data", "few_shot_separator", lambda r: bool(r.config.data.few_shot), "data.few_shot"),
    _Setting("checkpoints", "best_mode", lambda facts: facts.config.checkpoints.best_metric is not None,
             "checkpoints.best_metric"),
    _Setting("tracking", "wandb_project", lambda facts: facts.config.tracking.wandb, "tracking.wandb"),
    _Setting("tracking", "wandb_name", lambda facts: facts.config.tracking.wandb, "tracking.wandb"),
)  # fmt: skip


def check_settings(config: Config, recipe: Recipe, *, num_rewards: int) -> None:
    """Refuses settings that differ from their defaults and have no effect.

    Args:
        config: config of the run.
        recipe: recipe that the config makes.
        num_rewards: number of reward functions that train.

    Raises:
        ValueError: the message names the setting, its value and what it needs to have an effect.
    """
    facts = Facts(config=config, recipe=recipe, num_rewards=num_rewards)
    for section, key, works, needs in _REFUSED:
        value = getattr(getattr(config, section), key)
        if _is_given(facts, section, key) and not works(facts):
            raise ValueError(
                f"{section}.{key}: {value} does nothing without {needs}; give that, or leave {key} out"
            )


def _is_given(facts: Facts, section: str, key: str) -> bool:
    """Says whether a setting differs from what it would be if it were left out."""
    record = getattr(facts.config, section)
    default = next(field.default for field in fields(record) if field.name == key)
    if default is not None or section != "algorithm":
        return getattr(record, key) != default
    # If it is left out, the recipe's own value counts. Repeating that value is not a mistake.
    own = facts.config.algorithm.recipe
    names = ("kl_estimator", "kl_ratio_corrected") if key == "kl_estimator" else (key,)
    return any(getattr(facts.recipe, name) != getattr(own, name) for name in names)


def setting_notes(config: Config, recipe: Recipe, *, num_held_out: int, num_steps: int) -> list[str]:
    """Returns a line for each setting that has no effect, or a bad one, but that need not be refused.

    For example, a trial run of three steps may use a config file with a long schedule, or the effect of a
    setting may depend on the data.

    Args:
        config: config of the run.
        recipe: recipe that the config makes.
        num_held_out: number of prompts that evaluation uses.
        num_steps: number of optimizer steps of the whole run.
    """
    found: list[tuple[bool, str]] = [
        (recipe.kl_placement == "loss" and recipe.kl_estimator is kl_k1 and not recipe.kl_ratio_corrected
         and recipe.kl_coef > 0,
         "algorithm.kl_estimator: k1 in the loss does not pull towards the reference, since the mean of its "
         "gradient is 0. Use k2, k3, ratio_k1 or exact, or algorithm.kl_placement: reward"),
        (recipe.surrogate is reinforce_surrogate and config.updates_per_rollout > 1,
         f"the surrogate `reinforce` corrects for no step away from the policy that sampled, but "
         f"algorithm.num_iterations times num_minibatches makes {config.updates_per_rollout} updates from "
         "one rollout. Set both to 1, or algorithm.surrogate: clipped"),
        (config.training.num_steps is not None and _differs(config.training, "num_epochs"),
         f"training.num_epochs: {config.training.num_epochs} does nothing, since training.num_steps: "
         f"{config.training.num_steps} is given"),
        (config.training.warmup_steps >= num_steps,
         f"training.warmup_steps: {config.training.warmup_steps} is not less than the {num_steps} steps of "
         "the run: the learning rate never reaches training.learning_rate"),
        (config.algorithm.ref_sync_every >= num_steps,
         f"algorithm.ref_sync_every: {config.algorithm.ref_sync_every} does nothing: the run has "
         f"{num_steps} steps, and none comes after the first sync"),
    ]  # fmt: skip
    return [text for applies, text in found if applies] + _evaluation_notes(config, num_held_out)


def _differs(record: Any, key: str) -> bool:
    return getattr(record, key) != getattr(type(record)(), key)


def _evaluation_notes(config: Config, num_held_out: int) -> list[str]:
    # `score` uses batch_size as well.
    keys = sorted({field.name for field in fields(EvaluationConfig)} - {"num_prompts", "batch_size"})
    given = [f"evaluation.{key}" for key in keys if _differs(config.evaluation, key)]
    if num_held_out or not given:
        return []
    why = "evaluation.num_prompts is 0"
    if config.evaluation.num_prompts:
        why = "there are no held-out prompts; give data.eval_file or data.eval_fraction"
    verb = "does" if len(given) == 1 else "do"
    return [f"{', '.join(given)} {verb} nothing: {why}"]
