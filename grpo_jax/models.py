"""Loads a Hugging Face causal language model as a `Policy`, its float32 parameters and its tokenizer.

With `families.py`, the only file that imports transformers. Two implementations compute models: our own
decoder (`architectures`) and the Flax classes of transformers (`families`). Parameters and files are the
same for both.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grpo_jax import families, weights
from grpo_jax.attention import check_attention
from grpo_jax.decoder import REMAT
from grpo_jax.implementations import IMPLEMENTATIONS, choose_implementation
from grpo_jax.sources import find_directory, read_json
from grpo_jax.types import Params, Policy, Prompts
from grpo_jax.vocabulary import limit_vocabulary

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# A line per message, for models that were never taught to chat.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Model:
    """What a loaded checkpoint is.

    Args:
        policy: the model as pure functions.
        params: its parameters, the pytree of `FlaxXxxForCausalLM`, float32.
        tokenizer: the fast tokenizer.
        config: the transformers configuration object.
        eos_ids: the tokens that end a completion.
        max_positions: longest prompt (padding included) + completion in tokens; None: no limit.
        source: the name it was loaded by.
        generation_config: the contents of generation_config.json; empty without one.
        implementation: what computes it, a key of IMPLEMENTATIONS.
    """

    policy: Policy
    params: Params
    tokenizer: PreTrainedTokenizerFast
    config: Any
    eos_ids: tuple[int, ...]
    max_positions: int | None
    source: str
    generation_config: dict[str, Any]
    implementation: str


def load_model(
    hf_model_name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    implementation: str = "auto",
    remat: str = "none",
    attention: str = "shared",
    chat_template: str = "auto",
) -> Model:
    """Loads a model from a directory, the Hugging Face hub, or the package.

    Nothing is unpickled and no code from the checkpoint runs. Loading is strict: a missing, unexpected or
    wrongly shaped tensor is an error, as is a configuration that would be computed wrongly.

    Args:
        hf_model_name: a directory, a hub id (`owner/name`), or `packaged:<name>`.
        revision: branch, tag or commit of a hub id.
        dtype: compute dtype, `float32` or `bfloat16`; parameters are float32 either way.
        implementation: `decoder` (ours), `flax` (that of transformers), or `auto`, the first that is right.
        remat: what a layer's backward pass computes again, `none`, `dots` or `full`; see `make_decoder`.
        attention: `shared`, or `cudnn` on NVIDIA in bfloat16; see `attend_flash`.
        chat_template: how messages become text: `auto` (the tokenizer's own template), `plain` (a line
            `role: content` each, then `assistant:`), or the path of a Jinja file. It is exported, too.
    Returns: the model. Ids that its tokenizer does not have are never sampled, see `limit_vocabulary`.
    Raises: FileNotFoundError for what is not there, ValueError for what is not supported.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r}: choose one of {', '.join(REMAT)}")
    check_attention(attention, DTYPES[dtype])
    directory = find_directory(hf_model_name, revision=revision)
    raw = read_json(directory / "config.json")
    if raw is None:
        raise FileNotFoundError(f"{hf_model_name}: no config.json in {directory}")
    config = families.read_config(raw, hf_model_name)
    implementation = choose_implementation(config, implementation, source=hf_model_name)
    tokenizer = load_tokenizer(directory, hf_model_name)
    _set_chat_template(tokenizer, chat_template)
    if (largest := max(tokenizer.get_vocab().values(), default=-1)) >= config.vocab_size:
        raise ValueError(
            f"{hf_model_name}: the tokenizer has {len(tokenizer)} tokens with ids up to {largest}, the "
            f"model's vocabulary {config.vocab_size}: resize the embedding or use the model's own tokenizer"
        )
    generation_config = read_json(directory / "generation_config.json") or {}
    eos_ids = _eos_ids(generation_config, config, tokenizer, hf_model_name)
    if min(eos_ids) > largest:
        raise ValueError(
            f"{hf_model_name}: eos_token_id {min(eos_ids)} is beyond the tokenizer, whose ids go up to "
            f"{largest}: no completion could end"
        )

    chosen = IMPLEMENTATIONS[implementation]
    params = weights.read_params(
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
        eos_ids=eos_ids,
        max_positions=chosen.max_positions(config),
        source=hf_model_name,
        generation_config=generation_config,
        implementation=implementation,
    )


def save_model(
    model: Model,
    params: Params,
    directory: str | os.PathLike,
    *,
    max_shard_size: int = weights.MAX_SHARD_SIZE,
) -> None:
    """Writes a directory that PyTorch transformers, and `load_model`, open as it is.

    Args:
        model: where configuration and tokenizer come from.
        params: parameters to save, float32, the pytree of `model.params`.
        directory: made if it does not exist; files of the same names are replaced, as are older weights.
        max_shard_size: bytes, see `write_params`.
    Raises: ValueError when `params` are not of the model's structure, shapes and dtype.
    """

    def describe(tree):
        return {
            jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype))
            for path, leaf in jax.tree.leaves_with_path(tree)
        }

    wanted, given = describe(model.params), describe(params)
    if wrong := sorted(key for key in wanted | given if wanted.get(key) != given.get(key)):
        key = wrong[0]
        raise ValueError(
            f"params{key} is {given.get(key)}, the model's is {wanted.get(key)} ({len(wrong)} differ)"
        )

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights.write_params(directory, params, max_shard_size=max_shard_size)
    config = model.config.to_diff_dict() | {
        "model_type": model.config.model_type,
        "architectures": [families.torch_class_name(model.config)],
        "torch_dtype": "float32",
    }
    generation_config = model.generation_config | {"eos_token_id": list(model.eos_ids)}
    for name, content in (("config.json", config), ("generation_config.json", generation_config)):
        # Notes of the library to itself, and a second name of torch_dtype.
        for key in ("dtype", "_from_model_config", *families.HARMLESS_KEYS):
            content.pop(key, None)
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    model.tokenizer.save_pretrained(directory)


def encode(model: Model, prompts: Sequence[str | list[dict]]) -> list[list[int]]:
    """Turns prompts into token ids, without padding.

    A string is plain text: a special token spelled in it (`<|endoftext|>`) stays text. The tokenizer's own
    default decides about a BOS. A list of messages goes through the tokenizer's chat template, followed by
    the start of the assistant's turn.

    Args:
        model: a loaded model.
        prompts: N strings or lists of messages (`{"role": ..., "content": ...}`).
    Returns: N lists of token ids, each with at least one.
    Raises: ValueError for an empty prompt, messages without a chat template, or text that the tokenizer
        can only turn into a control token.
    """
    texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
    chats = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    sequences: dict[int, list[int]] = {}
    if texts:
        sequences |= zip(texts, _encode_texts(model, texts, [prompts[i] for i in texts]), strict=True)
    if chats:
        rendered = [_render(model, i, prompts[i]) for i in chats]
        batch = model.tokenizer(rendered, add_special_tokens=False, split_special_tokens=False, verbose=False)
        sequences |= zip(chats, batch["input_ids"], strict=True)
    for i in range(len(prompts)):
        if not sequences[i]:
            raise ValueError(
                f"prompt {i} ({prompts[i]!r:.80}) has no tokens; a completion needs one to start from"
            )
    return [sequences[i] for i in range(len(prompts))]


def pad_prompts(sequences: Sequence[Sequence[int]], length: int) -> Prompts:
    """Left-pads token ids to one length.

    Args:
        sequences: N lists of token ids.
        length: S, the padded length.
    Returns: prompts [N,S], NumPy arrays; pads are id 0 under a False mask.
    Raises: ValueError for a sequence longer than `length`.
    """
    tokens = np.zeros((len(sequences), length), np.int32)
    mask = np.zeros((len(sequences), length), bool)
    for i, sequence in enumerate(sequences):
        if len(sequence) > length:
            raise ValueError(f"prompt {i} has {len(sequence)} tokens, over the length {length}")
        if sequence:
            tokens[i, -len(sequence) :] = sequence
            mask[i, -len(sequence) :] = True
    return Prompts(tokens=tokens, mask=mask)


def decode(model: Model, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Turns completions into text, special tokens left out.

    Args:
        model: a loaded model.
        tokens: token ids [B,T].
        mask: bool [B,T], True on the first tokens of each row; a length, whatever the ids.
    Returns: B strings.
    """
    lengths = np.asarray(mask).sum(axis=1)
    rows = [row[:length].tolist() for row, length in zip(np.asarray(tokens), lengths, strict=True)]
    return model.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# Text


def _encode_texts(model: Model, indices: list[int], texts: list[str]) -> list[list[int]]:
    tokenizer = model.tokenizer
    batch = tokenizer(
        texts,
        split_special_tokens=True,
        return_attention_mask=False,
        return_special_tokens_mask=True,
        verbose=False,
    )
    # A word-level or unigram vocabulary holds the spelling of its control tokens as an ordinary piece.
    control = _control_tokens(tokenizer)
    for i, text, ids, added in zip(
        indices, texts, batch["input_ids"], batch["special_tokens_mask"], strict=True
    ):
        for token, is_added in zip(ids, added, strict=True):
            if not is_added and token in control:
                raise ValueError(
                    f"prompt {i} ({text!r:.80}) holds text which this tokenizer can only turn into the "
                    f"control token {control[token]!r}: take it out of the prompt"
                )
    return batch["input_ids"]


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Returns the special tokens that mean something to the model, by id; a mere `unk` does not."""
    control = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    unknown = roles.pop("unk_token", None)
    return {i: token for i, token in control.items() if token != unknown or token in roles.values()}


def _render(model: Model, i: int, messages: list[dict]) -> str:
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError(
            f"prompt {i} ({messages!r:.80}) is neither a string nor a list of messages with a role"
        )
    if model.tokenizer.chat_template is None:
        raise ValueError(
            f"prompt {i} is a list of messages, but the tokenizer of {model.source} has no chat template: "
            "give strings, a model tuned for chat, or set model.chat_template to plain or to a Jinja file"
        )
    spelled = json.dumps(messages, ensure_ascii=False)
    for token in (t.content for t in model.tokenizer.added_tokens_decoder.values() if t.special):
        if token in spelled:
            # The template mixes text and control tokens in one string: there it would become control.
            raise ValueError(f"prompt {i}: a message spells the control token {token!r}: take it out")
    try:
        return model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
        raise ValueError(f"prompt {i}: the chat template refuses these messages: {error}") from None


def load_tokenizer(directory: Path, source: str) -> PreTrainedTokenizerFast:
    """Loads the fast tokenizer of a directory; `source` is what messages call it."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{source}: no tokenizer in {directory} (tokenizer.json or vocabulary files)")
    if "auto_map" in (read_json(directory / "tokenizer_config.json") or {}):
        raise ValueError(
            f"{source}: tokenizer_config.json has `auto_map`, code from the author; it is never run"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the many ways in which transformers says no
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{source}: the tokenizer does not load: {type(error).__name__}: {reason}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{source}: {type(tokenizer).__name__} is a slow tokenizer; a tokenizer.json is needed"
        )
    return tokenizer


def _set_chat_template(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> None:
    if chat_template == "auto":
        return
    if chat_template != "plain":
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"model.chat_template: {chat_template!r} is no file; give auto, plain, or the path of a "
                "Jinja file"
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        return
    starts_with_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + PLAIN_TEMPLATE


def _eos_ids(generation_config: dict, config: Any, tokenizer: Any, source: str) -> tuple[int, ...]:
    for found in (generation_config.get("eos_token_id"), config.eos_token_id, tokenizer.eos_token_id):
        if found is None or found == []:
            continue
        ids = tuple(dict.fromkeys(found if isinstance(found, list) else [found]))
        if wrong := [i for i in ids if not isinstance(i, int) or not 0 <= i < config.vocab_size]:
            raise ValueError(
                f"{source}: eos_token_id {wrong[0]!r} is not in the vocabulary of {config.vocab_size}"
            )
        return ids
    raise ValueError(
        f"{source}: no end-of-sequence token: neither generation_config.json, config.json nor the tokenizer "
        "has an eos_token_id"
    )
