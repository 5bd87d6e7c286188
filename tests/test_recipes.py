import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from grpo_jax.advantages import group_advantages
from grpo_jax.kl import KL_ESTIMATORS, kl_k1, kl_k3
from grpo_jax.losses import clipped_surrogate, grpo_loss, loss_weights
from grpo_jax.recipes import RECIPES, dapo, dr_grpo, grpo, make_recipe

# One line per recipe, from its paper:
# advantage scale, ratio level, clip below and above 1, KL estimator and coefficient, reduction, paper
PAPERS = {
    "grpo": ("std", "token", 0.2, 0.2, kl_k3, 0.04, "sequence", "2402.03300"),
    "dr_grpo": ("none", "token", 0.2, 0.2, kl_k3, 0.0, "constant", "2503.20783"),
    "dapo": ("std", "token", 0.2, 0.28, kl_k3, 0.0, "token", "2503.14476"),
}
N, G, T = 2, 4, 5
B = N * G


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
    advantages = recipe.advantages(batch["rewards"]).reshape(-1)
    weights = recipe.weights(batch["mask"], max_length=9)
    return jax.value_and_grad(
        lambda x: recipe.loss(x, batch["old"], advantages, batch["mask"], weights, batch["ref"]), has_aux=True
    )(jnp.asarray(batch["log_probs"]))


@pytest.mark.parametrize("name", PAPERS)
def test_numbers_of_the_papers(name):
    scale, level, low, high, estimator, kl_coef, reduction, paper = PAPERS[name]
    recipe = RECIPES[name]
    assert recipe.name == name and paper in recipe.paper
    assert (recipe.advantage_scale, recipe.ratio_level, recipe.reduction) == (scale, level, reduction)
    assert recipe.surrogate is clipped_surrogate
    assert recipe.clip["clip_range"] == low and recipe.clip.get("clip_range_high", low) == high
    assert recipe.kl_estimator is estimator and recipe.kl_coef == kl_coef


def test_every_recipe_is_in_the_table():
    assert set(RECIPES) == set(PAPERS), "give the new recipe a row above"
    assert (RECIPES["grpo"], RECIPES["dr_grpo"], RECIPES["dapo"]) == (grpo, dr_grpo, dapo)


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_objective_matches_the_loop(name, jit):
    scale, level, low, high, _, kl_coef, reduction, _ = PAPERS[name]
    batch = make_batch()
    with jax.enable_x64(True):
        (loss, metrics), gradient = (jax.jit(objective) if jit else objective)(RECIPES[name], batch)
        expected_loss, expected_gradient, expected_metrics = oracle.loss(
            batch["log_probs"],
            batch["old"],
            oracle.advantages(batch["rewards"], scale=scale).reshape(-1),
            batch["mask"],
            oracle.weights(batch["mask"], reduction=reduction, max_length=9),
            ref=batch["ref"],
            level=level,
            estimator="k3",
            kl_coef=kl_coef,
            clip_range=low,
            clip_range_high=high,
        )
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
        for key, value in expected_metrics.items():
            np.testing.assert_allclose(getattr(metrics, key), value, rtol=1e-12, err_msg=key)


def test_numbers_of_a_recipe_do_not_compile_again():
    function = jax.jit(chex.assert_max_traces(objective, n=1))
    batch = make_batch()
    values = [
        float(function(make_recipe("dapo", clip_range_high=high, kl_coef=kl_coef), batch)[0][0])
        for high in (0.2, 0.5)
        for kl_coef in (0.0, 0.5)
    ]
    assert len(set(values)) == 4


def test_without_changes_it_is_the_recipe():
    for name, recipe in RECIPES.items():
        assert make_recipe(name) == recipe
        nothing = dict.fromkeys(
            (
                "kl_coef",
                "kl_estimator",
                "ratio_level",
                "reduction",
                "advantage_scale",
                "clip_range",
                "clip_range_high",
            )
        )
        assert make_recipe(name, **nothing) == recipe


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("kl_coef", 0.7),
        ("kl_coef", 0.0),
        ("ratio_level", "sequence"),
        ("ratio_level", "sequence_token"),
        ("reduction", "token"),
        ("reduction", "constant"),
        ("advantage_scale", "batch"),
        ("advantage_scale", "none"),
    ],
)
def test_one_choice_is_replaced_and_no_other(name, keyword, value):
    recipe = make_recipe(name, **{keyword: value})
    assert getattr(recipe, keyword) == value
    assert recipe.replace(**{keyword: getattr(RECIPES[name], keyword)}) == RECIPES[name]


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimator_by_name(estimator):
    recipe = make_recipe("grpo", kl_estimator=estimator)
    assert recipe.kl_estimator is KL_ESTIMATORS[estimator]
    assert recipe.replace(kl_estimator=kl_k3) == grpo


def test_clip_keywords():
    assert make_recipe("grpo", clip_range=0.1).clip == {"clip_range": 0.1}
    assert make_recipe("grpo", clip_range_high=0.3).clip == {"clip_range": 0.2, "clip_range_high": 0.3}
    # Alone, clip_range means both sides, whatever the recipe's upper bound was.
    assert make_recipe("dapo", clip_range=0.1).clip == {"clip_range": 0.1}
    assert make_recipe("dapo", clip_range_high=0.3).clip == {"clip_range": 0.2, "clip_range_high": 0.3}
    both = {"clip_range": 0.1, "clip_range_high": 0.3}
    assert make_recipe("dapo", **both).clip == both
    assert make_recipe("grpo", delta=4.0, dual_clip=3.0).clip == {
        "clip_range": 0.2,
        "delta": 4.0,
        "dual_clip": 3.0,
    }
    assert grpo.clip == {"clip_range": 0.2} and dapo.clip == {"clip_range": 0.2, "clip_range_high": 0.28}


def test_changes_reach_the_loss():
    batch = make_batch()
    recipe = make_recipe(
        "grpo",
        kl_coef=0.3,
        kl_estimator="k1",
        ratio_level="sequence",
        reduction="constant",
        advantage_scale="none",
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


def test_missing_rewards():
    rewards, valid = jnp.array([[1.0, 0.0, jnp.nan]]), jnp.array([[True, True, False]])
    for recipe in RECIPES.values():
        chex.assert_trees_all_equal(
            recipe.advantages(rewards, valid=valid),
            group_advantages(rewards, valid=valid, scale=recipe.advantage_scale),
        )


def test_errors():
    with pytest.raises(ValueError, match="'ppo'; choose one of grpo, dr_grpo, dapo"):
        make_recipe("ppo")
    with pytest.raises(ValueError, match="'k4'; choose one of k1, k2, k3"):
        make_recipe("grpo", kl_estimator="k4")
    with pytest.raises(
        ValueError, match="clip_ratio means nothing to clipped_surrogate, the surrogate of 'grpo'"
    ):
        make_recipe("grpo", clip_ratio=0.1)
    with pytest.raises(
        ValueError, match="advantages means nothing"
    ):  # an array of the surrogate, not a setting
        make_recipe("grpo", advantages=0.1)


@pytest.mark.parametrize("keyword", ["ratio_level", "reduction", "advantage_scale"])
def test_unknown_names_are_errors_at_once(keyword):
    with pytest.raises(ValueError, match="'nothing'; choose"):
        make_recipe("grpo", **{keyword: "nothing"})
