"""The optimizer: an optax chain and its schedule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def make_schedule(
    learning_rate: float, *, lr_schedule: str = "constant", warmup_steps: int = 0, num_steps: int = 0
) -> optax.Schedule:
    """Returns the learning rate as a function of the optimizer step, which starts at 0.

    Args:
        learning_rate: peak value.
        lr_schedule: "constant", "linear" (to 0) or "cosine" (to 0) over the steps after the warmup.
        warmup_steps: number of steps of linear warmup. Step k of it uses (k + 1) / warmup_steps of the peak.
        num_steps: number of steps of the run, which all schedules but "constant" need.

    Raises:
        ValueError: the schedule is unknown, or the warmup does not end before the run does.
    """
    if lr_schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"lr_schedule: {lr_schedule!r}; choose 'constant', 'linear' or 'cosine'")
    if lr_schedule != "constant" and warmup_steps >= num_steps:
        raise ValueError(f"warmup_steps {warmup_steps} must be below the {num_steps} steps of the run")
    rest = max(num_steps - warmup_steps, 1)
    main = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest),
    }[lr_schedule]()
    if not warmup_steps:
        return main
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, main], [warmup_steps])


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm, https://arxiv.org/abs/1211.5063.

    It computes what `optax.clip_by_global_norm` does, with one product per element. A select between
    gradients and quotients would write and read one more array of the size of the parameters.

    Args:
        max_norm: the largest norm, above 0.
    """

    def update(updates, state, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda x: x * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    learning_rate: float | Callable,
    *,
    weight_decay: float = 0.0,
    adam_b1: float = 0.9,
    adam_b2: float = 0.99,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Returns AdamW behind global-norm clipping, https://arxiv.org/abs/1711.05101.

    Args:
        learning_rate: a number or a schedule.
        weight_decay: decoupled decay, on arrays with two or more axes only (no biases, no norms).
        adam_b1: decay of the first moment, in [0, 1).
        adam_b2: decay of the second moment, in [0, 1).
        max_grad_norm: the largest global norm. Longer gradients are scaled down to it. 0 turns this off.
    """
    adamw = optax.adamw(
        learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        weight_decay=weight_decay,
        mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params),
    )
    return optax.chain(clip_by_global_norm(max_grad_norm), adamw) if max_grad_norm else adamw
