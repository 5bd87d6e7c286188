"""Named compositions of the five axes: advantage x ratio level x surrogate x KL estimator x reduction.

A recipe is to `grpo_loss` what `optax.adam` is to its chain: a record of choices with a citation.
"""

import functools
import inspect
from collections.abc import Callable

import flax.struct

from grpo_jax.advantages import SCALES, group_advantages
from grpo_jax.kl import KL_ESTIMATORS, kl_k3
from grpo_jax.losses import (
    RATIO_LEVELS,
    REDUCTIONS,
    LossMetrics,
    cispo_surrogate,
    clipped_surrogate,
    grpo_loss,
    loss_weights,
    reinforce_surrogate,
    sapo_surrogate,
)
from grpo_jax.types import Array


def _static(**kwargs):
    return flax.struct.field(pytree_node=False, **kwargs)


@flax.struct.dataclass(kw_only=True)
class Recipe:
    """One objective. Functions and names are static; `clip` and `kl_coef` are numbers and may change
    between calls of a jitted function without compiling it again.
    """

    name: str = _static()
    paper: str = _static()
    advantage_scale: str = _static(default="std")  # see group_advantages
    ratio_level: str = _static(default="token")  # see log_ratios
    surrogate: Callable[..., Array] = _static(default=clipped_surrogate)
    clip: dict[str, float] = flax.struct.field(default_factory=dict)  # keywords of the surrogate
    kl_estimator: Callable[[Array, Array], Array] = _static(default=kl_k3)
    kl_ratio_corrected: bool = _static(default=False)  # see grpo_loss
    kl_coef: float = 0.0
    reduction: str = _static(default="sequence")  # see loss_weights

    def advantages(self, rewards: Array, *, valid: Array | None = None) -> Array:
        """Computes the advantages [N,G] of rewards [N,G]."""
        return group_advantages(rewards, valid=valid, scale=self.advantage_scale)

    def weights(self, mask: Array, *, max_length: int) -> Array:
        """Computes the weights [B,T] of the whole optimizer batch's mask [B,T]."""
        return loss_weights(mask, reduction=self.reduction, max_length=max_length)

    def loss(self, log_probs, old_log_probs, advantages, mask, weights, ref_log_probs=None):
        """Computes `grpo_loss` with this recipe's choices: (loss [], LossMetrics)."""
        return grpo_loss(
            log_probs,
            old_log_probs,
            advantages,
            mask,
            weights,
            ref_log_probs=ref_log_probs,
            ratio_level=self.ratio_level,
            surrogate=functools.partial(self.surrogate, **self.clip),
            kl_estimator=self.kl_estimator,
            kl_coef=self.kl_coef,
            kl_ratio_corrected=self.kl_ratio_corrected,
        )


grpo = Recipe(
    name="grpo",
    paper="Shao et al. 2024, https://arxiv.org/abs/2402.03300, equations 3 and 4",
    clip={"clip_range": 0.2},
    kl_coef=0.04,
)

dr_grpo = Recipe(
    name="dr_grpo",
    paper="Liu et al. 2025, https://arxiv.org/abs/2503.20783, section 3.1: no std, no length in the weights",
    advantage_scale="none",
    clip={"clip_range": 0.2},
    reduction="constant",
)

# The loss half of DAPO: clip-higher and token-level weights. Dynamic sampling and overlong reward
# shaping belong to the actor.
dapo = Recipe(
    name="dapo",
    paper="Yu et al. 2025, https://arxiv.org/abs/2503.14476, equations 8 to 10",
    clip={"clip_range": 0.2, "clip_range_high": 0.28},
    reduction="token",
)

_GSPO_CLIP = {"clip_range": 3e-4, "clip_range_high": 4e-4}  # section 5.1; sequence ratios stay close to 1

gspo = Recipe(
    name="gspo",
    paper="Zheng et al. 2025, https://arxiv.org/abs/2507.18071, equations 5 to 7",
    ratio_level="sequence",
    clip=_GSPO_CLIP,
)

gspo_token = Recipe(
    name="gspo_token",
    paper="Zheng et al. 2025, https://arxiv.org/abs/2507.18071, equations 13 and 14",
    ratio_level="sequence_token",
    clip=_GSPO_CLIP,
)

cispo = Recipe(
    name="cispo",
    paper="MiniMax 2025, https://arxiv.org/abs/2506.13585, equations 4 and 5",
    surrogate=cispo_surrogate,
    clip={"cap": 5.0},
    reduction="token",
)

sapo = Recipe(
    name="sapo",
    paper="Gao et al. 2025, https://arxiv.org/abs/2511.20347, equations 4 to 6",
    surrogate=sapo_surrogate,
    clip={"tau": 1.0, "tau_negative": 1.05},
)

# The check without any of it: centred rewards, the plain policy gradient. One pass per rollout.
reinforce = Recipe(
    name="reinforce",
    paper="Williams 1992, https://doi.org/10.1007/BF00992696, with the group's mean as baseline",
    advantage_scale="none",
    surrogate=reinforce_surrogate,
    reduction="token",
)

RECIPES = {recipe.name: recipe for recipe in (grpo, dr_grpo, dapo, gspo, gspo_token, cispo, sapo, reinforce)}

# `ratio_k1` and `ratio_k3` are k1 and k3 times the importance ratio, see `grpo_loss`.
KL_NAMES = (*KL_ESTIMATORS, "ratio_k1", "ratio_k3")


def make_recipe(
    name: str,
    *,
    kl_coef: float | None = None,
    kl_estimator: str | None = None,
    ratio_level: str | None = None,
    reduction: str | None = None,
    advantage_scale: str | None = None,
    **clip: float | None,
) -> Recipe:
    """Returns the named recipe with some of its choices replaced. None keeps the recipe's own.

    Args:
        name: a key of `RECIPES`.
        kl_coef: weight of the KL term.
        kl_estimator: one of `KL_NAMES`.
        ratio_level: see `log_ratios`.
        reduction: see `loss_weights`.
        advantage_scale: see `group_advantages`.
        **clip: keywords of the recipe's surrogate, such as `clip_range`. Giving `clip_range` alone
            makes the clip symmetric, whatever the recipe's own upper bound is.

    Raises:
        ValueError: unknown recipe or name of a choice, or a clip keyword that the surrogate does not have.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: {name!r}; choose one of {', '.join(RECIPES)}")
    for key, value, choices in (
        ("kl_estimator", kl_estimator, KL_NAMES),
        ("ratio_level", ratio_level, RATIO_LEVELS),
        ("reduction", reduction, REDUCTIONS),
        ("advantage_scale", advantage_scale, SCALES),
    ):
        if value is not None and value not in choices:
            raise ValueError(f"{key}: {value!r}; choose one of {', '.join(choices)}")
    recipe = RECIPES[name]
    clip = {key: value for key, value in clip.items() if value is not None}
    keywords = inspect.signature(recipe.surrogate).parameters
    for key in clip:
        if key not in keywords or keywords[key].kind is not inspect.Parameter.KEYWORD_ONLY:
            raise ValueError(f"{key} means nothing to {recipe.surrogate.__name__}, the surrogate of {name!r}")
    base = {} if "clip_range" in clip else recipe.clip
    changes = {
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator and KL_ESTIMATORS[kl_estimator.removeprefix("ratio_")],
        "kl_ratio_corrected": kl_estimator and kl_estimator.startswith("ratio_"),
        "ratio_level": ratio_level,
        "reduction": reduction,
        "advantage_scale": advantage_scale,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    return recipe.replace(clip={**base, **clip}, **changes)


__all__ = ["KL_NAMES", "RECIPES", "LossMetrics", "Recipe", "make_recipe", *RECIPES]
