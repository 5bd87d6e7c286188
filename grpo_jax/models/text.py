"""Text and token ids: prompts in, completions out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.models.chat_templates import Rendering, render
from grpo_jax.models.control_tokens import ControlTokens, control_tokens
from grpo_jax.models.endings import Ending


def encode(model: Rendering, prompts: Sequence[str | list[dict]]) -> list[list[int]]:
    """Turns prompts into token ids, without padding.

    A string is plain text, so a special token spelled in it (`<|endoftext|>`) stays text. The tokenizer's own
    default decides about a BOS. What it puts behind a text, such as an EOS, is left out. A list of messages
    goes through the tokenizer's chat template, followed by the start of the assistant's turn.

    Args:
        model: a loaded model.
        prompts: N strings or lists of messages (`{"role": ..., "content": ...}`).

    Returns:
        N lists of token ids, each with at least one.

    Raises:
        ValueError: a prompt is empty, messages have no chat template, or a text is no Unicode or can only be
            turned into a control token.
    """
    encoded = []
    for result in try_encode(model, prompts):
        if isinstance(result, ValueError):
            raise result
        encoded.append(result)
    return encoded


def try_encode(
    model: Rendering, prompts: Sequence[str | list[dict]], names: Sequence[str] | None = None
) -> list[list[int] | ValueError]:
    """Encodes as `encode` does, with an error in the place of a prompt that has one.

    Args:
        model: a loaded model.
        prompts: N strings or lists of messages.
        names: names of the prompts in messages. `None` means `prompt 0`, `prompt 1`, ...

    Returns:
        the token ids of each prompt, or an error that says in one line what is wrong with it.
    """
    if names is None:
        names = [f"prompt {i}" for i in range(len(prompts))]
    found: list[list[int] | ValueError] = [[]] * len(prompts)
    texts = {}
    rendered = {}
    control = control_tokens(model.tokenizer)
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            texts[i] = prompt
            continue
        try:
            rendered[i] = render(model, names[i], prompt, control)
        except ValueError as error:
            found[i] = error
    for i, result in _encode_texts(model.tokenizer, texts, names, control).items():
        found[i] = result
    for i, encoded in _tokenize(model.tokenizer, rendered, names, **_CHAT).items():
        found[i] = encoded if isinstance(encoded, ValueError) else encoded["input_ids"]
    for i, result in enumerate(found):
        if isinstance(result, list) and not result:
            found[i] = ValueError(
                f"{names[i]} ({prompts[i]!r:.80}) has no tokens; a completion needs one to start from"
            )
    return found


def decode(model: Ending, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Turns completions into texts without special tokens, truncated at the stop string that ended them.

    Args:
        model: a loaded model.
        tokens: token ids [B,T].
        mask: bool [B,T], True on the first tokens of each row. It gives their number, whatever the ids are.

    Returns:
        B strings.
    """
    lengths = np.asarray(mask).sum(axis=1)
    rows = [row[:length].tolist() for row, length in zip(np.asarray(tokens), lengths, strict=True)]
    texts = model.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts if model.stops is None else [model.stops.truncate(text) for text in texts]


_CHAT = {"add_special_tokens": False, "split_special_tokens": False}
_TEXT = {"split_special_tokens": True, "return_special_tokens_mask": True}


def _encode_texts(
    tokenizer: Any, texts: Mapping[int, str], names: Sequence[str], control: ControlTokens
) -> dict[int, list[int] | ValueError]:
    """Returns the ids of plain texts, without what the tokenizer puts behind them."""
    found: dict[int, list[int] | ValueError] = {}
    for i, encoded in _tokenize(tokenizer, texts, names, **_TEXT).items():
        if isinstance(encoded, ValueError):
            found[i] = encoded
            continue
        end = len(encoded["input_ids"]) - control.num_behind
        ids = encoded["input_ids"][:end]
        added = encoded["special_tokens_mask"][:end]
        # A word-level or unigram vocabulary holds the spelling of its control tokens as ordinary pieces.
        spelled = [t for t, is_added in zip(ids, added, strict=True) if not is_added and t in control.meaning]
        found[i] = ids
        if spelled:
            found[i] = ValueError(
                f"{names[i]} ({texts[i]!r:.80}) holds text which this tokenizer can only turn into the "
                f"control token {control.meaning[spelled[0]]!r}: take it out of the prompt"
            )
    return found


def _tokenize(
    tokenizer: Any, texts: Mapping[int, str], names: Sequence[str], **settings: bool
) -> dict[int, Mapping[str, list[int]] | ValueError]:
    """Calls the tokenizer once for all texts. It returns what it made of each, or what is wrong with it."""
    if not texts:
        return {}
    settings |= {"return_attention_mask": False, "verbose": False}
    try:
        batch = tokenizer(list(texts.values()), **settings)
    except (TypeError, ValueError, UnicodeError):
        if len(texts) > 1:  # one of them is at fault
            alone = (_tokenize(tokenizer, {i: text}, names, **settings) for i, text in texts.items())
            return {i: result for single in alone for i, result in single.items()}
        ((i, text),) = texts.items()
        reason = "the tokenizer cannot read it"
        if lone := [f"U+{ord(c):04X}" for c in text if "\ud800" <= c <= "\udfff"]:
            reason = f"{lone[0]} in it is a lone surrogate, half of a character, which is no Unicode"
        return {i: ValueError(f"{names[i]} ({text!r:.80}) is no text: {reason}")}
    return {i: {key: batch[key][row] for key in batch} for row, i in enumerate(texts)}
