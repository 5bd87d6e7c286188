"""Reads the prompt of a row, which is text or the messages of a chat, and checks it."""

import json
import re
from typing import Any

from grpo_jax.types import Prompt

_ANSWERS = ("assistant", "model", "gpt", "bot", "ai")  # names of the assistant's role
_INSTRUCTIONS = ("system", "developer")
_PLAIN = (str, bool, int, float, type(None))  # types in a message, besides lists and objects of these
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_prompt(value: Any) -> Prompt:
    """Returns the prompt that a row's column `prompt` holds.

    A chat is a list of messages. It may be given as text that holds such a list in JSON, as in a cell of a
    table. Keys of a message that are null are left out, because Parquet writes a key into every message of a
    file if one message has it. `content` may be a list of one part of text.

    Args:
        value: value of the column.

    Raises:
        ValueError: it is not a prompt. The message says what to do.
    """
    if isinstance(value, str):
        chat = _chat_in_text(value)
        if chat is None:
            check_text(value)
            return value
        value = chat
    if not isinstance(value, list):
        is_message = isinstance(value, dict) and {"role", "content", "from"} & value.keys()
        advice = "; put the one message into a list" if is_message else ""
        raise ValueError(
            f"`prompt` must be a string or a list of messages, not {type(value).__name__}{advice}"
        )
    if not value:
        raise ValueError("`prompt` is an empty list of messages")
    messages = [_read_message(message, f"prompt[{i}]") for i, message in enumerate(value)]
    roles = [message["role"].lower() for message in messages]
    if roles[-1] in _ANSWERS:
        raise ValueError(
            f"`prompt` ends with a turn of the {messages[-1]['role']}, so it holds an answer already; leave "
            "that turn out (its text may be a column of its own, such as `answer`)"
        )
    if set(roles) <= set(_INSTRUCTIONS):
        raise ValueError(
            f"`prompt` has only {messages[-1]['role']} messages, and nothing to answer; add the user's turn"
        )
    return messages


def check_text(text: str) -> None:
    """Raises ValueError unless a text can be a prompt, or a part of one."""
    if not text:
        raise ValueError("`prompt` is empty")
    _check_characters(text, "prompt")


def _check_characters(text: str, name: str) -> None:
    if found := _SURROGATE.search(text):
        raise ValueError(
            f"`{name}` holds half a character ({found[0]!r}, a lone surrogate, at position {found.start()}): "
            "the text was truncated inside it; truncate it elsewhere, or remove that half"
        )


def _chat_in_text(text: str) -> list[Any] | None:
    """Returns the messages that a text holds as JSON, or None for any other text."""
    if not re.match(r"\s*\[\s*\{", text) or not text.rstrip().endswith("]"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if re.match(r"\s*\[\s*\{\s*'(role|content|from|value)'", text):
            raise ValueError(
                "`prompt` is the text of a Python list of messages; write it as JSON (json.dumps)"
            ) from None
        return None
    is_chat = all(isinstance(message, dict) and {"role", "from"} & message.keys() for message in value)
    return value if is_chat else None


def _read_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"`{name}` must be an object with role and content, not {message!r:.80}")
    if "role" not in message and {"from", "value"} <= message.keys():
        raise ValueError(
            f"`{name}` has `from` and `value`, the form of ShareGPT; messages have `role` (system, user or "
            "assistant) and `content`"
        )
    content = message.get("content")
    if isinstance(content, list):
        content = _text_of_parts(content, name)
    read = _plain_value({**message, "content": content}, name)
    for key in ("role", "content"):
        if not isinstance(read.get(key), str):
            raise ValueError(f"`{name}` needs a string `{key}`, got {message.get(key)!r:.80}")
    return read


def _text_of_parts(parts: list[Any], name: str) -> str:
    """Returns the text of content that is a list of parts, the form that models for images use."""
    if len(parts) == 1 and isinstance(parts[0], dict) and isinstance(parts[0].get("text"), str):
        return parts[0]["text"]
    raise ValueError(
        f"`{name}` needs a string `content`, got a list of {len(parts)} parts; a list of one part of text is "
        "read, other parts need to be joined to one string (images are not supported)"
    )


def _plain_value(value: Any, name: str) -> Any:
    """Copies the content of a message without keys that are null.

    Raises:
        ValueError: a value has a type that JSON does not have, or a text has half a character.
    """
    if isinstance(value, dict):
        for key in value:
            _check_characters(str(key), name)
        named = {key: inner for key, inner in value.items() if inner is not None}
        return {key: _plain_value(inner, f"{name}.{key}") for key, inner in named.items()}
    if isinstance(value, list):
        return [_plain_value(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    if not isinstance(value, _PLAIN):
        raise ValueError(
            f"`{name}` is of type {type(value).__name__}; messages hold text, numbers, lists and objects: "
            "make it text, or leave it out"
        )
    if isinstance(value, str):
        _check_characters(value, name)
    return value
