"""Makes a `Policy` of a plain function that returns logits and knows no cache.

Without a cache every decoding step runs the model on everything that was written so far. What stands in for
the cache is therefore the tokens themselves with their positions, in slots of a fixed number, and the step
reads one row of the logits.

Rows reach the function with their real tokens first and the padding behind them, whatever the padding of the
prompts. A causal function then computes the same without looking at the mask or at the positions, and no row
of its attention is without a key.
"""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.types import Cache, Params, Policy

# (params, tokens [B,L] int32, mask [B,L] bool, positions [B,L] int32) -> logits [B,L,V]
ApplyFn = Callable[[Params, Array, Array, Array], Array]

MASK_NAMES = ("mask", "attention_mask", "input_mask")
POSITION_NAMES = ("positions", "position_ids", "pos", "pos_ids", "position", "inputs_positions")
WRAPPED = "grpo_jax.policy_from_apply(lambda params, tokens, mask, positions: ...)"


def policy_from_apply(apply_fn: ApplyFn) -> Policy:
    """Makes the policy of a causal language model that is a function, for `generate` and `train_step`.

    It costs time and memory. Decoding T tokens runs the model T times on whole rows of L = S + T tokens. The
    logits [B, L, V] of a micro-batch exist in float32 in `completion_log_probs` and in `train_step`, because
    they are what a `Policy` calls hidden states. Larger `num_microbatches` bound them. For a model that is
    trained seriously, write a `Policy` with a cache.

    The function must be causal: the logits at a token may depend on that token and on earlier ones. The first
    state that is made of it checks that, see `check_causal`.

    Args:
        apply_fn: a function `(params, tokens [B,L], mask [B,L], positions [B,L]) -> logits [B,L,V]`, called
            with positional arguments. The mask is bool, True for real tokens. They come first in each row,
            with padding behind them, and their positions count from 0. The function may ignore both.
            Its params are any pytree of arrays. It must be without dropout, and it must be hashable.

    Returns:
        The policy. The same function gives the same policy, so that nothing is compiled twice.

    Raises:
        ValueError: the function cannot be called with these four arguments, or it returns something else,
            which shows when it is first traced.

    >>> import jax, jax.numpy as jnp
    >>> from grpo_jax import generate, pad_prompts, policy_from_apply
    >>> bigram = policy_from_apply(lambda params, tokens, mask, positions: params[tokens])
    >>> table = 9 * jnp.eye(5)[jnp.array([1, 2, 3, 4, 0])]  # after token i comes i + 1
    >>> prompts = pad_prompts([[1], [0, 1, 2]], 3)
    >>> settings = {"group_size": 1, "max_new_tokens": 4, "eos_ids": 0, "temperature": 0}
    >>> generate(bigram, table, prompts, jax.random.key(0), **settings).tokens.tolist()
    [[2, 3, 4, 0], [3, 4, 0, 0]]
    """
    _check_signature(apply_fn)
    return _policy(apply_fn)


@functools.lru_cache(maxsize=64)
def _policy(apply_fn: ApplyFn) -> Policy:

    def forward(
        params: Params,
        tokens: Array,
        mask: Array,
        positions: Array,
        cache: Cache = None,
        *,
        num_tokens: int | None = None,
    ) -> tuple[Array, Cache]:
        del num_tokens  # the function knows whole rows only
        start = 0
        if cache is not None:
            start = cache["size"]
            cache = {
                "tokens": jax.lax.dynamic_update_slice(cache["tokens"], tokens, (0, start)),
                "positions": jax.lax.dynamic_update_slice(cache["positions"], positions, (0, start)),
                "size": start + tokens.shape[1],
            }
        written = {"tokens": tokens, "positions": positions} if cache is None else cache
        slots = written["tokens"].shape[1]
        if mask.shape[1] != slots:
            raise ValueError(
                f"the mask covers {mask.shape[1]} tokens, tokens and cache have room for {slots}"
            )
        mask = mask & (jnp.arange(slots) < start + tokens.shape[1])
        order = jnp.argsort(~mask, axis=1, stable=True)
        rank = jnp.argsort(order, axis=1)
        logits = _checked_logits(
            apply_fn,
            params,
            jnp.take_along_axis(written["tokens"], order, axis=1),
            jnp.take_along_axis(mask, order, axis=1),
            jnp.take_along_axis(written["positions"], order, axis=1),
        )
        if tokens.shape[1] == slots:
            return _reorder(logits, rank, order), cache
        rank = jax.lax.dynamic_slice_in_dim(rank, start, tokens.shape[1], axis=1)
        return jnp.take_along_axis(logits, rank[..., None], axis=1), cache

    def forward_groups(params, prompts, tokens, mask, num_tokens=None):
        # Without a cache there is nothing to share, so each row is one sequence, prompt and completion.
        del num_tokens
        num_prompts, prompt_length = prompts.tokens.shape
        group_size = tokens.shape[0] // num_prompts
        repeated = (jnp.repeat(x, group_size, axis=0) for x in (prompts.tokens, prompts.mask))
        whole, whole_mask = (
            jnp.concatenate([x, y], axis=1) for x, y in zip(repeated, (tokens, mask), strict=True)
        )
        positions = jnp.maximum(jnp.cumsum(whole_mask, axis=1, dtype=jnp.int32) - 1, 0)
        hidden, _ = forward(params, whole, whole_mask, positions)
        return hidden[::group_size, prompt_length - 1], hidden[:, prompt_length:]

    return Policy(
        forward=forward, unembed=_logits_are_hidden, init_cache=_init_cache, forward_groups=forward_groups
    )


_CAUSAL: set[Callable] = set()  # forward functions of the policies that `check_causal` has seen


def check_causal(policy: Policy, params: Params) -> None:
    """Raises if a policy of `policy_from_apply` looks at later tokens.

    An attention without a causal mask samples and scores without any error, and what it learns is nonsense.
    Two rows that begin alike show it. That compiles the model once more, for 8 tokens, when the first state
    of a policy is made. Other policies are not called, nor is one whose params are being traced or that does
    not take 4 tokens.

    Raises:
        ValueError: the logits of a token depend on later tokens, or on chance.
    """
    if policy.unembed is not _logits_are_hidden or policy.forward in _CAUSAL:
        return
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        return
    tokens = jnp.array([[0, 0, 0, 0], [0, 0, 1, 1]], jnp.int32)
    positions = jnp.tile(jnp.arange(4, dtype=jnp.int32), (2, 1))
    try:
        # The caller may be inside a jit of the user, with parameters that are constants there.
        with jax.ensure_compile_time_eval():
            logits, _ = jax.jit(policy.forward)(params, tokens, jnp.ones((2, 4), bool), positions)
            difference = float(jnp.max(jnp.abs(logits[0, :2] - logits[1, :2])))
            largest = float(jnp.max(jnp.abs(logits)))
    except Exception:  # whatever is wrong with the model shows, with its place, when it is called in earnest
        return
    if difference > 1e-3 * largest:
        raise ValueError(
            f"the model is not causal: its logits of a token change by {difference:.2g} with later tokens or "
            "by chance; let its attention mask later tokens, as mask[:, None, :] & jnp.tril(jnp.ones((L, L), "
            "bool)) does, and switch off its dropout"
        )
    _CAUSAL.add(policy.forward)


def _logits_are_hidden(params: Params, hidden: Array) -> Array:
    del params
    return hidden


def _init_cache(batch: int, max_length: int) -> Cache:
    # Rows are axis 0 and slots axis 1, as the cache functions of `Policy` expect that are the default.
    empty = jnp.zeros((batch, max_length), jnp.int32)
    return {"tokens": empty, "positions": empty, "size": jnp.int32(0)}


@jax.custom_vjp
def _reorder(x: Array, order: Array, inverse: Array) -> Array:
    """Returns x[b, order[b, j]] of x [B,L,V].

    The gradient of a gather is a scatter, which is slow. Here it is the gather by the inverse order.
    """
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _reorder_forward(x: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return _reorder(x, order, inverse), inverse


def _reorder_backward(inverse: Array, gradient: Array) -> tuple[Array, None, None]:
    return jnp.take_along_axis(gradient, inverse[..., None], axis=1), None, None


_reorder.defvjp(_reorder_forward, _reorder_backward)


def _checked_logits(apply_fn: ApplyFn, params: Params, tokens: Array, mask: Array, positions: Array) -> Array:
    """Calls the function, and returns its logits [B,L,V] in float32.

    Raises:
        ValueError: what it returns are no logits, or it takes the mask in another shape.
    """
    rows, length = tokens.shape
    try:
        logits = apply_fn(params, tokens, mask, positions)
    except (TypeError, ValueError) as error:
        error.add_note(
            f"The model got int32 tokens [{rows}, {length}], a bool mask [{rows}, {length}] that is True for "
            f"real tokens, and int32 positions. If it wants others, write {WRAPPED}."
        )
        raise
    if not isinstance(logits, jax.Array):
        raise ValueError(
            f"apply_fn returns a {type(logits).__name__}, and it must return the logits [B, L, V] alone; "
            f"take them out of it: {WRAPPED}"
        )
    is_logits = logits.ndim == 3 and logits.shape[:2] == tokens.shape
    if not is_logits or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"apply_fn returns {logits.dtype} {list(logits.shape)} for tokens {[rows, length]}, and it must "
            f"return floating-point logits [{rows}, {length}, V], one row of the vocabulary for each token"
        )
    if rows in (1, length):
        _check_mask(apply_fn, params, length)
    return logits.astype(jnp.float32)


def _check_mask(apply_fn: ApplyFn, params: Params, length: int) -> None:
    """Raises if a mask [B,L] fits the function by chance alone.

    If there is one row, or as many rows as tokens, a function that expects an attention mask [B,1,L,L] may
    broadcast [B,L] to it without an error. Tracing it for another number of rows costs little and shows it.
    """
    rows = length + 1
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, length), jnp.bool_)
    try:
        jax.eval_shape(apply_fn, params, ids, mask, ids)
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"apply_fn cannot be called for {rows} rows of {length} tokens ({reason}); its mask is [B, L], "
            f"True for real tokens: if the model wants an attention mask, make it in {WRAPPED}"
        ) from error


def _check_signature(apply_fn: ApplyFn) -> None:
    if not callable(apply_fn):
        raise ValueError(f"apply_fn is a {type(apply_fn).__name__}, which cannot be called; give {WRAPPED}")
    try:
        signature = inspect.signature(apply_fn)
    except (TypeError, ValueError):
        return  # a built-in that has none
    name = getattr(apply_fn, "__qualname__", type(apply_fn).__name__)
    try:
        bound = signature.bind(*["params", "tokens", "mask", "positions"])
    except TypeError as error:
        raise ValueError(
            f"{name}{signature} cannot be called as apply_fn(params, tokens, mask, positions): {error}; give "
            f"a model object to grpo_jax.policy_of, and for a function write {WRAPPED}"
        ) from None
    swapped = [
        parameter
        for parameter, value in bound.arguments.items()
        if (parameter in MASK_NAMES and value != "mask")
        or (parameter in POSITION_NAMES and value != "positions")
    ]
    if swapped:
        raise ValueError(
            f"{name}{signature} has {swapped[0]} in another place than apply_fn(params, tokens, mask, "
            f"positions), which is called with positional arguments; write {WRAPPED}"
        )
