"""The state of a training run: parameters, optimizer, counters, and the policy that they belong to."""

from collections.abc import Callable
from typing import Any

import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax.typing import ArrayLike
from jaxtyping import Int

from grpo_jax.policy.from_apply import check_causal
from grpo_jax.policy.lora import Lora, merge_adapters
from grpo_jax.types import Params, Policy

# A policy has only functions. flax stores nothing of it and takes it from the state that it restores into.
flax.serialization.register_serialization_state(Policy, lambda policy: {}, lambda policy, _: policy)


class TrainState(train_state.TrainState):
    """A flax TrainState that knows the policy's functions and counts skipped updates.

    `step` counts calls of `train_step`, skipped ones included. It is the clock of the run, which decides
    noise and data order. The state holds no key. With LoRA, params are the adapters alone.
    `init_train_state` makes a state, and `train_step` also takes the plain flax class.
    """

    # flax says an int or a jax Array, and a FrozenDict. A restored state has NumPy arrays, and any pytree.
    step: Int[ArrayLike, ""]  # type: ignore[assignment]
    params: Params
    policy: Policy
    # Numbers of updates, int32: skipped since the start because something was not finite, the same since the
    # last update that was finite, and moved nothing since the start because no gradient was above 0.
    skipped: Int[ArrayLike, ""]
    skipped_in_a_row: Int[ArrayLike, ""]
    idle: Int[ArrayLike, ""]
    # What params are adapters of. None means that they are the policy's parameters.
    lora: Lora | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def create(
        cls, *, apply_fn: Callable, params: Params, tx: optax.GradientTransformation, **kwargs: Any
    ) -> "TrainState":
        """Makes the state as flax's own class does. `init_train_state` and `train_step` explain arguments."""
        if kwargs:
            raise ValueError(f"TrainState.create: unknown {', '.join(kwargs)}; see init_train_state")
        return init_train_state(_policy_of(apply_fn, params), params, tx)


def init_train_state(
    policy: Policy, params: Params, optimizer: optax.GradientTransformation, *, lora: Lora | None = None
) -> TrainState:
    """Makes the state of a fresh run. `params` are copied, since `train_step` donates its state.

    Args:
        policy: the model's functions.
        params: float32 parameters, since lower precision would swallow small updates. With LoRA these are the
            adapters.
        optimizer: an optax transformation, see `make_optimizer`.
        lora: what params are adapters of. None means that they are the policy's parameters.

    Raises:
        ValueError: a parameter is not float32.
    """
    params = _copy_of_float32(params)
    if lora is None:
        check_causal(policy, params)
    return _new_state(policy, params, optimizer, optimizer.init(params), jnp.zeros((), jnp.int32), lora)


def _copy_of_float32(params: Params) -> Params:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"parameter {name} is {leaf.dtype}; training needs float32 parameters "
                "(cast them; compute in bfloat16 is a setting of the policy)"
            )
    return _copy(params)


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def _new_state(
    policy: Policy,
    params: Params,
    optimizer: optax.GradientTransformation,
    opt_state: Any,
    step: Int[ArrayLike, ""],
    lora: Lora | None = None,
) -> TrainState:
    # Each counter has a buffer of its own, because one buffer cannot be donated twice.
    return TrainState(
        step=step,
        apply_fn=policy.forward,
        params=params,
        tx=optimizer,
        opt_state=opt_state,
        policy=policy,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        idle=jnp.zeros((), jnp.int32),
        lora=lora,
    )


def policy_params(state: TrainState, frozen: Params | None = None) -> Params:
    """Returns what the policy's functions take as params: the state's, or its adapters merged into the base.

    Args:
        state: state of a run.
        frozen: parameters of the base. They are given with LoRA, and only then.

    Raises:
        ValueError: the state has adapters and there is no base, or the other way round.
    """
    check_frozen(state, frozen)
    return state.params if state.lora is None else merge_adapters(state.lora, frozen, state.params)


def check_frozen(state: TrainState, frozen: Params | None) -> None:
    """Raises ValueError unless there is a base where there is LoRA, and nowhere else."""
    if (state.lora is None) != (frozen is None):
        raise ValueError("frozen parameters are those of the base under LoRA: needed there, and only there")


def own_state(state: train_state.TrainState) -> TrainState:
    """Makes our state of a plain one, with counters at 0. Its arrays are copies, since they are donated."""
    if not isinstance(state, train_state.TrainState):
        raise ValueError(
            f"state: {type(state).__name__} is no TrainState; make one with "
            "grpo_jax.init_train_state(policy, params, optimizer)"
        )
    policy = _policy_of(state.apply_fn, state.params)
    step = jnp.array(state.step, jnp.int32, copy=True)
    return _new_state(policy, _copy_of_float32(state.params), state.tx, _copy(state.opt_state), step)


def _policy_of(apply_fn: Any, params: Params) -> Policy:
    from grpo_jax.models.flax_objects import check_params, policy_of  # it loads flax.nnx

    policy = policy_of(apply_fn)
    check_params(apply_fn, params)
    check_causal(policy, params)
    return policy
