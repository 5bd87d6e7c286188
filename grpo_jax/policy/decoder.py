"""A decoder-only transformer in pure JAX: GPT-2, the Llama line and Gemma in one code path.

`make_decoder` turns an `Architecture` into a `Policy`. Training, scoring, prefill and decoding are the same
`forward`. They differ only in the cache. Three things make it fast:

* The keys and values of a prompt are kept once for its whole group (`DecoderCache.prefix`), in decoding and
  in training. The G completions of a prompt attend to them in one matrix product.
* The cache stores side by side what one product reads (`cache`).
* If `forward` is told how many of the tokens are real, it runs its dense layers on those alone (`packing`).

Read the module docstring of `grpo_jax.policy.attention` first. It has a picture of the axes, and of Segment,
Visible, Packing and Frame.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.cpu_tuning import cpu_vendor
from grpo_jax.policy.architecture import Architecture
from grpo_jax.policy.attention import ATTENTION, check_attention, make_segment, softcap
from grpo_jax.policy.cache import (
    DecoderCache,
    fork_cache,
    grow_cache,
    init_cache,
    layers_of,
    sharing,
    take_cache,
)
from grpo_jax.policy.decoding import positions_from_mask
from grpo_jax.policy.layers import dense, make_frame, matmul, run_layers
from grpo_jax.types import Params, Policy, Prompts

# A wrapper of a layer decides how much of it is kept for the backward pass.
REMAT: dict[str, Callable] = {
    "none": lambda layer: layer,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "full": jax.checkpoint,
}
_MANY_ROWS = 64  # From so many rows of a decoding step on, the layout of kernels makes no difference.


def make_decoder(
    architecture: Architecture,
    view: Callable[[Params], dict[str, Any]],
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "shared",
) -> Policy:
    """Makes the policy of an architecture.

    Args:
        architecture: architecture of the model.
        view: function that renames a parameter pytree, without computing anything, to
            {"embedding" [V,D], "positions" [P,D] if learned, "layers", "final_norm", "head" unless tied}.
            A layer has the norms "attention_norm", "mlp_norm" and, in some families, "query_norm",
            "key_norm", "post_attention_norm", "post_mlp_norm". It has the dense layers "qkv" (one, or three),
            "output", "up" (one, or gate and up) and "down". A norm is {"scale", "bias"?}, a dense layer
            {"kernel", "bias"?}.
        dtype: compute dtype. Norms, scores and logits are float32 either way.
        remat: what the backward pass of a layer recomputes instead of keeping it, a key of REMAT: nothing
            (`none`), all but the results of dense layers (`dots`), or everything from the layer's input
            (`full`). It changes neither values nor gradients.
        attention: a key of ATTENTION: `shared`, or `cudnn` (flash attention on NVIDIA, in bfloat16).

    Returns:
        a Policy, whose forward raises ValueError when it is traced for more than max_positions.

    Raises:
        ValueError: this attention cannot run here, or not in this dtype.
    """
    check_attention(attention, dtype)
    decoder = _Decoder(
        architecture=architecture,
        view=view,
        dtype=dtype,
        remat=REMAT[remat],
        attend=ATTENTION[attention],
    )
    return Policy(
        forward=decoder.forward,
        unembed=decoder.unembed,
        init_cache=functools.partial(
            init_cache,
            num_layers=architecture.num_layers,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            dtype=dtype,
        ),
        fork_cache=fork_cache,
        grow_cache=grow_cache,
        take_cache=take_cache,
        for_decoding=decoder.for_decoding,
        forward_groups=decoder.forward_groups,
    )


# Decoders are compared by identity, as a `Policy` compares its functions. Two views may differ in anything.
@dataclass(frozen=True, kw_only=True, eq=False)
class _Decoder:
    """Functions of a `Policy`, which share what `make_decoder` was given."""

    architecture: Architecture
    view: Callable[[Params], dict[str, Any]]
    dtype: Any
    remat: Callable
    attend: Callable

    def forward(
        self,
        params: Params,
        tokens: Array,
        mask: Array,
        positions: Array,
        cache: DecoderCache | None = None,
        *,
        num_tokens: int | None = None,
    ) -> tuple[Array, DecoderCache | None]:
        self._check_length(mask.shape[1])
        num_prompts, prefix_length = sharing(cache, tokens, mask)
        segment = make_segment(
            self.architecture.windows,
            mask,
            positions,
            num_prompts=num_prompts,
            prefix_length=prefix_length,
            num_tokens=num_tokens,
        )
        (hidden,), own = self._run(params, [tokens], (segment,), cache)
        if cache is not None:
            cache = cache.replace(own=tuple(own), size=cache.size + tokens.shape[1])
        return hidden, cache

    def forward_groups(
        self, params: Params, prompts: Prompts, tokens: Array, mask: Array, *, num_tokens: int | None = None
    ) -> tuple[Array, Array]:
        # Prompts and completions run as two segments of one call. No cache is filled and forked in between.
        windows = self.architecture.windows
        num_prompts, prompt_length = prompts.tokens.shape
        prompt_mask = jnp.repeat(prompts.mask, tokens.shape[0] // num_prompts, axis=0)
        whole_mask = jnp.concatenate([prompt_mask, mask], axis=1)
        self._check_length(whole_mask.shape[1])
        prompt = make_segment(
            windows, prompts.mask, positions_from_mask(prompts.mask), num_prompts=num_prompts
        )
        own = make_segment(
            windows,
            whole_mask,
            positions_from_mask(whole_mask)[:, prompt_length:],
            num_prompts=num_prompts,
            prefix_length=prompt_length,
            num_tokens=num_tokens,
        )
        (of_prompts, hidden), _ = self._run(params, [prompts.tokens, tokens], (prompt, own), None)
        return of_prompts[:, -1], hidden

    def for_decoding(self, params: Params, num_rows: int) -> Params:
        # The choice follows from the kind of machine and never from a measurement, see `cpu_vendor`.
        few = num_rows < _MANY_ROWS and jax.default_backend() == "cpu" and cpu_vendor() == "AuthenticAMD"
        return _output_last(self.architecture, self.view(params)) if few else params

    def unembed(self, params: Params, hidden: Array) -> Array:
        architecture, tree = self._tree_of(params)
        if "head" in tree:
            logits = dense(architecture, hidden, tree["head"], self.dtype, jnp.float32)
        else:  # a tied head contracts the embedding as it is, [V,D]
            embedding = tree["embedding"].astype(self.dtype)
            logits = matmul(hidden.astype(self.dtype), embedding, 1, jnp.float32)
        return softcap(logits, architecture.logit_softcap)

    def _run(self, params, tokens, segments, cache):
        frame = make_frame(self.architecture, tokens[0], segments)
        caches = layers_of(cache, self.architecture.num_layers)
        architecture, tree = self._tree_of(params)
        return run_layers(architecture, tree, frame, tokens, caches, self.dtype, self.remat, self.attend)

    def _tree_of(self, params: Params) -> tuple[Architecture, dict[str, Any]]:
        """Returns the parameters as layers read them, and the architecture that says how kernels lie."""
        if isinstance(params, _OutputLast):
            return replace(self.architecture, transposed_kernels=False), params.tree
        return self.architecture, self.view(params)

    def _check_length(self, length: int) -> None:
        limit = self.architecture.max_positions
        if length > limit:
            raise ValueError(
                f"a sequence of {length} tokens (prompt with padding + completion) is over the "
                f"model's {limit} positions"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _OutputLast:
    """A decoder's parameters with every kernel as [in, out]."""

    tree: dict[str, Any]  # as a view gives it, with a head


def _output_last(a: Architecture, tree: dict[str, Any]) -> _OutputLast:
    """Lays out every kernel as [in, out], a tied head included.

    With few rows, XLA on AMD multiplies by such matrices up to twice as fast as by [out, in]: 125 against 66
    GFLOP/s for 8 rows and 3072 by 768 (EPYC). From _MANY_ROWS on there is no difference. On Intel it is
    slower: 48 against 70 for 8 rows, 99 against 171 for 32 (Sapphire Rapids). Decoding takes a quarter more.
    """

    def flip(params):
        return params | {"kernel": params["kernel"].T} if a.transposed_kernels else params

    def flip_all(layer):
        lists = {name: [flip(params) for params in layer[name]] for name in ("qkv", "up")}
        return layer | lists | {name: flip(layer[name]) for name in ("output", "down")}

    head = flip(tree["head"]) if "head" in tree else {"kernel": tree["embedding"].T}
    return _OutputLast(tree=tree | {"head": head, "layers": [flip_all(layer) for layer in tree["layers"]]})
