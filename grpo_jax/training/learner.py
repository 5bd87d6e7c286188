"""The learner: one jitted optimizer update of a train state, from an Experience."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, PRNGKeyArray, Real

from grpo_jax.objective.losses import LossMetrics
from grpo_jax.objective.recipes import Recipe
from grpo_jax.policy.log_probs import (
    CHUNK_SIZE,
    completion_hidden,
    pack_completions,
    token_log_probs,
    token_log_probs_and_kls,
)
from grpo_jax.policy.lora import Lora, merge_adapters
from grpo_jax.policy.shapes import shared_rows, split_rows
from grpo_jax.training.metrics import (
    logp_difference_max,
    loss_metrics_dict,
    merge_loss_metrics,
    token_mean,
)
from grpo_jax.training.reference import is_reference
from grpo_jax.training.train_state import (
    TrainState,
    check_frozen,
    init_train_state,
    own_state,
    policy_params,
)
from grpo_jax.types import Experience, Params, Policy

# The state was part of this module until version 0.2.
__all__ = ["TrainState", "experience_loss", "init_train_state", "policy_params", "train_step"]

Scalars = dict[str, Real[ArrayLike, ""]]  # by their logged names

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Two programs may compute the same float32 log-prob this many nats apart. A KL of that size is 5e-10 nats.
_ROUNDING = 3e-5


def experience_loss(
    params: Params,
    policy: Policy,
    experience: Experience,
    *,
    recipe: Recipe,
    lora: Lora | None = None,
    frozen: Params | None = None,
    ref_params: Params | None = None,
    at_reference: Bool[ArrayLike, "..."] = False,
    has_signal: Bool[ArrayLike, ""] = True,
    dropout_key: PRNGKeyArray | None = None,
    group_size: int = 1,
    num_tokens: int | None = None,
    temperature: Real[ArrayLike, ""],
    chunk_size: int,
) -> tuple[Float[Array, ""], tuple[LossMetrics, Scalars]]:
    """Computes the recipe's loss of params: (loss [], (LossMetrics, other metrics)).

    Args:
        params: the parameters being trained.
        policy: the model's functions.
        experience: B rows, or a slice of them. Weights are those of the whole batch.
        recipe: the objective.
        lora: what params are adapters of. None means that they are the policy's parameters.
        frozen: parameters of the base, with LoRA.
        ref_params: parameters of the reference, for an exact KL term. None means that the KL term, if there
            is one, is an estimate.
        at_reference: whether the policy equals the reference, see `grpo_loss`.
        has_signal: whether the whole batch has something to learn beside the KL. If not, an estimated KL
            counts only on tokens where it is more than the rounding between two programs.
        dropout_key: key of the dropout, see `merge_adapters`.
        group_size: number of consecutive rows with the same prompt, see `completion_hidden`.
        num_tokens: largest number of tokens, see `completion_hidden`. The loss is NaN if there are more.
        temperature: the sampling temperature.
        chunk_size: number of tokens whose logits exist at once, see `token_log_probs`.
    """
    e = experience
    if lora is not None:
        params = merge_adapters(lora, frozen, params, dropout_key=dropout_key)
    hidden_of = functools.partial(
        completion_hidden, policy, rollout=e, group_size=group_size, num_tokens=num_tokens
    )
    hidden = hidden_of(params)
    kls = None
    packing = pack_completions(e.mask, num_tokens)
    settings = {"temperature": temperature, "chunk_size": chunk_size, "packing": packing}
    if ref_params is None:
        log_probs, entropies = token_log_probs(policy, params, hidden, e.tokens, **settings)
    else:
        log_probs, entropies, kls = token_log_probs_and_kls(
            policy, params, ref_params, hidden, hidden_of(ref_params), e.tokens, **settings
        )
    current = jax.lax.stop_gradient(log_probs)
    at_reference = jnp.broadcast_to(at_reference, e.mask.shape)
    if e.ref_log_probs is not None:
        at_reference |= ~jnp.asarray(has_signal) & (jnp.abs(current - e.ref_log_probs) <= _ROUNDING)
    loss, metrics = recipe.loss(
        log_probs,
        current if e.old_log_probs is None else e.old_log_probs,
        e.advantages,
        e.mask,
        e.weights,
        e.ref_log_probs,
        penalty_weights=e.penalty_weights,
        kls=kls,
        at_reference=at_reference,
        entropies=entropies,
    )
    if num_tokens is not None:
        loss = jnp.where(jnp.sum(e.mask) <= num_tokens, loss, jnp.nan)
    measured = {"entropy": jax.lax.stop_gradient(token_mean(entropies, e.mask))}
    if e.sampler_log_probs is not None and dropout_key is None:  # Dropout makes another policy of it.
        measured["sampling/logp_difference_max"] = logp_difference_max(e.sampler_log_probs, current, e.mask)
    return loss, (metrics, measured)


def _gradients(
    state: TrainState, experience: Experience, num_microbatches: int, loss_fn: Callable
) -> tuple[Params, Float[Array, ""], LossMetrics, Scalars]:
    """Returns (gradients, loss, LossMetrics, other metrics) of the batch, one slice at a time."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        (loss, aux), grads = value_and_grad(state.params, state.policy, experience)
        return grads, loss, *aux

    def add_slice(total, part):
        (loss, aux), grads = value_and_grad(state.params, state.policy, part)
        return jax.tree.map(jnp.add, total, grads), (loss, aux)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    parts = split_rows(experience, num_microbatches)
    grads, (losses, (metrics, measured)) = jax.lax.scan(add_slice, zeros, parts)
    share = metrics.num_tokens / jnp.maximum(jnp.sum(metrics.num_tokens), 1)
    merged = {
        name: jnp.max(x) if name.endswith("_max") else jnp.sum(share * x) for name, x in measured.items()
    }
    return grads, jnp.sum(losses), merge_loss_metrics(metrics), merged


def _takes_plain_states(update: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Lets a jitted update take a plain flax TrainState as well, and give one of its class back."""

    @functools.wraps(update)
    def train_step(state, experience, **settings):
        if isinstance(state, TrainState):
            return update(state, experience, **settings)
        own, metrics = update(own_state(state), experience, **settings)
        return state.replace(step=own.step, params=own.params, opt_state=own.opt_state), metrics

    # It may be asked for what a jitted function may be asked for.
    train_step.lower = update.lower
    train_step._cache_size = update._cache_size
    return train_step


@_takes_plain_states
@functools.partial(
    jax.jit,
    static_argnames=("group_size", "num_microbatches", "num_tokens", "chunk_size"),
    donate_argnames="state",
)
def train_step(
    state: train_state.TrainState,
    experience: Experience,
    *,
    recipe: Recipe,
    frozen: Params | None = None,
    ref_params: Params | None = None,
    at_reference: Bool[ArrayLike, ""] = False,
    dropout_key: PRNGKeyArray | None = None,
    group_size: int = 1,
    num_microbatches: int = 1,
    num_tokens: int | None = None,
    temperature: Real[ArrayLike, ""] = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[train_state.TrainState, Scalars]:
    """Makes one optimizer update from one batch of experience. Compiled once per shape.

    The gradient is that of `grpo_loss` over the whole batch, and micro-batches only bound memory. If the
    loss or any gradient is not finite, parameters and optimizer stay as they are and the update is
    counted as skipped. They also stay if every gradient is exactly 0, as when all groups are dead. Without a
    signal, neither momentum nor weight decay moves the policy, and the update is counted as idle.

    Where all groups are dead and the policy equals the reference, the KL has no gradient either. Rounding
    must not become one, since an optimizer like Adam makes a full step of a gradient of any size. So the KL
    of such a batch is exactly 0 if the caller says `at_reference` or if ref_params are the policy's. It is
    also 0 on tokens whose log-probs under both are within 3e-5 nats. Float32 programs differ by less.

    Args:
        state: the state that `init_train_state` made. Its arrays are donated, so do not use it afterwards.
            It may also be a plain flax `TrainState`, or a subclass, of any causal language model. Its
            apply_fn is what `grpo_jax.policy_of` takes, such as `model.__call__` of a Flax model of
            transformers or `module.apply` of a linen module. That is copied, not donated, and a state of its
            class comes back. It counts no updates but `step`, so `skipped_updates` and `idle_updates` are
            those of this call, 0 or 1.
        experience: B rows.
        recipe: the objective. Its numbers, such as kl_coef, are traced, and the rest is static.
        frozen: parameters of the base of the adapters. They are given with LoRA, and only then.
        ref_params: parameters of the frozen reference, which only a recipe with an exact KL term needs.
        at_reference: [] bool, traced, whether the policy equals the reference, see `is_reference`. If so, its
            KL is exactly 0, also where groups have a signal.
        dropout_key: PRNG key of this update's dropout, the same for all micro-batches. It is given with
            adapters that have dropout, and only then.
        group_size: number of consecutive rows with the same prompt, which is run once for them.
        num_microbatches: number of slices of the batch, a divisor of B.
        num_tokens: largest number of tokens in a slice, see `tokens_in_use`. None means all B*T. If there are
            more, the loss is not finite and the update is skipped.
        temperature: the temperature that the rollout was sampled with.
        chunk_size: number of tokens whose logits exist at once, see `token_log_probs`.

    Returns:
        (new state, metrics). Metrics are scalars by their logged names, see `grpo_jax.training.metrics`.

    Raises:
        ValueError: num_microbatches does not divide B, ref_params do not fit the kind of KL, frozen or
            dropout_key do not fit the state, or the model of the state is unknown.

    >>> from grpo_jax import experience_of, generate, init_train_state, make_recipe, pad_prompts
    >>> from grpo_jax import policy_from_apply
    >>> policy = policy_from_apply(lambda params, tokens, mask, positions: params[tokens])
    >>> state = init_train_state(policy, jnp.zeros((3, 3)), optax.sgd(1.0))
    >>> limits = {"group_size": 4, "max_new_tokens": 1, "eos_ids": 0}
    >>> rollout = generate(policy, state.params, pad_prompts([[1]], 1), jax.random.key(0), **limits)
    >>> rewards = (rollout.tokens == 2).reshape(1, 4)  # the task is to say 2
    >>> recipe = make_recipe("dr_grpo")
    >>> state, metrics = train_step(state, experience_of(rollout, recipe, rewards=rewards), recipe=recipe)
    >>> int(state.step), int(jnp.argmax(state.params[1]))
    (1, 2)
    """
    check_frozen(state, frozen)
    if (dropout_key is not None) != (state.lora is not None and state.lora.dropout > 0):
        raise ValueError("dropout_key is that of adapters with dropout: needed by them, and only by them")
    if ref_params is not None and not recipe.exact_kl:
        raise ValueError("ref_params are only for a recipe whose kl_estimator is exact")
    e = experience
    chex.assert_rank([e.prompt_tokens, e.tokens], 2)
    chex.assert_equal_shape([e.prompt_tokens, e.prompt_mask])
    chex.assert_equal_shape([e.tokens, e.mask, e.weights])
    if e.old_log_probs is not None:
        chex.assert_equal_shape([e.tokens, e.old_log_probs])
    chex.assert_shape(e.advantages, (e.tokens.shape[0],))
    chex.assert_equal_shape_prefix([e.prompt_tokens, e.tokens], 1)
    if e.ref_log_probs is not None:
        chex.assert_equal_shape([e.tokens, e.ref_log_probs])
    if ref_params is not None:
        at_reference |= is_reference(state.params, ref_params, frozen)
    teaches = e.mask & (e.weights != 0) & (e.advantages != 0)[:, None]
    bonus = False if recipe.entropy_coef is None else jnp.asarray(recipe.entropy_coef) != 0
    loss_fn = functools.partial(
        experience_loss,
        recipe=recipe,
        lora=state.lora,
        frozen=frozen,
        ref_params=ref_params,
        at_reference=at_reference,
        has_signal=jnp.any(teaches) | bonus,
        dropout_key=dropout_key,
        group_size=shared_rows(e.tokens.shape[0], group_size, num_microbatches),
        num_tokens=num_tokens,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    grads, loss, loss_metrics, measured = _gradients(state, experience, num_microbatches, loss_fn)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    moving = grad_norm > 0
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite & moving, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    state = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        idle=state.idle + (finite & ~moving),
    )
    metrics = {
        "loss": loss,
        **loss_metrics_dict(loss_metrics),
        **measured,
        "grad_norm": grad_norm,
        "skipped_updates": state.skipped,
        "skipped_updates_in_a_row": state.skipped_in_a_row,
        "idle_updates": state.idle,
    }
    return state, metrics
