"""What somebody's own loop needs between `generate` and `train_step`: rewards in, an Experience out."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from grpo_jax.objective.recipes import Recipe
from grpo_jax.training.experience import add_up_rewards, make_experience
from grpo_jax.types import Experience, Judged, Rollout

Values = Shaped[ArrayLike, "N G"] | Sequence[Sequence[float]]

_SCORED = "grpo_jax.completion_log_probs(policy, {}, rollout)"


def experience_of(
    rollout: Rollout,
    recipe: Recipe,
    *,
    rewards: Values | None = None,
    advantages: Values | None = None,
    ref_log_probs: Float[ArrayLike, "B T"] | None = None,
    old_log_probs: Float[ArrayLike, "B T"] | None = None,
    entropies: Float[ArrayLike, "B T"] | None = None,
    num_microbatches: int = 1,
) -> Experience:
    """Makes what `train_step` takes of a rollout and its rewards, as the recipe says.

    Masks, weights, the penalty for overlong completions and the KL in the reward are the recipe's. Nothing is
    sampled again, so groups without a signal stay in the batch even if the recipe has dynamic sampling.

    Args:
        rollout: B = N*G rows of `generate`.
        recipe: the objective.
        rewards: [N,G], one number for each completion, prompts by completions. NaN means no reward. Their
            advantages are the recipe's.
        advantages: [N,G], given instead of rewards, such as those of `group_advantages`. They train as they
            are, without the recipe's own normalisation and penalties.
        ref_log_probs: [B,T], log-probs under the reference, for a recipe with a KL term.
        old_log_probs: [B,T], log-probs under the policy that sampled, see `completion_log_probs`. `None` is
            right for the first update after the rollout, whose own log-probs they are.
        entropies: [B,T], the second result of `completion_log_probs`, for a recipe with `top_entropy`.
        num_microbatches: number of micro-batches, for the reduction `local_token`.

    Returns:
        The experience of one optimizer batch of B rows.

    Raises:
        ValueError: rewards or advantages do not fit the rollout, or the recipe needs more than is given.

    >>> import jax, jax.numpy as jnp
    >>> from grpo_jax import generate, make_recipe, pad_prompts, policy_from_apply
    >>> policy = policy_from_apply(lambda params, tokens, mask, positions: params[tokens])
    >>> settings = {"group_size": 2, "max_new_tokens": 3, "eos_ids": 0}
    >>> prompts = pad_prompts([[1], [2]], 1)
    >>> rollout = generate(policy, jnp.zeros((5, 5)), prompts, jax.random.key(0), **settings)
    >>> experience = experience_of(rollout, make_recipe("dr_grpo"), rewards=[[1.0, 0.0], [1.0, 1.0]])
    >>> experience.advantages.tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    if (rewards is None) == (advantages is None):
        raise ValueError("give rewards [N, G] or advantages [N, G], and not both")
    name = "rewards" if advantages is None else "advantages"
    values = _checked_values(rollout, name, rewards if advantages is None else advantages)
    given = {"old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs, "entropies": entropies}
    _check_inputs(rollout, recipe, given, by_advantages=advantages is not None)
    group_size = values.shape[1]
    max_length = rollout.tokens.shape[1]
    scores = values.reshape(-1, 1)
    settings = {"reward_weights": [1.0], "max_length": max_length, "group_size": group_size}
    lengths = np.asarray(rollout.mask).sum(axis=1)
    totals = add_up_rewards(scores, lengths, np.asarray(rollout.finished), recipe, **settings)
    experience = make_experience(
        Judged(rollout=rollout, scores=scores, totals=totals, **given),
        recipe,
        prompt_length=rollout.prompt_tokens.shape[1],
        num_microbatches=num_microbatches,
        **settings,
    )
    # It is measured whoever gave the old log-probs.
    experience = experience.replace(sampler_log_probs=jnp.asarray(rollout.log_probs))
    if advantages is None:
        return experience
    return experience.replace(advantages=jnp.asarray(values, jnp.float32).reshape(-1))


def _checked_values(rollout: Rollout, name: str, values: Values) -> Float[np.ndarray, "N G"]:
    """Returns rewards or advantages [N,G] on the host, and raises unless their groups are the rollout's."""
    values = np.asarray(values, np.float64)
    rows = rollout.tokens.shape[0]
    if values.ndim != 2:
        raise ValueError(
            f"{name} have the shape {list(values.shape)}, and they are [N, G], prompts by completions: give "
            f"{name}.reshape(-1, group_size)"
        )
    if values.size != rows:
        raise ValueError(
            f"{name} {list(values.shape)} are {values.size} numbers, and the rollout has {rows} completions"
        )
    if name == "advantages" and not np.isfinite(values).all():
        raise ValueError("advantages are not all finite: give rewards, of which NaN means that there is none")
    prompts = np.asarray(rollout.prompt_tokens).reshape(*values.shape, -1)
    if (prompts != prompts[:, :1]).any():
        group_size = values.shape[1]
        raise ValueError(
            f"{name} {list(values.shape)} make groups of {group_size} completions, and these have different "
            "prompts: the second axis is the group_size of generate"
        )
    return values


def _check_inputs(rollout: Rollout, recipe: Recipe, given: dict, *, by_advantages: bool) -> None:
    kl = bool(np.any(np.asarray(recipe.kl_coef) != 0))
    in_reward = kl and recipe.kl_placement == "reward"
    if in_reward and by_advantages:
        raise ValueError(
            f"the recipe {recipe.name} subtracts its KL from the rewards: give rewards instead of "
            "advantages, or make_recipe(..., kl_coef=0)"
        )
    needs = {
        "old_log_probs": in_reward or recipe.importance_cap is not None,
        "ref_log_probs": kl and not recipe.exact_kl,
        "entropies": recipe.top_entropy is not None,
    }
    for name, needed in needs.items():
        if needed and given[name] is None:
            where = {
                "old_log_probs": _SCORED.format("params") + "[0]",
                "ref_log_probs": _SCORED.format("ref_params") + "[0], or make_recipe(..., kl_coef=0)",
                "entropies": _SCORED.format("params") + "[1]",
            }[name]
            raise ValueError(f"the recipe {recipe.name} needs {name}: give {name}={where}")
        if given[name] is not None and np.shape(given[name]) != rollout.tokens.shape:
            raise ValueError(
                f"{name} have the shape {list(np.shape(given[name]))}, and the completions "
                f"{list(rollout.tokens.shape)}"
            )
