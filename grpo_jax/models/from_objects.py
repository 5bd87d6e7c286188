"""Makes a `Model` of what a Python program has in memory: a model object, or a policy, and a tokenizer."""

import copy
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.models.directories import find_directory
from grpo_jax.models.endings import choose_eos, find_eos
from grpo_jax.models.flax_objects import check_params, policy_of
from grpo_jax.models.implementations import choose_implementation, load_implementation
from grpo_jax.models.loading import Model, largest_id
from grpo_jax.models.tokenizer_files import is_fast, load_tokenizer
from grpo_jax.models.vocabulary import limit_vocabulary
from grpo_jax.types import Params, Policy

_limited = functools.lru_cache(maxsize=16)(limit_vocabulary)  # the same policy, so nothing is compiled twice


@dataclass(frozen=True)
class OwnConfig:
    """Stands for the configuration of a model that is none of transformers.

    Args:
        vocab_size: V.
        model_type: kind of the model.
    """

    vocab_size: int
    model_type: str = "own"


def model_of(
    model: Any,
    tokenizer: Any = None,
    params: Params | None = None,
    *,
    eos_token_ids: Sequence[int | str] | None = None,
) -> Model:
    """Makes a `Model` of an object, for a run.

    Args:
        model: a `FlaxXxxForCausalLM` of transformers, or anything else that `policy_of` takes.
        tokenizer: fast tokenizer of the model, or the name or directory of one.
        params: parameters of the model. `None` means those that the object holds itself.
        eos_token_ids: the tokens that end a completion, as ids or texts. `None` means those that model and
            tokenizer name.

    Raises:
        ValueError: it is no such model, or something is missing. The message says what to do.
    """
    name = type(model).__name__
    if isinstance(model, Model):
        if tokenizer is not None or params is not None:
            raise ValueError("a Model has its tokenizer and params; leave these arguments out")
        return model
    if _is_of_torch(model):
        raise ValueError(
            f"the model is a {name} of PyTorch; give the name or directory that it was loaded from, or "
            "save it by save_pretrained and give that directory"
        )
    policy = policy_of(model)
    tokenizer = _checked_tokenizer(tokenizer, name)
    params = _own_params(model) if params is None else params
    if params is None:
        raise ValueError(f"the {name} comes without its parameters; give params=...")
    check_params(model, params)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    config = _config_of(model)
    generation_config: dict[str, Any] = {}
    known_config: dict[str, Any] = {}
    implementation = "own"
    max_positions = None
    if config is None:
        config = OwnConfig(_num_logits(policy, params, name))
    else:
        config = copy.deepcopy(config)
        known_config = config.to_diff_dict()
        generation_config = _generation_config_of(model)
        implementation = choose_implementation(config, "auto", source=name)
        max_positions = load_implementation(implementation).max_positions(config)
    source = getattr(config, "name_or_path", "") or name
    largest = largest_id(tokenizer, config.vocab_size, source)
    if largest + 1 < config.vocab_size:
        policy = _limited(policy, largest + 1)
    known = {"vocab_size": config.vocab_size, "source": source}
    if eos_token_ids is None:
        eos = find_eos(generation_config, known_config, tokenizer, **known)
    else:
        eos = choose_eos(eos_token_ids, tokenizer, **known)
    return Model(
        policy=policy,
        params=params,
        tokenizer=tokenizer,
        config=config,
        eos_ids=tuple(eos),
        eos_origins=tuple(eos.values()),
        max_positions=max_positions,
        source=source,
        generation_config=generation_config,
        implementation=implementation,
    )


def can_be_exported(model: Model) -> bool:
    """Says whether a model can be written as a directory of Hugging Face."""
    return not isinstance(model.config, OwnConfig)


def _is_of_torch(model: Any) -> bool:
    return any(
        f"{cls.__module__}.{cls.__name__}" == "torch.nn.modules.module.Module" for cls in type(model).__mro__
    )


def _checked_tokenizer(tokenizer: Any, name: str) -> Any:
    if isinstance(tokenizer, (str, os.PathLike)):
        return load_tokenizer(find_directory(str(tokenizer), revision=None), str(tokenizer))
    if is_fast(tokenizer):
        return tokenizer
    given = "" if tokenizer is None else f", not a {type(tokenizer).__name__}"
    raise ValueError(
        f"the {name} needs its tokenizer{given}: give tokenizer=AutoTokenizer.from_pretrained(...), a fast "
        "tokenizer, or the name or directory of one"
    )


def _own_params(model: Any) -> Params | None:
    """Returns the parameters that a model object holds, or None."""
    if isinstance(model, nnx.Module):
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return None if isinstance(model, Policy) else getattr(model, "params", None)


def _config_of(model: Any) -> Any:
    """Returns the configuration of a model of transformers, or None for any other model."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_diff_dict") and hasattr(config, "vocab_size") else None


def _generation_config_of(model: Any) -> dict[str, Any]:
    found = getattr(model, "generation_config", None)
    return {} if found is None else found.to_diff_dict()


def _num_logits(policy: Policy, params: Params, name: str) -> int:
    """Returns V, from tracing the policy, which also shows whether it takes the parameters."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)

    def logits(params, tokens, mask, positions):
        hidden, _ = policy.forward(params, tokens, mask, positions, None)
        return policy.unembed(params, hidden)

    try:
        return jax.eval_shape(logits, params, ids, mask, ids).shape[-1]
    except Exception as error:  # whatever somebody's model raises
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the {name} cannot be called with its params ({type(error).__name__}: {reason}); give the "
            "params that belong to it"
        ) from error
