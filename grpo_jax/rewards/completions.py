"""Reads the text of a completion, which is a string or a list of chat messages."""

from typing import Any

Completion = str | list[dict[str, Any]]


def completion_text(completion: Completion) -> str:
    """Returns the text of a completion: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
