"""Random batches on which a recipe is compared with its paper's loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from grpo_jax.objective.recipes import RECIPES, make_recipe

MAX_LENGTH = 9
# N, G, T: every recipe has one shape, so that it compiles once per kind of KL; the mask sets the lengths.
SHAPES = dict(zip(RECIPES, itertools.cycle([(2, 3, 5), (4, 2, 4)]), strict=False))


def with_kl_in_the_loss(name, estimator="ratio_k3", kl_coef=0.3, **choices):
    return make_recipe(name, kl_estimator=estimator, kl_coef=kl_coef, kl_placement="loss", **choices)


def random_batch(name, seed):
    """One batch with everything in it that can go wrong, in float64.

    Log-probs are multiples of 2^-14: then differences and sums are exact in float32 as well, and no ratio is
    so close to a clip that rounding would decide (log(1.2) and its kind are no such multiples).
    """
    rng = np.random.default_rng(seed)
    num_prompts, group_size, length = SHAPES[name]
    shape = num_prompts * group_size, length

    def grid(x):
        return np.round(x * 2**14) / 2**14

    log_probs = -grid(np.minimum(rng.exponential(1.0, shape), 10))
    # From inside the clip of GSPO to far outside of every one, with ratios of exactly 1 among them.
    spread = rng.choice([2e-4, 0.05, 0.4, 1.5]) * (rng.random(shape) < 0.9)
    mask = np.arange(length) < rng.integers(0, length + 1, (shape[0], 1))
    return {
        "log_probs": log_probs,
        "old": log_probs - grid(np.clip(spread * rng.standard_normal(shape), -2.5, 2.5)),
        "ref": log_probs + grid(np.clip(0.7 * rng.standard_normal(shape), -2.5, 2.5)),
        # Few values, so that some groups are equal.
        "rewards": rng.choice(rng.choice([0.0, 1.0, 0.35, -0.5, 2.0], 3), (num_prompts, group_size)),
        "valid": rng.random((num_prompts, group_size)) < rng.choice([0.7, 1.0]),
        "mask": mask & (rng.random(shape) < rng.choice([0.8, 1.0])),  # a mask may have holes
        "factors": rng.choice([0.0, 1.0, 1.0, 1.5], shape),
        "entropies": rng.uniform(0, 2, shape),
        "kls": rng.uniform(0, 2, shape),
    }


def objective(recipe, batch):
    """From rewards to the gradient, as a training step does it."""
    advantages = recipe.advantage(batch["rewards"], valid=batch["valid"]).reshape(-1)
    weights = recipe.weights(batch["mask"], max_length=MAX_LENGTH, num_microbatches=2)

    def loss(log_probs):
        return recipe.loss(
            log_probs,
            batch["old"],
            advantages,
            batch["mask"],
            weights * batch["factors"],
            batch["ref"],
            penalty_weights=weights,
            kls=batch["kls"] if recipe.exact_kl else None,
            entropies=batch["entropies"],
        )

    return jax.value_and_grad(loss, has_aux=True)(batch["log_probs"])


jitted = jax.jit(objective)


def check_against_the_loop(function, name, seed, choices, x64):
    dtype, tolerance = (np.float64, 1e-12) if x64 else (np.float32, 1e-5)
    batch = random_batch(name, seed)
    batch = {key: x.astype(dtype) if x.dtype == float else x for key, x in batch.items()}
    recipe = with_kl_in_the_loss(name, **choices)
    with jax.enable_x64(x64):
        (loss, metrics), gradient = function(recipe, {key: jnp.asarray(x) for key, x in batch.items()})
        assert loss.dtype == gradient.dtype == dtype
    if not recipe.exact_kl:
        del batch["kls"]
    expected_loss, expected_gradient, expected_metrics = oracle.objective(
        oracle.PAPERS[name], batch, max_length=MAX_LENGTH, num_microbatches=2, **choices
    )
    # The loss is a sum of terms of order 1 that may cancel; a token's gradient is measured by the largest.
    np.testing.assert_allclose(loss, expected_loss, rtol=tolerance, atol=tolerance)
    largest = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=tolerance, atol=tolerance * largest)
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(getattr(metrics, key), value, rtol=tolerance, atol=tolerance, err_msg=key)
