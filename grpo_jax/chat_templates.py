"""From chat messages to the text that the model sees: the chat template of a tokenizer."""

import json
from pathlib import Path
from typing import Any, Protocol

# A line per message, for models that were never taught to chat.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Rendering(Protocol):
    """What rendering needs to know of a model."""

    @property
    def tokenizer(self) -> Any:
        """The fast tokenizer, with its chat template."""

    @property
    def source(self) -> str:
        """The name that messages call the model."""


def set_chat_template(tokenizer: Any, chat_template: str) -> None:
    """Gives a tokenizer the chat template that a config names: `auto`, `plain`, or the path of a Jinja file.

    Raises:
        FileNotFoundError: it is no file.
    """
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


def render(model: Rendering, i: int, messages: list[dict]) -> str:
    """Returns the text of messages, followed by the start of the assistant's turn.

    Args:
        model: a loaded model.
        i: index of the prompt, for messages.
        messages: dicts with `role` and `content`.

    Raises:
        ValueError: there is no chat template, it fails, or a message spells a control token.
    """
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
