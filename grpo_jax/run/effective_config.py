"""The config with the values that take effect: what the recipe has where the user left a key open."""

from dataclasses import fields, replace
from typing import Any

from grpo_jax.config.run import Config
from grpo_jax.objective.advantages import ADVANTAGES
from grpo_jax.objective.kl import KL_ESTIMATORS
from grpo_jax.objective.recipes import CLIP_KEYWORDS, Recipe, make_recipe
from grpo_jax.objective.surrogates import SURROGATES


def named_recipe(config: Config) -> Recipe:
    """Makes the recipe that a config names and changes.

    Raises:
        ValueError: its choices contradict each other.
    """
    choices = {field.name for field in fields(Recipe)} | CLIP_KEYWORDS
    algorithm = vars(config.algorithm)
    given = {key: value for key, value in algorithm.items() if key in choices - {"name"}}
    return make_recipe(config.algorithm.recipe, **given)


def effective_config(config: Config) -> Config:
    """Returns the config with the recipe's own values in the place of null.

    The recipe of the result is the same. A key stays null where the recipe has no value: a bonus or a cap
    that is off, a clip range that another surrogate has, and a function of a recipe of one's own.
    """
    if config.algorithm.is_in_memory:  # a config that was read: what it holds is effective already
        return config
    values = _values(named_recipe(config), config.sampling.max_new_tokens)
    open_keys = [
        field.name for field in fields(config.algorithm) if getattr(config.algorithm, field.name) is None
    ]
    filled = {key: values[key] for key in open_keys if values.get(key) is not None}
    return replace(config, algorithm=replace(config.algorithm, **filled))


def recipe_settings(config: Config) -> dict[str, Any]:
    """Returns the settings of the section `algorithm` that the recipe of a config has by itself."""
    choices = {field.name for field in fields(Recipe)} | CLIP_KEYWORDS
    own = {
        field.name: field.default for field in fields(config.algorithm) if field.name in choices - {"name"}
    }
    unchanged = replace(config, algorithm=replace(config.algorithm, **own))
    algorithm = vars(effective_config(unchanged).algorithm)
    return {key: algorithm[key] for key in own}


def _values(recipe: Recipe, max_new_tokens: int) -> dict[str, Any]:
    """Returns what a recipe is made of, under the names of the config."""
    estimators = {function: name for name, function in KL_ESTIMATORS.items()}
    kl_estimator = "exact" if recipe.exact_kl else estimators.get(recipe.kl_estimator)
    values = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    return {
        **values,
        **recipe.clip,
        "advantage": _name(ADVANTAGES, recipe.advantage),
        "surrogate": _name(SURROGATES, recipe.surrogate),
        "kl_estimator": f"ratio_{kl_estimator}"
        if kl_estimator and recipe.kl_ratio_corrected
        else kl_estimator,
        "overlong_buffer": recipe.overlong_tokens(max_new_tokens),
    }


def _name(table: dict[str, Any], function: Any) -> str | None:
    return next((name for name, entry in table.items() if entry is function), None)
