"""Handles prompts above the limit of tokens: they are an error, dropped, or truncated at the left."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grpo_jax.data.bad_rows import settle
from grpo_jax.data.encoded_examples import encode_examples
from grpo_jax.models.loading import Model, encode
from grpo_jax.types import Example


@dataclass(frozen=True)
class Fitted:
    """Examples within the limit.

    Args:
        examples: examples that are left, with the tokens of their prompts.
        lengths: token counts that occur among their prompts.
        num_dropped: number of examples that were dropped.
        num_truncated: number of examples whose prompts were truncated.
        note: a line about bad rows that were left out, or None if there were none.
    """

    examples: Sequence[Example]
    lengths: frozenset[int]
    num_dropped: int = 0
    num_truncated: int = 0
    note: str | None = None


def prompt_limit(model: Model, max_prompt_length: int | None, max_new_tokens: int) -> int | None:
    """Returns the largest number of prompt tokens, or None if nothing limits it.

    Raises:
        ValueError: prompt and completion do not fit the model's positions.
    """
    limit = max_prompt_length
    if model.max_positions is None:
        return limit
    available = model.max_positions - max_new_tokens
    if available < (limit or 1):
        prompt = "a prompt of 1 token"
        advice = "lower sampling.max_new_tokens"
        if limit is not None:
            prompt = f"data.max_prompt_length {limit}"
            advice = "lower one of them"
        raise ValueError(
            f"{prompt} + sampling.max_new_tokens {max_new_tokens} exceed the {model.max_positions} positions "
            f"of {model.source}; {advice}"
        )
    return available if limit is None else limit


def fit_prompts(
    examples: Sequence[Example],
    model: Model,
    limit: int | None,
    over_length: str,
    what: str,
    *,
    on_bad_row: str = "error",
) -> Fitted:
    """Encodes every prompt and makes it fit the limit.

    Args:
        examples: the examples. There may be none.
        model: model whose tokenizer counts the tokens.
        limit: largest number of tokens. None means no limit.
        over_length: `error`, `drop` or `truncate_left`.
        what: `training` or `evaluation`, for messages.
        on_bad_row: `error`, or `drop` to leave out prompts that cannot be encoded.

    Raises:
        ValueError: a prompt has no tokens or cannot be encoded, a prompt is above the limit with `error`, or
            it cannot be truncated to the limit.
    """
    encoded, bad = encode_examples(examples, model, what)
    note = settle(bad, len(examples), on_bad_row=on_bad_row, what=what)
    lengths = encoded.lengths
    over = [] if limit is None else np.flatnonzero(lengths > limit).tolist()
    if not over:
        return Fitted(encoded, frozenset(lengths.tolist()), note=note)
    if over_length == "error":
        first = encoded[over[0]].place or f"number {over[0]}"
        raise ValueError(
            f"{len(over)} of {len(lengths)} {what} prompts have more than {limit} tokens (the first is "
            f"{first} with {lengths[over[0]]}); shorten them, raise data.max_prompt_length if the model's "
            "positions allow, or set data.over_length: drop (or truncate_left)"
        )
    if over_length == "drop":
        kept = encoded.chosen(np.flatnonzero(lengths <= limit))
        return Fitted(kept, frozenset(kept.lengths.tolist()), num_dropped=len(over), note=note)
    fitted = list(encoded)
    for i in over:
        prompt = fitted[i].prompt
        truncate = _truncate_text if isinstance(prompt, str) else _truncate_chat
        assert limit is not None  # none is longer than no limit
        shorter = truncate(model, prompt, limit)
        if shorter is None:
            raise ValueError(
                f"{fitted[i].place or f'{what} prompt {i}'} has {lengths[i]} tokens and cannot be truncated "
                f"at the left to {limit}: the chat template alone is longer than that; raise "
                "data.max_prompt_length or set data.over_length: drop"
            )
        fitted[i] = replace(fitted[i], prompt=shorter, tokens=tuple(encode(model, [shorter])[0]))
    return Fitted(
        fitted, frozenset(len(example.tokens) for example in fitted), num_truncated=len(over), note=note
    )


def _length(model: Model, prompt: str | list[dict[str, str]]) -> int:
    return len(encode(model, [prompt])[0])


def _truncate_text(model: Model, text: str, limit: int) -> str | None:
    """Returns the longest end of a text that fits and begins with a whole token, or None."""
    return _first_fitting(model, (text[start:] for start in _token_starts(model, text)[-limit:]), limit)


def _truncate_chat(model: Model, messages: list[dict[str, str]], limit: int) -> list[dict[str, str]] | None:
    """Removes the oldest turns before a turn of the user. If needed, the last message loses its beginning.

    A leading system message is kept.
    """
    head = messages[:1] if messages[0]["role"] == "system" else []
    rest = messages[len(head) :]
    if not rest:
        return None
    starts = [i for i, message in enumerate(rest) if i and message["role"] == "user"]
    for turns in (rest[start:] for start in starts):
        if _length(model, head + turns) <= limit:
            return head + turns
    last = rest[starts[-1] :] if starts else rest
    *before, final = last
    content = final["content"]
    truncated = (content[start:] for start in _token_starts(model, content)[-limit:])
    return _first_fitting(model, ([*head, *before, {**final, "content": text}] for text in truncated), limit)


def _token_starts(model: Model, text: str) -> list[int]:
    """Returns the position in the text at which each of its tokens begins."""
    encoded = model.tokenizer(
        text, return_offsets_mapping=True, split_special_tokens=True, add_special_tokens=False, verbose=False
    )
    return [start for start, end in encoded["offset_mapping"] if end > start]


def _first_fitting(model: Model, candidates: Iterable[Any], limit: int) -> Any:
    """Returns the first prompt that fits. Truncated text may have other tokens, so each prompt is encoded."""
    return next((prompt for prompt in candidates if _length(model, prompt) <= limit), None)
