"""Optimizers: the schedule by value, what is decayed, what is clipped."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.training.optimizers import make_optimizer, make_schedule

PARAMS = {
    "matrix": jnp.array([[1.0, -2.0], [3.0, 0.5]]),
    "bias": jnp.array([2.0, -1.0]),
    "gain": jnp.array(4.0),
}
GRADS = {
    "matrix": jnp.array([[3.0, 0.0], [-4.0, 1.0]]),
    "bias": jnp.array([0.5, -2.0]),
    "gain": jnp.array(1.0),
}


def values(schedule, steps) -> list[float]:
    return [float(schedule(step)) for step in steps]


# Schedules


def test_constant_schedule_never_changes():
    schedule = make_schedule(0.3, lr_schedule="constant")
    np.testing.assert_allclose(values(schedule, [0, 1, 1000]), 0.3, rtol=1e-6)


def test_linear_schedule_falls_to_zero_at_the_end_of_the_run():
    schedule = make_schedule(0.4, lr_schedule="linear", num_steps=4)
    np.testing.assert_allclose(values(schedule, range(6)), [0.4, 0.3, 0.2, 0.1, 0, 0], atol=1e-7)


def test_cosine_schedule_by_its_formula():
    schedule = make_schedule(0.4, lr_schedule="cosine", num_steps=10)
    expected = [0.4 * (1 + np.cos(np.pi * step / 10)) / 2 for step in range(11)]
    np.testing.assert_allclose(values(schedule, range(11)), expected, atol=1e-7)
    assert float(schedule(100)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("lr_schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [1, 2, 5])
def test_warmup_is_linear_and_the_rest_of_the_run_follows_it(lr_schedule, warmup_steps):
    peak, num_steps = 0.5, 20
    schedule = make_schedule(peak, lr_schedule=lr_schedule, warmup_steps=warmup_steps, num_steps=num_steps)
    expected = [peak * (step + 1) / warmup_steps for step in range(warmup_steps)]
    np.testing.assert_allclose(values(schedule, range(warmup_steps)), expected, rtol=1e-6)
    rest = num_steps - warmup_steps
    after = make_schedule(peak, lr_schedule=lr_schedule, num_steps=rest)
    np.testing.assert_allclose(
        values(schedule, range(warmup_steps, num_steps + 1)), values(after, range(rest + 1)), atol=1e-7
    )
    assert min(values(schedule, range(num_steps))) > 0  # no update of a run is wasted


def test_schedules_may_be_traced():
    schedule = make_schedule(0.5, lr_schedule="cosine", warmup_steps=3, num_steps=9)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(schedule))(jnp.arange(10)), values(schedule, range(10)), atol=1e-7
    )


def test_unusable_schedules_raise():
    with pytest.raises(ValueError, match="'cosin'; choose 'constant', 'linear' or 'cosine'"):
        make_schedule(0.1, lr_schedule="cosin", num_steps=5)
    for lr_schedule in ("linear", "cosine"):
        with pytest.raises(ValueError, match="warmup_steps 5 must be below the 5 steps"):
            make_schedule(0.1, lr_schedule=lr_schedule, warmup_steps=5, num_steps=5)
        with pytest.raises(ValueError, match="0 steps of the run"):
            make_schedule(0.1, lr_schedule=lr_schedule)


# AdamW


def adamw_loop(params, grads_of_steps, *, rate, decay, b1, b2, max_norm):
    """AdamW behind global-norm clipping, in float64, with decay on matrices only."""
    params = {name: np.asarray(x, np.float64) for name, x in params.items()}
    first, second = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
    for count, grads in enumerate(grads_of_steps, start=1):
        grads = {name: np.asarray(x, np.float64) for name, x in grads.items()}
        norm = np.sqrt(sum(np.sum(x**2) for x in grads.values()))
        factor = max_norm / norm if max_norm and norm > max_norm else 1.0
        for name, x in params.items():
            g = factor * grads[name]
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            update = (first[name] / (1 - b1**count)) / (np.sqrt(second[name] / (1 - b2**count)) + 1e-8)
            params[name] = x - rate(count - 1) * (update + (decay * x if x.ndim >= 2 else 0))
    return params


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_a_numpy_loop(max_grad_norm, weight_decay):
    # Gradients of very different size: only with those does clipping change Adam's direction.
    grads_of_steps = [jax.tree.map(lambda x, size=size: size * x, GRADS) for size in (1.0, 0.01, -3.0)]
    schedule = make_schedule(0.1, lr_schedule="linear", num_steps=5)
    optimizer = make_optimizer(
        schedule, weight_decay=weight_decay, adam_b1=0.8, adam_b2=0.95, max_grad_norm=max_grad_norm
    )
    params, state = PARAMS, optimizer.init(PARAMS)
    for grads in grads_of_steps:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    expected = adamw_loop(
        PARAMS,
        grads_of_steps,
        rate=lambda step: 0.1 * (1 - step / 5),
        decay=weight_decay,
        b1=0.8,
        b2=0.95,
        max_norm=max_grad_norm,
    )
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


def test_clipping_changes_the_result():
    # Guards the test above against gradients that clipping would not touch.
    grads_of_steps = [GRADS, jax.tree.map(lambda x: 0.01 * x, GRADS)]
    loop = {"rate": lambda step: 0.1, "decay": 0.0, "b1": 0.9, "b2": 0.99}
    clipped, free = (adamw_loop(PARAMS, grads_of_steps, **loop, max_norm=norm) for norm in (1.0, 0.0))
    assert np.max(np.abs(clipped["matrix"] - free["matrix"])) > 1e-3


def test_weight_decay_acts_on_matrices_only():
    optimizer = make_optimizer(0.1, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["matrix"], -0.05 * PARAMS["matrix"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_array_equal(updates["gain"], 0)


def test_a_zero_gradient_without_decay_moves_nothing():
    optimizer = make_optimizer(0.1, weight_decay=0.0, max_grad_norm=1.0)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(optax.apply_updates(PARAMS, updates), PARAMS)
