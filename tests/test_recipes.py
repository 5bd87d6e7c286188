import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from grpo_jax.advantages import group_advantages
from grpo_jax.kl import KL_ESTIMATORS, kl_k1, kl_k3
from grpo_jax.losses import clipped_surrogate, grpo_loss, loss_weights
from grpo_jax.recipes import KL_NAMES, RECIPES, dapo, dr_grpo, grpo, make_recipe

# One line per recipe, from its paper:
# advantage scale, ratio level, surrogate and its numbers, KL coefficient (of k3), reduction, paper
GSPO = {"clip_range": 3e-4, "clip_range_high": 4e-4}
DAPO = {"clip_range": 0.2, "clip_range_high": 0.28}
SAPO = {"tau": 1.0, "tau_negative": 1.05}
PAPERS = {
    "grpo": ("std", "token", "clipped", {"clip_range": 0.2}, 0.04, "sequence", "2402.03300"),
    "dr_grpo": ("none", "token", "clipped", {"clip_range": 0.2}, 0.0, "constant", "2503.20783"),
    "dapo": ("std", "token", "clipped", DAPO, 0.0, "token", "2503.14476"),
    "gspo": ("std", "sequence", "clipped", GSPO, 0.0, "sequence", "2507.18071"),
    "gspo_token": ("std", "sequence_token", "clipped", GSPO, 0.0, "sequence", "2507.18071"),
    "cispo": ("std", "token", "cispo", {"cap": 5.0}, 0.0, "token", "2506.13585"),
    "sapo": ("std", "token", "sapo", SAPO, 0.0, "sequence", "2511.20347"),
    "reinforce": ("none", "token", "reinforce", {}, 0.0, "token", "Williams 1992"),
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
    scale, level, surrogate, clip, kl_coef, reduction, paper = PAPERS[name]
    recipe = RECIPES[name]
    assert recipe.name == name and paper in recipe.paper
    assert (recipe.advantage_scale, recipe.ratio_level, recipe.reduction) == (scale, level, reduction)
    assert recipe.surrogate.__name__ == f"{surrogate}_surrogate" and recipe.clip == clip
    assert recipe.kl_estimator is kl_k3 and recipe.kl_coef == kl_coef and not recipe.kl_ratio_corrected


def test_every_recipe_is_in_the_table():
    assert set(RECIPES) == set(PAPERS), "give the new recipe a row above"
    assert (RECIPES["grpo"], RECIPES["dr_grpo"], RECIPES["dapo"]) == (grpo, dr_grpo, dapo)


def check_against_the_loop(recipe, name, *, jit=False, estimator="k3", kl_coef=None):
    scale, level, surrogate, clip, recipe_kl_coef, reduction, _ = PAPERS[name]
    batch = make_batch()
    with jax.enable_x64(True):
        (loss, metrics), gradient = (jax.jit(objective) if jit else objective)(recipe, batch)
        expected_loss, expected_gradient, expected_metrics = oracle.loss(
            batch["log_probs"],
            batch["old"],
            oracle.advantages(batch["rewards"], scale=scale).reshape(-1),
            batch["mask"],
            oracle.weights(batch["mask"], reduction=reduction, max_length=9),
            ref=batch["ref"],
            level=level,
            name=surrogate,
            estimator=estimator,
            kl_coef=recipe_kl_coef if kl_coef is None else kl_coef,
            **clip,
        )
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
        for key, value in expected_metrics.items():
            np.testing.assert_allclose(getattr(metrics, key), value, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_objective_matches_the_loop(name, jit):
    check_against_the_loop(RECIPES[name], name, jit=jit)


@pytest.mark.parametrize("name", ["grpo", "gspo", "gspo_token", "cispo"])
@pytest.mark.parametrize("estimator", ["ratio_k1", "ratio_k3"])
def test_ratio_corrected_kl_matches_the_loop(name, estimator):
    recipe = make_recipe(name, kl_estimator=estimator, kl_coef=0.3)
    check_against_the_loop(recipe, name, estimator=estimator, kl_coef=0.3)


@pytest.mark.parametrize("name", PAPERS)
def test_at_ratio_one_the_gradient_is_reinforce(name):
    recipe, batch = RECIPES[name].replace(kl_coef=0.0), make_batch()
    batch["old"] = batch["log_probs"]
    with jax.enable_x64(True):
        _, gradient = objective(recipe, batch)
        advantages = recipe.advantages(batch["rewards"]).reshape(-1)
        weights = recipe.weights(batch["mask"], max_length=9)
        # At every level: with one weight per row, the row's mean spreads what its tokens give.
        np.testing.assert_allclose(gradient, -weights * advantages[:, None], rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("estimator", KL_NAMES)
def test_kl_estimator_by_name(estimator):
    recipe = make_recipe("grpo", kl_estimator=estimator)
    assert recipe.kl_estimator is KL_ESTIMATORS[estimator.removeprefix("ratio_")]
    assert recipe.kl_ratio_corrected == estimator.startswith("ratio_")
    assert recipe.replace(kl_estimator=kl_k3, kl_ratio_corrected=False) == grpo


def test_clip_keywords():
    assert make_recipe("grpo", clip_range=0.1).clip == {"clip_range": 0.1}
    assert make_recipe("grpo", clip_range_high=0.3).clip == {"clip_range": 0.2, "clip_range_high": 0.3}
    # Alone, clip_range means both sides, whatever the recipe's upper bound was.
    assert make_recipe("dapo", clip_range=0.1).clip == {"clip_range": 0.1}
    assert make_recipe("dapo", clip_range_high=0.3).clip == {"clip_range": 0.2, "clip_range_high": 0.3}
    assert make_recipe("cispo", cap=3.0).clip == {"cap": 3.0}
    assert make_recipe("sapo", tau=2.0).clip == {"tau": 2.0, "tau_negative": 1.05}
    assert make_recipe("sapo", tau_negative=2.0).clip == {"tau": 1.0, "tau_negative": 2.0}
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
    with pytest.raises(
        ValueError, match="clip_range means nothing to cispo_surrogate, the surrogate of 'cispo'"
    ):
        make_recipe("cispo", clip_range=0.2)
    for name, keyword in [
        ("gspo", "tau"),
        ("gspo_token", "cap"),
        ("cispo", "clip_range_high"),
        ("cispo", "delta"),
        ("sapo", "clip_range"),
        ("sapo", "cap"),
        ("reinforce", "clip_range"),
        ("reinforce", "tau"),
    ]:
        with pytest.raises(ValueError, match=f"{keyword} means nothing to .*, the surrogate of '{name}'"):
            make_recipe(name, **{keyword: 1.0})
    with pytest.raises(ValueError, match="tau means nothing to clipped_surrogate"):
        make_recipe("grpo", tau=1.0)
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
