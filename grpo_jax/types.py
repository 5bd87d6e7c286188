"""The records that flow through a training step.

Shape alphabet, used in every docstring, test and comment of the package:

    N prompts in a step · G completions per prompt · B = N*G sequences, prompt-major (row n*G + g) ·
    S prompt tokens (left-padded) · T completion tokens (right-padded) · L = S + T · V vocabulary ·
    D model width · R reward functions · K tokens given to one forward call · ... any leading axes

A mask is bool and is a *length*, never ``ids != pad_id``: a prompt may contain the eos id, and many
models pad with it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

Prompt = str | list[dict[str, Any]]  # a text, or the messages of a chat
Params = Any  # a pytree of arrays
Cache = Any  # a pytree that only the policy's own functions look into
STATIC = {"static": True}  # metadata of a field that is no child of the pytree


def repeat_rows(cache: Cache, group_size: int) -> Cache:
    """Repeats every row of a cache that has the batch as axis 0 and whose scalars are shared."""
    return jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0) if jnp.ndim(x) else x, cache)


def pad_slots(cache: Cache, max_length: int) -> Cache:
    """Makes room in a cache that has its slots as axis 1 and whose scalars are shared."""

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, max_length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    return jax.tree.map(lambda x: pad(x) if jnp.ndim(x) else x, cache)


def take_rows(cache: Cache, rows: Int[ArrayLike, " b"]) -> Cache:
    """Keeps rows [b] of a cache whose arrays have the batch as axis 0 and whose scalars are shared."""
    return jax.tree.map(lambda x: x[rows] if jnp.ndim(x) else x, cache)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Policy:
    """A causal language model as a record of pure functions of its parameters.

    A pytree without leaves: it may be passed through ``jax.jit`` and compares by the identity of
    its functions, so one loaded model means one compilation. `policy_from_apply` makes one of a function that
    returns logits, and `policy_of` of a Flax model.

    Args:
        forward: function (params, tokens [B,K], mask [B,L], positions [B,K], cache | None) -> (hidden
            [B,K,D], cache | None). Without a cache L == K, and mask says which of the K tokens are real. With
            a cache L is the cache's max_length, and mask says which slots may be attended to. Slots not yet
            written are never attended. A keyword num_tokens promises that at most that many of the B*K tokens
            are real. Hidden states of the others are then undefined, and a policy may save the work on them.
            It is passed only where a caller gives num_tokens, so a policy for callers who never do may leave
            it out.
        unembed: function (params, hidden [...,D]) -> logits [...,V], float32.
        init_cache: function (batch, max_length) -> cache.
        fork_cache: function (full cache of N rows, group_size) -> full cache of N*group_size rows,
            prompt-major.
        grow_cache: function (cache, max_length) -> the same with room for more.
        take_cache: function (cache, rows [b]) -> cache of those rows.
        for_decoding: function (params, number of rows at the end) -> params laid out for decoding down to so
            many rows, which the other functions take as well. None means that they stay as they are.
        forward_groups: function (params, Prompts [N,S], tokens [B,K], mask [B,K], num_tokens=None) -> (hidden
            [N,D] of each prompt's last token, hidden [B,K,D]), which runs prompts and their continuations in
            one pass. None means that the policy has no such pass, and a cache is forked.
    """

    forward: Callable[..., tuple[Array, Cache]] = field(metadata=STATIC)
    unembed: Callable[[Params, Array], Array] = field(metadata=STATIC)
    init_cache: Callable[[int, int], Cache] = field(metadata=STATIC)
    fork_cache: Callable[[Cache, int], Cache] = field(metadata=STATIC, default=repeat_rows)
    grow_cache: Callable[[Cache, int], Cache] = field(metadata=STATIC, default=pad_slots)
    take_cache: Callable[[Cache, Array], Cache] = field(metadata=STATIC, default=take_rows)
    for_decoding: Callable[[Params, int], Params] | None = field(metadata=STATIC, default=None)
    forward_groups: Callable[..., tuple[Array, Array]] | None = field(metadata=STATIC, default=None)

    replace = dataclasses.replace


@dataclass(frozen=True)
class Example:
    """One prompt and what the reward functions may know about it.

    Args:
        prompt: a text, or a list of chat messages `{"role": ..., "content": ...}`.
        columns: everything else, by name. Reward functions get it and the model never does.
        place: the place it comes from, for messages, such as `train.jsonl, line 3`. It is empty for a task
            that makes its own problems.
        tokens: token ids of the prompt, once a run has encoded it. They follow from the prompt.
    """

    prompt: Prompt
    columns: dict[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)
    tokens: tuple[int, ...] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Silence:
    """A reward that says nothing about completions.

    Args:
        reward: the reward's name.
        kind: `lowest` (the same value, 0 or below, for all), `none` (no value for any), `some` (no value for
            some), or `lost` (calls over their timeout, dead workers).
        what: what the reward does not say.
        first: the first such row, with what was compared.
    """

    reward: str
    kind: Literal["lowest", "none", "some", "lost"]
    what: str
    first: str

    @property
    def text(self) -> str:
        """One line for the user."""
        return f"the reward {self.reward} {self.what}; first: {self.first}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the reward functions make of B completions.

    Args:
        scores: [B,R] float32 on the host, NaN where a reward function gave no value.
        silences: the rewards that say nothing.
        num_lost: mapping from a reward with a timeout to the number of rows that it lost.
        logged: figures that functions logged, by name.
        columns: texts or numbers that functions say of each completion, by name.
    """

    scores: Float[ArrayLike, "B R"]
    silences: Sequence[Silence] = ()
    num_lost: Mapping[str, int] = field(default_factory=dict)
    logged: Mapping[str, Sequence[float]] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Left-padded prompts. `pad_prompts` makes them of lists of token ids.

    Args:
        tokens: [N,S] int32, token ids.
        mask: [N,S] bool, False on the left padding.
    """

    tokens: Int[ArrayLike, "N S"]
    mask: Bool[ArrayLike, "N S"]

    replace = dataclasses.replace


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Prompts and the completions that a policy sampled for them.

    Its arrays and those of an `Experience` have one more axis in front where `split_rows` stacks slices.
    The last three may be None where log-probs are all that is computed of a rollout.

    Args:
        prompt_tokens: [B,S], token ids of the left-padded prompts.
        prompt_mask: [B,S], False on the left padding.
        tokens: [B,T], token ids of the completions, 0 after their end.
        mask: [B,T], True up to and including the first eos or the end of a stop string.
        log_probs: [B,T] float32, log-probs of the tokens under the temperature-scaled full distribution. They
            are 0 where masked.
        kept_mass: [B,T] float32, probability that top-k, top-p and min-p left. It is 1 without them and 0
            where masked.
        finished: [B], whether an eos or a stop string ended the completion. It is False where the limit
            truncated it.
    """

    prompt_tokens: Int[ArrayLike, "*slices B S"]
    prompt_mask: Bool[ArrayLike, "*slices B S"]
    tokens: Int[ArrayLike, "*slices B T"]
    mask: Bool[ArrayLike, "*slices B T"]
    log_probs: Float[ArrayLike, "*slices B T"] | None
    kept_mass: Float[ArrayLike, "*slices B T"] | None
    finished: Bool[ArrayLike, "*slices B"] | None

    replace = dataclasses.replace


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Totals:
    """What the rewards of B completions, in whole groups, add up to: see `add_up_rewards`.

    A completion that does not train (see `Recipe.mask_truncated`) is still logged. Its group is added up once
    with it, for the log, and once without it, for the training.

    Args:
        rewards: [B] float32, weighted sums with the overlong penalty, 0 where they are not valid.
        valid: [B], False where the policy for missing rewards drops the completion.
        penalty: [B] float32, the overlong penalty alone.
        train_rewards: [B] float32, the same sums as `rewards`, but of the completions that train.
        train_valid: [B], the same as `valid`, but also False where the completion does not train.
        signal: [B], whether the group of the completion teaches something.
    """

    rewards: Float[ArrayLike, " B"]
    valid: Bool[ArrayLike, " B"]
    penalty: Float[ArrayLike, " B"]
    train_rewards: Float[ArrayLike, " B"]
    train_valid: Bool[ArrayLike, " B"]
    signal: Bool[ArrayLike, " B"]

    replace = dataclasses.replace


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Judged:
    """A rollout of whole groups, with its log-probs and what the reward functions gave it.

    Args:
        rollout: the B completions.
        old_log_probs: [B,T] float32, log-probs under the policy that sampled. None means that the update
            computes them, see `Experience`.
        entropies: [B,T] float32, entropies in nats of the distributions that the tokens were sampled from.
            None as above.
        ref_log_probs: [B,T] float32, log-probs under the reference. None where they are not needed.
        scores: [B,R] float32, NaN where a reward function gave no value.
        totals: the sums of the scores. None in a checkpoint, since they follow from the scores.
    """

    rollout: Rollout
    old_log_probs: Float[ArrayLike, "B T"] | None
    entropies: Float[ArrayLike, "B T"] | None
    ref_log_probs: Float[ArrayLike, "B T"] | None
    scores: Float[ArrayLike, "B R"]
    totals: Totals | None = None

    replace = dataclasses.replace


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Experience:
    """Everything that one optimizer batch needs. All of it is data, and no gradient flows into it.

    Args:
        prompt_tokens: [B,S], token ids of the left-padded prompts.
        prompt_mask: [B,S], False on the left padding.
        tokens: [B,T], token ids of the completions.
        mask: [B,T], True on the tokens of the completions.
        advantages: [B] float32.
        weights: [B,T] float32, weights of the policy term, from `loss_weights` over the optimizer batch.
        old_log_probs: [B,T] float32, log-probs under the policy that sampled. None means that this policy is
            the one being trained, so they are its log-probs and every ratio is 1.
        ref_log_probs: [B,T] float32, log-probs under the reference. None without a KL estimate.
        penalty_weights: [B,T] float32, weights of the KL and entropy terms. None means `weights`.
        sampler_log_probs: [B,T] float32, log-probs as the sampler recorded them. They are measured and not
            trained on.
    """

    prompt_tokens: Int[ArrayLike, "*slices B S"]
    prompt_mask: Bool[ArrayLike, "*slices B S"]
    tokens: Int[ArrayLike, "*slices B T"]
    mask: Bool[ArrayLike, "*slices B T"]
    advantages: Float[ArrayLike, "*slices B"]
    weights: Float[ArrayLike, "*slices B T"]
    old_log_probs: Float[ArrayLike, "*slices B T"] | None
    ref_log_probs: Float[ArrayLike, "*slices B T"] | None = None
    penalty_weights: Float[ArrayLike, "*slices B T"] | None = None
    sampler_log_probs: Float[ArrayLike, "*slices B T"] | None = None

    replace = dataclasses.replace
