"""Text and token ids: prompts in, completions out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.chat_templates import Rendering, render
from grpo_jax.endings import Ending
from grpo_jax.types import Prompts


def encode(model: Rendering, prompts: Sequence[str | list[dict]]) -> list[list[int]]:
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
        rendered = [render(model, i, prompts[i]) for i in chats]
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


def decode(model: Ending, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Turns completions into text, special tokens left out, cut at the stop string that ended it.

    Args:
        model: a loaded model.
        tokens: token ids [B,T].
        mask: bool [B,T], True on the first tokens of each row; a length, whatever the ids.
    Returns: B strings.
    """
    lengths = np.asarray(mask).sum(axis=1)
    rows = [row[:length].tolist() for row, length in zip(np.asarray(tokens), lengths, strict=True)]
    texts = model.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts if model.stops is None else [model.stops.cut(text) for text in texts]


def _encode_texts(model: Rendering, indices: list[int], texts: list[str]) -> list[list[int]]:
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


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Returns the special tokens that mean something to the model, by id; a mere `unk` does not."""
    control = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    unknown = roles.pop("unk_token", None)
    return {i: token for i, token in control.items() if token != unknown or token in roles.values()}
