"""The records of the recipes and make_recipe; what the recipes compute is in test_every_recipe."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from grpo_jax.objective import recipes
from grpo_jax.objective.advantages import ADVANTAGES, AGGREGATIONS, MISSING, group_advantages
from grpo_jax.objective.kl import KL_ESTIMATORS, kl_exact, kl_k1, kl_k3
from grpo_jax.objective.losses import REDUCTIONS, grpo_loss, loss_weights
from grpo_jax.objective.recipes import (
    CLIP_KEYWORDS,
    KL_NAMES,
    RECIPES,
    Recipe,
    bnpo,
    dapo,
    dr_grpo,
    gmpo,
    grpo,
    make_recipe,
    rloo,
)
from grpo_jax.objective.surrogates import SURROGATES, clip_keywords, clipped_surrogate

N, G, T = 2, 4, 5
B = N * G
every_recipe = pytest.mark.parametrize("name", RECIPES)


def make_batch():
    rng = np.random.default_rng(0)
    log_probs = -rng.exponential(1.0, (B, T))
    return {
        "rewards": rng.standard_normal((N, G)),
        "log_probs": log_probs,
        "old": log_probs + 0.4 * rng.standard_normal((B, T)),
        "ref": log_probs + 0.4 * rng.standard_normal((B, T)),
        "mask": np.arange(T) < rng.integers(1, T + 1, B)[:, None],
    }


def objective(recipe, batch):
    """From rewards to the gradient, as a training step does it."""
    advantages = recipe.advantage(batch["rewards"]).reshape(-1)
    weights = recipe.weights(batch["mask"], max_length=9)
    return jax.value_and_grad(
        lambda x: recipe.loss(x, batch["old"], advantages, batch["mask"], weights, batch["ref"]), has_aux=True
    )(jnp.asarray(batch["log_probs"]))


# ------------------------------------------------------------------------------------- the records
@every_recipe
def test_numbers_of_the_papers(name):
    paper, recipe = oracle.PAPERS[name], RECIPES[name]
    assert recipe.name == name and paper.source in recipe.paper
    assert recipe.advantage is ADVANTAGES[paper.scale]
    assert (recipe.ratio_level, recipe.reduction) == (paper.level, paper.reduction)
    assert recipe.surrogate is SURROGATES[paper.surrogate] and recipe.clip == paper.clip
    estimator, kl_coef, placement = paper.kl
    assert recipe.kl_estimator is KL_ESTIMATORS[estimator] and not recipe.kl_ratio_corrected
    assert (recipe.kl_coef, recipe.kl_placement) == (kl_coef, placement)


def test_only_dapo_has_anything_around_its_loss():
    axes = {"name", "paper", "advantage", "ratio_level", "surrogate", "clip", "kl_estimator", "kl_placement"}
    axes |= {"kl_coef", "reduction"}
    around = [field for field in dataclasses.fields(Recipe) if field.name not in axes]
    assert len(around) == 12
    for name, recipe in RECIPES.items():
        changed = {f.name: getattr(recipe, f.name) for f in around if getattr(recipe, f.name) != f.default}
        assert changed == ({"overlong_share": 0.2, "dynamic_sampling": True} if name == "dapo" else {})


def test_overlong_tokens():
    assert dapo.overlong_tokens(20_480) == 4096  # section 4.1 of the paper
    assert [dapo.overlong_tokens(limit) for limit in (1, 2, 5, 64)] == [1, 1, 1, 13]
    assert grpo.overlong_tokens(64) == 0
    assert make_recipe("grpo", overlong_buffer=16).overlong_tokens(64) == 16
    assert make_recipe("dapo", overlong_buffer=0).overlong_tokens(64) == 0


def test_names_are_the_records():
    assert {recipe.name: recipe for recipe in RECIPES.values()} == RECIPES
    assert (RECIPES["grpo"], RECIPES["dr_grpo"], RECIPES["dapo"]) == (grpo, dr_grpo, dapo)
    assert (RECIPES["bnpo"], RECIPES["gmpo"], RECIPES["rloo"]) == (bnpo, gmpo, rloo)
    assert all(getattr(recipes, name) is recipe for name, recipe in RECIPES.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        grpo.kl_coef = 1.0


def test_numbers_are_leaves_and_choices_are_not():
    recipe = make_recipe("dapo", kl_coef=0.5, entropy_coef=0.1, max_staleness=0.2)
    assert sorted(jax.tree.leaves(recipe)) == [0.1, 0.2, 0.2, 0.28, 0.5]
    doubled = jax.tree.map(lambda x: 2 * x, recipe)
    assert doubled.clip == {"clip_range": 0.4, "clip_range_high": 0.56} and doubled.kl_coef == 1.0
    assert doubled.replace(clip=recipe.clip, kl_coef=0.5, entropy_coef=0.1, max_staleness=0.2) == recipe


def test_numbers_of_a_recipe_do_not_compile_again():
    function = jax.jit(chex.assert_max_traces(objective, n=1))
    batch = make_batch()
    values = [
        float(function(make_recipe("dapo", clip_range_high=high, kl_coef=kl_coef), batch)[0][0])
        for high in (0.2, 0.5)
        for kl_coef in (0.0, 0.5)
    ]
    assert len(set(values)) == 4


def test_what_needs_other_weights_for_its_penalties():
    assert not any(recipe.separate_penalty for recipe in RECIPES.values())
    for choice in ({"top_entropy": 0.2}, {"importance_cap": 2.0}, {"kl_on_dead_groups": False}):
        assert make_recipe("grpo", **choice).separate_penalty


# ------------------------------------------------------------------------------------- make_recipe
@every_recipe
def test_without_changes_it_is_the_recipe(name):
    assert make_recipe(name) == RECIPES[name]
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"name"}
    assert make_recipe(name, **dict.fromkeys(fields | CLIP_KEYWORDS)) == RECIPES[name]


@every_recipe
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("kl_coef", 0.7),
        ("kl_coef", 0.0),
        ("ratio_level", "sequence"),
        ("ratio_level", "sequence_token"),
        *(("reduction", reduction) for reduction in REDUCTIONS),
        *(("aggregation", aggregation) for aggregation in AGGREGATIONS),
        *(("missing", policy) for policy in MISSING),
        ("kl_on_dead_groups", False),
        ("entropy_coef", 0.01),
        ("top_entropy", 0.2),
        ("max_staleness", 0.5),
        ("importance_cap", 2.0),
        ("mask_truncated", True),
        ("overlong_buffer", 7),
        ("dynamic_sampling", True),
    ],
)
def test_one_choice_is_replaced_and_no_other(name, keyword, value):
    recipe = make_recipe(name, **{keyword: value})
    assert getattr(recipe, keyword) == value
    assert recipe.replace(**{keyword: getattr(RECIPES[name], keyword)}) == RECIPES[name]


@every_recipe
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_advantage_by_name(name, advantage):
    recipe = make_recipe(name, advantage=advantage)
    assert recipe.advantage is ADVANTAGES[advantage]
    assert recipe.replace(advantage=RECIPES[name].advantage) == RECIPES[name]


@pytest.mark.parametrize("estimator", KL_NAMES)
def test_kl_estimator_by_name(estimator):
    recipe = make_recipe("grpo", kl_estimator=estimator)
    functions = {**KL_ESTIMATORS, "exact": kl_exact}
    assert recipe.kl_estimator is functions[estimator.removeprefix("ratio_")]
    assert recipe.kl_ratio_corrected == estimator.startswith("ratio_")
    assert recipe.exact_kl == (estimator == "exact")
    assert recipe.replace(kl_estimator=kl_k3, kl_ratio_corrected=False) == grpo


@every_recipe
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogate_by_name(name, surrogate):
    """The recipe's own keeps its numbers; any other has its own defaults, or those given."""
    recipe, own = make_recipe(name, surrogate=surrogate), oracle.PAPERS[name].surrogate == surrogate
    assert recipe.surrogate is SURROGATES[surrogate]
    assert recipe.clip == (RECIPES[name].clip if own else {})
    assert recipe.replace(surrogate=RECIPES[name].surrogate, clip=RECIPES[name].clip) == RECIPES[name]
    for keyword in clip_keywords(SURROGATES[surrogate]):
        assert make_recipe(name, surrogate=surrogate, **{keyword: 2.5}).clip[keyword] == 2.5


def test_kl_placement():
    recipe = make_recipe("grpo", kl_placement="reward", kl_estimator="k1")
    assert recipe.replace(kl_placement="loss", kl_estimator=kl_k3) == grpo
    assert make_recipe("rloo", kl_placement="loss", kl_estimator="ratio_k3").kl_placement == "loss"


def test_clip_keywords():
    assert clip_keywords(clipped_surrogate) == ("clip_range", "clip_range_high", "delta", "dual_clip")
    assert clip_keywords(SURROGATES["cispo"]) == ("cap",)
    assert clip_keywords(SURROGATES["sapo"]) == ("tau", "tau_negative")
    assert clip_keywords(SURROGATES["gmpo"]) == ("log_clip_range", "log_clip_range_high")  # and no mask
    assert clip_keywords(SURROGATES["reinforce"]) == ()
    assert {key for surrogate in SURROGATES.values() for key in clip_keywords(surrogate)} == CLIP_KEYWORDS


def test_clip_keywords_are_replaced():
    assert make_recipe("grpo", clip_range=0.1).clip == {"clip_range": 0.1}
    assert make_recipe("grpo", clip_range_high=0.3).clip == {"clip_range": 0.2, "clip_range_high": 0.3}
    # Alone, clip_range means both sides, whatever the recipe's upper bound was.
    assert make_recipe("dapo", clip_range=0.1).clip == {"clip_range": 0.1}
    assert make_recipe("dapo", clip_range_high=0.3).clip == {"clip_range": 0.2, "clip_range_high": 0.3}
    assert make_recipe("cispo", cap=3.0).clip == {"cap": 3.0}
    assert make_recipe("sapo", tau=2.0).clip == {"tau": 2.0, "tau_negative": 1.05}
    assert make_recipe("sapo", tau_negative=2.0).clip == {"tau": 1.0, "tau_negative": 2.0}
    assert make_recipe("gmpo", log_clip_range=0.3).clip == {"log_clip_range": 0.3}
    assert make_recipe("gmpo", log_clip_range_high=0.5).clip == {
        "log_clip_range": 0.4,
        "log_clip_range_high": 0.5,
    }
    for name in ("gspo", "gspo_token"):
        assert make_recipe(name, clip_range=1e-3).clip == {"clip_range": 1e-3}
        assert make_recipe(name, clip_range_high=1e-3).clip == {"clip_range": 3e-4, "clip_range_high": 1e-3}
    both = {"clip_range": 0.1, "clip_range_high": 0.3}
    assert make_recipe("dapo", **both).clip == both
    assert make_recipe("grpo", delta=4.0, dual_clip=3.0).clip == {
        "clip_range": 0.2,
        "delta": 4.0,
        "dual_clip": 3.0,
    }
    assert grpo.clip == {"clip_range": 0.2} and dapo.clip == {"clip_range": 0.2, "clip_range_high": 0.28}


# ------------------------------------------------------------------------- what reaches the functions
def test_changes_reach_the_loss():
    batch = make_batch()
    recipe = make_recipe(
        "grpo",
        kl_coef=0.3,
        kl_estimator="k1",
        ratio_level="sequence",
        reduction="constant",
        advantage="none",
        clip_range=0.05,
    )
    (loss, _), _ = objective(recipe, batch)
    expected, _ = grpo_loss(
        jnp.asarray(batch["log_probs"]),
        batch["old"],
        group_advantages(batch["rewards"], scale="none").reshape(-1),
        batch["mask"],
        loss_weights(batch["mask"], reduction="constant", max_length=9),
        ref_log_probs=batch["ref"],
        ratio_level="sequence",
        surrogate=lambda *args: clipped_surrogate(*args, clip_range=0.05),
        kl_estimator=kl_k1,
        kl_coef=0.3,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_weights_reach_the_reduction():
    mask = make_batch()["mask"]
    for recipe in RECIPES.values():
        for sizes in ({}, {"num_sequences": 5}, {"num_microbatches": 4}):
            np.testing.assert_allclose(
                recipe.weights(mask, max_length=9, **sizes),
                oracle.weights(mask, reduction=recipe.reduction, max_length=9, **sizes),
                rtol=1e-6,
            )


def test_kl_in_the_reward_is_measured_but_not_in_the_loss():
    batch = make_batch()
    (loss, metrics), gradient = objective(rloo, batch)
    (without, none), gradient_without = objective(rloo, {**batch, "ref": None})
    assert loss == without and (np.asarray(gradient) == np.asarray(gradient_without)).all()
    difference = (batch["log_probs"] - batch["ref"])[batch["mask"]]
    np.testing.assert_allclose(metrics.kl, difference.mean(), rtol=1e-5)
    assert none.kl == 0


def test_an_exact_kl_needs_its_values():
    recipe, batch = make_recipe("grpo", kl_estimator="exact"), make_batch()
    with pytest.raises(ValueError, match=r"exact KL needs kls \[B,T\]"):
        objective(recipe, batch)
    # Without any reference there is no KL, as for every other kind.
    (loss, metrics), _ = objective(recipe, {**batch, "ref": None})
    assert loss == objective(grpo, {**batch, "ref": None})[0][0] and metrics.kl == 0


def test_entropies_count_only_with_a_coefficient():
    batch = make_batch()
    data = (batch["log_probs"], batch["old"], np.ones(B), batch["mask"], loss_weights(batch["mask"]))
    entropies = np.full((B, T), 2.0)
    plain, _ = grpo.loss(*data)
    assert grpo.loss(*data, entropies=entropies)[0] == plain
    with_bonus, _ = make_recipe("grpo", entropy_coef=0.1).loss(*data, entropies=entropies)
    np.testing.assert_allclose(with_bonus, plain - 0.1 * 2.0, rtol=1e-6)


@every_recipe
def test_missing_rewards(name):
    rewards = np.array([[1.0, 0.0, np.nan], [0.0, np.nan, 0.5]])
    np.testing.assert_allclose(
        RECIPES[name].advantage(rewards, valid=~np.isnan(rewards)),
        oracle.advantages(np.nan_to_num(rewards), ~np.isnan(rewards), scale=oracle.PAPERS[name].scale),
        rtol=1e-5,
    )


# ------------------------------------------------------------------------------------------- errors
def test_clip_keywords_of_another_surrogate_are_errors():
    for name, keyword in [
        ("grpo", "tau"),
        ("grpo", "log_clip_range"),
        ("gspo", "tau"),
        ("gspo_token", "cap"),
        ("cispo", "clip_range"),
        ("cispo", "clip_range_high"),
        ("cispo", "delta"),
        ("sapo", "clip_range"),
        ("sapo", "cap"),
        ("gmpo", "clip_range"),
        ("gmpo", "mask"),  # an array of the surrogate, not a setting
        ("grpo", "advantages"),
        ("rloo", "clip_range"),
        ("reinforce", "clip_range"),
        ("reinforce", "tau"),
        ("grpo", "clip_ratio"),  # nobody's
        ("grpo", "clip"),  # fields of the record that have other ways in
        ("grpo", "paper"),
    ]:
        surrogate = RECIPES[name].surrogate.__name__
        with pytest.raises(
            ValueError, match=f"{keyword} means nothing to {surrogate}, the surrogate of '{name}'"
        ):
            make_recipe(name, **{keyword: 1.0})
    with pytest.raises(ValueError, match="clip_range means nothing to cispo_surrogate"):
        make_recipe("grpo", surrogate="cispo", clip_range=0.1)


@pytest.mark.parametrize(
    ("keyword", "known"),
    [
        ("advantage", "std, batch, none, leave_one_out"),
        ("ratio_level", "token, sequence, sequence_token"),
        ("surrogate", ", ".join(SURROGATES)),
        ("kl_estimator", "k1, k2, k3, ratio_k1, ratio_k3, exact"),
        ("kl_placement", "loss, reward"),
        ("reduction", ", ".join(REDUCTIONS)),
        ("aggregation", "sum_then_normalize, normalize_then_sum, gdpo"),
        ("missing", "drop, skip, renormalize"),
    ],
)
def test_unknown_names_are_errors_at_once(keyword, known):
    with pytest.raises(ValueError, match=f"{keyword}: 'nothing'; choose one of {known}$"):
        make_recipe("grpo", **{keyword: "nothing"})


def test_an_unknown_recipe_is_an_error():
    with pytest.raises(ValueError, match=f"'ppo'; choose one of {', '.join(RECIPES)}$"):
        make_recipe("ppo")


@pytest.mark.parametrize("kl_coef", [-0.01, float("nan")])
def test_a_negative_kl_coef_is_an_error(kl_coef):
    with pytest.raises(ValueError, match=f"kl_coef: {kl_coef}; 0 or more"):
        make_recipe("grpo", kl_coef=kl_coef)


@pytest.mark.parametrize("estimator", sorted({*KL_NAMES} - {"k1"}))
def test_only_k1_can_stand_in_the_reward(estimator):
    with pytest.raises(ValueError, match="kl_placement: 'reward' adds up k1"):
        make_recipe("grpo", kl_placement="reward", kl_estimator=estimator)
    with pytest.raises(ValueError, match="kl_placement: 'reward' adds up k1"):
        make_recipe("rloo", kl_estimator=estimator)


@pytest.mark.parametrize("estimator", ["ratio_k1", "ratio_k3"])
@pytest.mark.parametrize("values", [(-50.0, -100.0, 0.0), (-1e4, -2e4, -1.0)])
def test_two_runaway_ratios_at_once_stay_finite(estimator, values):
    recipe = make_recipe("grpo", kl_estimator=estimator, kl_coef=0.5)
    log_prob, old, ref = (jnp.full((1, 1), value, jnp.float32) for value in values)
    mask = jnp.ones((1, 1), bool)
    loss, gradient = jax.value_and_grad(
        lambda x: recipe.loss(x, old, jnp.ones(1), mask, jnp.ones((1, 1)), ref)[0]
    )(log_prob)
    assert jnp.isfinite(loss) and jnp.isfinite(gradient).all()


def test_the_old_name_of_an_advantage_computes_the_same():
    rewards, valid = np.array([[0.0, 1.0, 2.0]]), np.array([[True, True, False]])
    with pytest.warns(DeprecationWarning, match=r"Recipe.advantages is Recipe.advantage now"):
        found = grpo.advantages(rewards, valid=valid)
    np.testing.assert_array_equal(found, grpo.advantage(rewards, valid=valid))
