"""Loads a Hugging Face causal language model as a `Policy`, its float32 parameters and its tokenizer.

`tokenizer_files` opens tokenizers and `text` encodes. Two implementations compute models: our own decoder
(`decoder_families`) and the Flax classes of transformers (`flax_families`). Parameters and files are the same
for both.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerFast

from grpo_jax.config.sampling import as_list, check_stop_strings
from grpo_jax.models import tensor_files
from grpo_jax.models.chat_templates import (
    ChatSettings,
    check_arguments,
    read_date,
    set_chat_template,
    start_of_run,
)
from grpo_jax.models.directories import check_no_adapter, find_directory, read_json
from grpo_jax.models.endings import choose_eos, find_eos, tokenizer_to_save
from grpo_jax.models.hf_config import HARMLESS_KEYS, read_config, torch_class_name
from grpo_jax.models.implementations import choose_implementation, load_implementation
from grpo_jax.models.interface import HFConfig
from grpo_jax.models.stops import Stops, make_stops
from grpo_jax.models.text import decode, encode
from grpo_jax.models.tokenizer_files import load_tokenizer
from grpo_jax.models.vocabulary import limit_vocabulary
from grpo_jax.policy.attention import check_attention
from grpo_jax.policy.decoder import REMAT
from grpo_jax.policy.decoding import pad_prompts
from grpo_jax.types import Params, Policy

__all__ = [
    "DTYPES",
    "Model",
    "decode",
    "encode",
    "load_model",
    "load_tokenizer",
    "pad_prompts",
    "save_model",
    "set_endings",
]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint.

    Args:
        policy: the model as pure functions.
        params: the parameters, in the pytree of `FlaxXxxForCausalLM`, float32.
        tokenizer: the fast tokenizer.
        config: the transformers configuration object.
        eos_ids: the tokens that end a completion, see `find_eos`.
        eos_origins: the places that name each of them.
        stops: the texts that end a completion. None means that no text does.
        max_positions: limit of prompt (padding included) + completion in tokens. None means no limit.
        source: the name that the model was loaded by.
        generation_config: the contents of generation_config.json, empty without such a file.
        implementation: the implementation that computes the model, an entry of IMPLEMENTATIONS.
        chat: the settings that the chat template is given besides the messages.
    """

    policy: Policy
    params: Params
    tokenizer: PreTrainedTokenizerFast
    config: HFConfig
    eos_ids: tuple[int, ...]
    eos_origins: tuple[str, ...]
    max_positions: int | None
    source: str
    generation_config: dict[str, Any]
    implementation: str
    stops: Stops | None = None
    chat: ChatSettings = field(default_factory=ChatSettings)


def load_model(
    hf_model_name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    implementation: str = "auto",
    remat: str = "none",
    attention: str = "shared",
    chat_template: str = "auto",
    eos_token_ids: Sequence[int | str] | None = None,
    stop: Sequence[str] | None = None,
    include_stop: bool = False,
    chat_template_arguments: Mapping[str, Any] | None = None,
    chat_template_date: str | None = None,
) -> Model:
    """Loads a model from a directory, the Hugging Face hub, or the package.

    Nothing is unpickled and no code from the checkpoint runs. Loading is strict. A missing, unexpected or
    wrongly shaped tensor is an error, and so is a configuration that would be computed wrongly.

    Args:
        hf_model_name: a directory, a hub id (`owner/name`), or `packaged:<name>`.
        revision: branch, tag or commit of a hub id.
        dtype: compute dtype, `float32` or `bfloat16`. Parameters are float32 either way.
        implementation: one of `decoder` (ours), `flax` (that of transformers), or `auto`, the first that is
            right.
        remat: what a layer's backward pass recomputes: `none`, `dots` or `full`, see `make_decoder`.
        attention: one of `shared`, or `cudnn` on NVIDIA in bfloat16, see `attend_flash`.
        chat_template: way in which messages become text: `auto` (the tokenizer's own template), `plain` (a
            line `role: content` each, then `assistant:`), or the path of a Jinja file. It is exported, too.
        eos_token_ids: the tokens that end a completion, as ids or texts. None means all that the model names.
        stop: texts that end a completion. None means those of generation_config.json, which seldom has any.
            If there are such texts, the model need not name an eos token.
        include_stop: whether texts keep the stop string that ended them, see `make_stops`.
        chat_template_arguments: variables of the chat template by name, such as `enable_thinking`.
        chat_template_date: date (and time) that a chat template may print, as ISO 8601. None means now.

    Returns:
        the model. Ids that its tokenizer does not have are never sampled, see `limit_vocabulary`.

    Raises:
        FileNotFoundError: the model or one of its files is missing.
        ValueError: something about the model is not supported.
    """
    _check_settings(dtype, remat, attention)
    directory = find_directory(hf_model_name, revision=revision)
    raw = _read_raw_config(directory, hf_model_name)
    config = read_config(raw, hf_model_name)
    implementation = choose_implementation(config, implementation, source=hf_model_name)
    tokenizer = load_tokenizer(directory, hf_model_name)
    set_chat_template(tokenizer, chat_template)
    check_arguments(tokenizer, chat_template_arguments or {}, hf_model_name)
    now = start_of_run() if chat_template_date is None else read_date(chat_template_date)
    largest = largest_id(tokenizer, config.vocab_size, hf_model_name)
    generation_config = read_json(directory / "generation_config.json") or {}
    known = {"vocab_size": config.vocab_size, "source": hf_model_name}
    if stop is None:
        stop = as_list(generation_config.get("stop_strings"))
        check_stop_strings(f"{hf_model_name}: stop_strings in generation_config.json", stop)
    if eos_token_ids is None:
        eos = find_eos(generation_config, raw, tokenizer, required=not stop, **known)
    else:
        eos = choose_eos(eos_token_ids, tokenizer, **known)
    stops = make_stops(stop, tokenizer, included=include_stop, **known)
    chosen = load_implementation(implementation)
    params = tensor_files.read_params(
        directory,
        chosen.param_shapes(config),
        embedding=chosen.embedding_path(config),
        buffers=chosen.buffers(config),
    )
    policy = chosen.make_policy(config, dtype=DTYPES[dtype], remat=remat, attention=attention)
    if largest + 1 < config.vocab_size:
        policy = limit_vocabulary(policy, largest + 1)
    return Model(
        policy=policy,
        params=params,
        tokenizer=tokenizer,
        config=config,
        eos_ids=tuple(eos),
        eos_origins=tuple(eos.values()),
        max_positions=chosen.max_positions(config),
        source=hf_model_name,
        generation_config=generation_config,
        implementation=implementation,
        stops=stops,
        chat=ChatSettings(arguments=dict(chat_template_arguments or {}), now=now),
    )


def _check_settings(dtype: str, remat: str, attention: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r}: choose one of {', '.join(REMAT)}")
    check_attention(attention, DTYPES[dtype])


def _read_raw_config(directory: Path, source: str) -> dict[str, Any]:
    raw = read_json(directory / "config.json")
    check_no_adapter(directory, source)
    if raw is None:
        raise FileNotFoundError(f"{source}: no config.json in {directory}")
    return raw


def largest_id(tokenizer: PreTrainedTokenizerFast, vocab_size: int, source: str) -> int:
    """Returns the largest id of a tokenizer, -1 if it is empty. Raises if the model does not have it."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens with ids up to {largest}, and the "
            f"model's vocabulary has {vocab_size}: resize the embedding or use the model's own tokenizer"
        )
    return largest


def set_endings(
    model: Model,
    *,
    eos_token_ids: Sequence[int | str] | None = None,
    stop: Sequence[str] | None = None,
    include_stop: bool = False,
) -> Model:
    """Returns a model whose completions end with something else.

    Args:
        model: a loaded model.
        eos_token_ids: ids or texts of tokens. None means that they stay.
        stop: texts that end a completion, empty for none. None means that they stay.
        include_stop: whether texts keep the stop string that ended them.

    Raises:
        ValueError: an entry is no token of the model.
    """
    known = {"vocab_size": model.config.vocab_size, "source": model.source}
    if eos_token_ids is not None:
        eos = choose_eos(eos_token_ids, model.tokenizer, **known)
        model = replace(model, eos_ids=tuple(eos), eos_origins=tuple(eos.values()))
    now = None if model.stops is None else (model.stops.strings, model.stops.included)
    if stop is not None and (tuple(stop), include_stop) != now:
        stops = make_stops(stop, model.tokenizer, included=include_stop, **known)
        model = replace(model, stops=stops)
    return model


def save_model(
    model: Model,
    params: Params,
    directory: str | os.PathLike,
    *,
    max_shard_size: int = tensor_files.MAX_SHARD_SIZE,
    dtype: str = "float32",
) -> None:
    """Writes a directory that PyTorch transformers and `load_model` open as it is.

    It writes what ends a completion as the model has it. The configurations do not name an eos token that the
    model does not use. Neither does the tokenizer, if another control token can take its place.

    Args:
        model: the model that configuration and tokenizer come from.
        params: parameters to save, float32, in the pytree of `model.params`.
        directory: directory, which is created if missing. Files of the same names and older weights are
            replaced.
        max_shard_size: largest size of a file in bytes, see `write_params`.
        dtype: dtype of the weights in the files, `float32`, `bfloat16` or `float16`.

    Raises:
        ValueError: `params` do not have the model's structure, shapes and dtype, or do not fit into float16.
    """

    def describe(tree):
        return {
            jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype))
            for path, leaf in jax.tree.leaves_with_path(tree)
        }

    wanted = describe(model.params)
    given = describe(params)
    if wrong := sorted(key for key in wanted | given if wanted.get(key) != given.get(key)):
        key = wrong[0]
        raise ValueError(
            f"params{key} is {given.get(key)}, the model's is {wanted.get(key)} ({len(wrong)} differ)"
        )

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensor_files.write_params(directory, params, max_shard_size=max_shard_size, dtype=dtype)
    config = model.config.to_diff_dict() | {
        "model_type": model.config.model_type,
        "architectures": [torch_class_name(model.config)],
        "torch_dtype": dtype,
    }
    eos_ids = list(model.eos_ids)
    generation_config = model.generation_config | ({"eos_token_id": eos_ids} if eos_ids else {})
    if "stop_strings" in generation_config:
        generation_config["stop_strings"] = list(model.stops.strings) if model.stops else None
    if not set(as_list(config.get("eos_token_id"))) <= set(eos_ids):
        # Without any it is null, because the default of the configuration's class may be no token of the
        # model.
        config["eos_token_id"] = eos_ids if len(eos_ids) > 1 else next(iter(eos_ids), None)
    for name, content in (("config.json", config), ("generation_config.json", generation_config)):
        # These are notes of the library to itself, and a second name of torch_dtype.
        for key in ("dtype", "_from_model_config", *HARMLESS_KEYS):
            content.pop(key, None)
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tokenizer_to_save(model).save_pretrained(directory)
