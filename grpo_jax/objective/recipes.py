"""Named compositions of the five axes: advantage x ratio level x surrogate x KL estimator x reduction.

A recipe is to `grpo_loss` what `optax.adam` is to its chain: a record of choices with a citation.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Real, Shaped

from grpo_jax.objective.advantages import ADVANTAGES, AGGREGATIONS, MISSING, group_advantages
from grpo_jax.objective.kl import KL_ESTIMATORS, kl_exact, kl_k1, kl_k3
from grpo_jax.objective.losses import RATIO_LEVELS, REDUCTIONS, LossMetrics, grpo_loss, loss_weights
from grpo_jax.objective.surrogates import SURROGATES, clip_keywords, clipped_surrogate

# `ratio_k1` and `ratio_k3` are k1 and k3 times the importance ratio, see `grpo_loss`; `exact` is `kl_exact`.
KL_NAMES = (*KL_ESTIMATORS, "ratio_k1", "ratio_k3", "exact")
KL_PLACEMENTS = ("loss", "reward")
CLIP_KEYWORDS = frozenset(key for surrogate in SURROGATES.values() for key in clip_keywords(surrogate))
_NUMBERS = ("clip", "kl_coef", "entropy_coef", "top_entropy", "max_staleness", "importance_cap")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One objective. Functions and names are static. Numbers are leaves of the pytree, so they may change
    between calls of a jitted function without a recompilation.

    Args:
        name: name of the recipe, a key of `RECIPES`.
        paper: the citation.
        advantage: one of `ADVANTAGES`, rewards [N,G] -> advantages [N,G].
        ratio_level: level of the importance ratio, see `log_ratios`.
        surrogate: one of `SURROGATES`, (log ratios, log-probs, advantages) -> losses [B,T].
        clip: keywords of the surrogate, such as `clip_range`.
        kl_estimator: function of two log-probs, or of logits if it is `kl_exact`.
        kl_ratio_corrected: whether the KL estimate is multiplied by the ratio, see `grpo_loss`.
        kl_placement: `loss`, or `reward` (minus kl_coef times `kl_penalty`, and no KL term in the loss).
        kl_coef: weight of the KL term.
        reduction: what the loss is a mean or a sum over, see `loss_weights`.
        aggregation: how several rewards become one, one of `AGGREGATIONS`.
        missing: what a missing reward does, see `effective_weights`.
        kl_on_dead_groups: whether groups without a signal feel the KL term.
        entropy_coef: weight of the entropy bonus. None means that there is none, as for the next three.
        top_entropy: share of the tokens that train, see `top_entropy_mask`.
        max_staleness: limit in nats, see `grpo_loss`.
        importance_cap: largest weight of a token, see `importance_weights`.
        mask_truncated: whether completions truncated at the limit neither train nor shift the baseline.
        overlong_share: buffer of `overlong_penalty` as a share of the limit. 0 turns it off.
        overlong_buffer: the same in tokens. None means that overlong_share decides.
        dynamic_sampling: whether only groups with a signal train, see `grpo_jax.training.actor`.
    """

    name: str
    paper: str
    advantage: Callable[..., Array] = group_advantages
    ratio_level: str = "token"
    surrogate: Callable[..., Array] = clipped_surrogate
    clip: dict[str, Real[ArrayLike, ""]] = dataclasses.field(default_factory=dict)
    kl_estimator: Callable[[Array, Array], Array] = kl_k3
    kl_ratio_corrected: bool = False
    kl_placement: str = "loss"
    kl_coef: Real[ArrayLike, ""] = 0.0
    reduction: str = "sequence"
    aggregation: str = "sum_then_normalize"
    missing: str = "drop"
    kl_on_dead_groups: bool = True
    entropy_coef: Real[ArrayLike, ""] | None = None
    top_entropy: Real[ArrayLike, ""] | None = None
    max_staleness: Real[ArrayLike, ""] | None = None
    importance_cap: Real[ArrayLike, ""] | None = None
    mask_truncated: bool = False
    overlong_share: float = 0.0
    overlong_buffer: int | None = None
    dynamic_sampling: bool = False

    replace = dataclasses.replace

    @property
    def exact_kl(self) -> bool:
        """Says whether the KL term needs the reference's whole distributions and not only its log-probs."""
        return self.kl_estimator is kl_exact

    @property
    def separate_penalty(self) -> bool:
        """Says whether KL and entropy terms have other weights than the policy term."""
        factors = self.top_entropy is not None or self.importance_cap is not None
        return factors or not self.kl_on_dead_groups

    @property
    def needs_old_log_probs(self) -> bool:
        """Says whether the rollout's log-probs are needed before the update or may be an earlier policy's."""
        used = (
            self.top_entropy is not None or self.importance_cap is not None or self.kl_placement == "reward"
        )
        return used or self.dynamic_sampling  # groups left over were sampled by the policy of a step before

    def overlong_tokens(self, max_length: int) -> int:
        """Returns the buffer of `overlong_penalty` for a completion limit in tokens. 0 means no penalty."""
        if self.overlong_buffer is not None:
            return self.overlong_buffer
        return min(max(1, round(self.overlong_share * max_length)), max_length) if self.overlong_share else 0

    def advantages(
        self, rewards: Shaped[ArrayLike, "N G"], *, valid: Bool[ArrayLike, "N G"] | None = None
    ) -> Float[Array, "N G"]:
        """Calls `advantage`: this was its name until version 0.2."""
        warnings.warn("Recipe.advantages is Recipe.advantage now", DeprecationWarning, stacklevel=2)
        return self.advantage(rewards, valid=valid)

    def weights(
        self,
        mask: Bool[ArrayLike, "B T"],
        *,
        max_length: int,
        num_microbatches: int = 1,
        num_sequences: Int[ArrayLike, ""] | None = None,
    ) -> Float[Array, "B T"]:
        """Computes the weights [B,T] of the whole optimizer batch's mask [B,T]."""
        return loss_weights(
            mask,
            reduction=self.reduction,
            max_length=max_length,
            num_microbatches=num_microbatches,
            num_sequences=num_sequences,
        )

    def loss(
        self,
        log_probs: Float[ArrayLike, "B T"],
        old_log_probs: Float[ArrayLike, "B T"],
        advantages: Float[ArrayLike, " B"],
        mask: Bool[ArrayLike, "B T"],
        weights: Float[ArrayLike, "B T"],
        ref_log_probs: Float[ArrayLike, "B T"] | None = None,
        *,
        penalty_weights: Float[ArrayLike, "B T"] | None = None,
        kls: Float[ArrayLike, "B T"] | None = None,
        at_reference: Bool[ArrayLike, "B T"] | None = None,
        entropies: Float[ArrayLike, "B T"] | None = None,
    ) -> tuple[Float[Array, ""], LossMetrics]:
        """Computes `grpo_loss` with these choices. There is no KL term without ref_log_probs and kls."""
        if self.exact_kl and kls is None and ref_log_probs is not None:
            raise ValueError("an exact KL needs kls [B,T], see `token_log_probs_and_kls`")
        in_loss = self.kl_placement == "loss" and not (kls is None and ref_log_probs is None)
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
            kl_coef=self.kl_coef if in_loss else 0.0,
            kl_ratio_corrected=self.kl_ratio_corrected,
            kls=kls,
            at_reference=at_reference,
            entropies=None if self.entropy_coef is None else entropies,
            entropy_coef=0.0 if self.entropy_coef is None else self.entropy_coef,
            penalty_weights=penalty_weights,
            max_staleness=self.max_staleness,
        )


jax.tree_util.register_dataclass(
    Recipe,
    data_fields=_NUMBERS,
    meta_fields=[field.name for field in dataclasses.fields(Recipe) if field.name not in _NUMBERS],
)

grpo = Recipe(
    name="grpo",
    paper="Shao et al. 2024, https://arxiv.org/abs/2402.03300, equations 3 and 4",
    clip={"clip_range": 0.2},
    kl_coef=0.04,
)

dr_grpo = Recipe(
    name="dr_grpo",
    paper="Liu et al. 2025, https://arxiv.org/abs/2503.20783, section 3.2: no std, no length in the weights",
    advantage=ADVANTAGES["none"],
    clip={"clip_range": 0.2},
    reduction="constant",
)

dapo = Recipe(
    name="dapo",
    paper="Yu et al. 2025, https://arxiv.org/abs/2503.14476, equations 8 to 13",
    clip={"clip_range": 0.2, "clip_range_high": 0.28},
    reduction="token",
    overlong_share=0.2,  # section 4.1: 4,096 of 20,480 tokens
    dynamic_sampling=True,
)

# Not the "Beta normalization" of arXiv 2506.02864: TRL gives this name to a mean over the tokens of each
# micro-batch. It is the only recipe that depends, by definition, on num_microbatches.
bnpo = Recipe(
    name="bnpo",
    paper='loss_type="bnpo" of TRL, https://huggingface.co/docs/trl/grpo_trainer',
    clip={"clip_range": 0.2},
    reduction="local_token",
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
    surrogate=SURROGATES["cispo"],
    clip={"cap": 5.0},  # the paper gives no number; this is ScaleRL's, https://arxiv.org/abs/2510.13786
    reduction="token",
)

sapo = Recipe(
    name="sapo",
    paper="Gao et al. 2025, https://arxiv.org/abs/2511.20347, equations 4 to 6",
    surrogate=SURROGATES["sapo"],
    clip={"tau": 1.0, "tau_negative": 1.05},
)

gmpo = Recipe(
    name="gmpo",
    paper="Zhao et al. 2025, https://arxiv.org/abs/2507.20673, equation 3",
    surrogate=SURROGATES["gmpo"],
    clip={"log_clip_range": 0.4},
)

# A completion is one action. It has the log-prob of the whole sequence, and the KL is in its reward.
rloo = Recipe(
    name="rloo",
    paper="Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 2.3",
    advantage=ADVANTAGES["leave_one_out"],
    ratio_level="sequence",
    surrogate=SURROGATES["reinforce"],
    kl_estimator=kl_k1,
    kl_placement="reward",
    kl_coef=0.03,  # as in its summarisation runs, appendix C; in dialogue it is 0.10
    reduction="sequence_sum",
)

# The baseline without any of it: centred rewards and the plain policy gradient. Use one pass per rollout.
reinforce = Recipe(
    name="reinforce",
    paper="Williams 1992, https://doi.org/10.1007/BF00992696, with the group's mean as baseline",
    advantage=ADVANTAGES["none"],
    surrogate=SURROGATES["reinforce"],
    reduction="token",
)

RECIPES = {
    recipe.name: recipe
    for recipe in (grpo, dr_grpo, dapo, bnpo, gspo, gspo_token, cispo, sapo, gmpo, rloo, reinforce)
}

# name of a choice -> what it may be called
_CHOICES = {
    "advantage": tuple(ADVANTAGES),
    "ratio_level": tuple(RATIO_LEVELS),
    "surrogate": tuple(SURROGATES),
    "kl_estimator": KL_NAMES,
    "kl_placement": KL_PLACEMENTS,
    "reduction": tuple(REDUCTIONS),
    "aggregation": AGGREGATIONS,
    "missing": MISSING,
}


def make_recipe(name: str | Recipe, **choices: Any) -> Recipe:
    """Returns the named recipe with some of its choices replaced. None keeps the recipe's own.

    Args:
        name: a key of `RECIPES`, or a recipe.
        **choices: fields of `Recipe`, and keywords of the surrogate, such as `clip_range`. Fields that are
            functions go by their names (`ADVANTAGES`, `SURROGATES`, `KL_NAMES`). With `clip_range` alone
            the clip is symmetric, whatever the recipe's own upper bound is. Another surrogate than the
            recipe's starts from its own defaults.

    Raises:
        ValueError: the recipe or a choice is unknown, the surrogate does not have a given clip keyword,
            kl_coef is negative, or choices contradict each other.

    >>> make_recipe("grpo", clip_range_high=0.28, kl_coef=0.0).clip
    {'clip_range': 0.2, 'clip_range_high': 0.28}
    """
    if not isinstance(name, Recipe) and name not in RECIPES:
        raise ValueError(f"recipe: {name!r}; choose one of {', '.join(RECIPES)}")
    choices = {key: value for key, value in choices.items() if value is not None}
    for key, known in _CHOICES.items():
        if key in choices and choices[key] not in known:
            raise ValueError(f"{key}: {choices[key]!r}; choose one of {', '.join(known)}")
    recipe = name if isinstance(name, Recipe) else RECIPES[name]
    if "surrogate" in choices:
        surrogate = SURROGATES[choices.pop("surrogate")]
        recipe = recipe.replace(
            surrogate=surrogate, clip=recipe.clip if surrogate is recipe.surrogate else {}
        )
    if "advantage" in choices:
        choices["advantage"] = ADVANTAGES[choices["advantage"]]
    if "kl_estimator" in choices:
        kl_name = choices.pop("kl_estimator")
        choices["kl_ratio_corrected"] = kl_name.startswith("ratio_")
        choices["kl_estimator"] = {**KL_ESTIMATORS, "exact": kl_exact}[kl_name.removeprefix("ratio_")]
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"name", "paper", "clip"}
    recipe = recipe.replace(
        clip=_clip(recipe, {key: value for key, value in choices.items() if key not in fields}),
        **{key: value for key, value in choices.items() if key in fields},
    )
    if not recipe.kl_coef >= 0:
        raise ValueError(
            f"kl_coef: {recipe.kl_coef}; 0 or more (a negative one would push away from the reference)"
        )
    if recipe.kl_placement == "reward" and (recipe.kl_estimator is not kl_k1 or recipe.kl_ratio_corrected):
        raise ValueError("kl_placement: 'reward' adds up k1, so kl_estimator must be 'k1' with it")
    return recipe


def _clip(recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the keywords of the surrogate. Given ones replace the recipe's own."""
    for key in given:
        if key not in clip_keywords(recipe.surrogate):
            raise ValueError(
                f"{key} means nothing to {recipe.surrogate.__name__}, the surrogate of {recipe.name!r}"
            )
    symmetric = {"clip_range", "log_clip_range"} & set(given)
    return {**({} if symmetric else recipe.clip), **given}


__all__ = ["RECIPES", "Recipe", "make_recipe", *RECIPES]
