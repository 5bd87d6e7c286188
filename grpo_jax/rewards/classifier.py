"""Computes reward models, which are Hugging Face sequence classifiers, by our decoder.

Such a checkpoint (`LlamaForSequenceClassification`, ...) is a causal language model with a `score` layer
[num_labels, D] in place of the head. As in PyTorch, its logits are read at the last token of the text that
is not the padding token.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from grpo_jax.models import decoder_families, tensor_files
from grpo_jax.models.chat_templates import ChatSettings, apply_template
from grpo_jax.models.directories import find_directory, read_json
from grpo_jax.models.hf_config import read_config
from grpo_jax.models.loading import DTYPES, load_tokenizer
from grpo_jax.policy.decoding import positions_from_mask
from grpo_jax.policy.shapes import bucket_length
from grpo_jax.types import Params, Policy

_KIND = "ForSequenceClassification"
Messages = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A loaded sequence classifier.

    Args:
        policy: the decoder below the score layer.
        params: float32 parameters of the decoder and the score layer.
        tokenizer: the fast tokenizer.
        labels: names of the logits.
        pad_id: token that the model ignores at the end of a text, or None.
        max_positions: number of tokens of the longest text.
        source: name by which it was loaded.
        dtype: compute dtype.
        chat: arguments of the chat template. A date that it prints is the date of the loading.
    """

    policy: Policy
    params: Params
    tokenizer: Any
    labels: tuple[str, ...]
    pad_id: int | None
    max_positions: int
    source: str
    dtype: Any
    chat: ChatSettings = field(default_factory=ChatSettings)


@functools.lru_cache(maxsize=4)  # there is one copy per run, however many rewards and calls use it
def load_classifier(model: str, dtype: str = "float32") -> Classifier:
    """Loads a sequence classifier, as strictly as `load_model` loads a language model.

    Args:
        model: a directory, a hub id (`owner/name`), or `packaged:<name>`.
        dtype: compute dtype, `float32` or `bfloat16`.

    Raises:
        FileNotFoundError: a file is missing. ValueError: the model is not such a classifier, or would be
            computed wrongly.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    directory = find_directory(model, revision=None)
    raw = read_json(directory / "config.json")
    if raw is None:
        raise FileNotFoundError(f"{model}: no config.json in {directory}")
    names = raw.get("architectures") or ["a model without `architectures`"]
    if not str(names[0]).endswith(_KIND):
        raise ValueError(f"{model} is {names[0]}; a reward model is a ...{_KIND}")
    config = read_config(raw, model)
    if reasons := [*decoder_families.problems(config)]:
        raise ValueError(f"{model}: the decoder cannot compute it: {'; '.join(reasons)}")
    config.tie_word_embeddings = True  # there is no language head, so nothing to load for it
    shapes = decoder_families.param_shapes(config)
    width = decoder_families.architecture_of(config).width
    score = {"kernel": jax.ShapeDtypeStruct((width, config.num_labels), jnp.float32)}
    return Classifier(
        policy=decoder_families.make_policy(config, dtype=DTYPES[dtype]),
        params=tensor_files.read_params(
            directory,
            {**shapes, "score": score},
            embedding=decoder_families.embedding_path(config),
            buffers=decoder_families.buffers(config),
        ),
        tokenizer=load_tokenizer(directory, model),
        labels=tuple(str(config.id2label[i]) for i in range(config.num_labels)),
        pad_id=config.pad_token_id,
        max_positions=decoder_families.max_positions(config),
        source=model,
        dtype=DTYPES[dtype],
    )


def judge_texts(
    classifier: Classifier,
    prompts: Sequence[str | Messages],
    completions: Sequence[str | Messages],
    *,
    label: int | str = 0,
    batch_size: int = 16,
    max_length: int | None = None,
) -> list[float | None]:
    """Returns the classifier's logit of each prompt with its completion.

    Args:
        classifier: the classifier.
        prompts: B strings or lists of messages.
        completions: B strings, or lists of messages under a prompt of messages.
        label: index or name of the logit.
        batch_size: number of texts that are computed at once.
        max_length: largest number of tokens, at most the model's positions. None means these.

    Returns:
        B logits, where None marks a text that is longer or has no tokens.
    """
    index = _label_index(classifier, label)
    limit = classifier.max_positions if max_length is None else max_length
    if batch_size < 1 or not 1 <= limit <= classifier.max_positions:
        raise ValueError(
            f"batch_size={batch_size}, max_length={max_length}: at least 1, and at most the model's "
            f"{classifier.max_positions} positions"
        )
    sequences = encode_texts(classifier, prompts, completions)
    scores: list[float | None] = [None] * len(sequences)
    fitting = [i for i, tokens in enumerate(sequences) if 0 < len(tokens) <= limit]
    fitting.sort(key=lambda i: len(sequences[i]))  # texts of one batch are padded to one length
    for start in range(0, len(fitting), batch_size):
        rows = fitting[start : start + batch_size]
        logits = classify(classifier, [sequences[i] for i in rows], batch_size=batch_size)[:, index]
        for i, value in zip(rows, logits, strict=True):
            scores[i] = float(value)
    return scores


def _label_index(classifier: Classifier, label: int | str) -> int:
    labels = classifier.labels
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return label
    raise ValueError(f"label={label!r}: {classifier.source} has {', '.join(labels)} (0 to {len(labels) - 1})")


def encode_texts(
    classifier: Classifier, prompts: Sequence[str | Messages], completions: Sequence[str | Messages]
) -> list[list[int]]:
    """Converts prompts with their completions to token ids. As in TRL, no special tokens are added.

    Raises:
        ValueError: the prompts are messages, but the tokenizer has no chat template.
    """
    tokenizer = classifier.tokenizer
    sequences = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            text = prompt + completion
            plain = True  # a special token that is spelled in it stays text
        else:
            if tokenizer.chat_template is None:
                raise ValueError(
                    f"prompts are messages, but the tokenizer of {classifier.source} has no chat template"
                )
            text = apply_template(
                tokenizer, [*prompt, *completion], classifier.chat, add_generation_prompt=False
            )
            plain = False
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)
        sequences.append(encoded["input_ids"])
    return sequences


def classify(classifier: Classifier, sequences: Sequence[Sequence[int]], *, batch_size: int) -> np.ndarray:
    """Computes the logits of at most batch_size texts, at once.

    Args:
        classifier: the classifier.
        sequences: token ids of each text, at least one.
        batch_size: number of rows that are computed, whatever the number of texts, so that there is one
            compilation per length.

    Returns:
        [number of texts, labels] float32.
    """
    length = bucket_length(max(16, *map(len, sequences)), classifier.max_positions)
    tokens = np.zeros((batch_size, length), np.int32)
    mask = np.zeros((batch_size, length), bool)
    last = np.zeros(batch_size, np.int32)
    mask[:, 0] = True  # so that rows of padding attend to something
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = True
        counts = [i for i, token in enumerate(sequence) if token != classifier.pad_id]
        last[row] = counts[-1] if counts else 0
    logits = _forward(classifier.policy, classifier.params, tokens, mask, last, dtype=classifier.dtype)
    return np.asarray(logits)[: len(sequences)]


@functools.partial(jax.jit, static_argnames="dtype")
def _forward(policy: Policy, params: Params, tokens: Array, mask: Array, last: Array, *, dtype: Any) -> Array:
    hidden, _ = policy.forward(params, tokens, mask, positions_from_mask(mask))
    pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    kernel = params["score"]["kernel"].astype(dtype)
    return jnp.matmul(pooled.astype(dtype), kernel, preferred_element_type=jnp.float32)
