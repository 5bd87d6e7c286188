"""Turns chat messages into the text that the model sees, by the chat template of a tokenizer.

A prompt is a function of the data and of the `ChatSettings` of a run. A template that asks for the time gets
that of the settings, never that of the clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grpo_jax.models.control_tokens import ControlTokens, find_control_token
from grpo_jax.spelling import nearest

# It writes a line per message, for models that were never taught to chat.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_CLOCK = "strftime_now"  # the function by which templates ask for the time
_GIVEN = ("messages", "add_generation_prompt", "raise_exception", _CLOCK)  # what every template has


def start_of_run() -> datetime:
    """Returns the present time, in whole seconds."""
    return datetime.now().replace(microsecond=0)


@dataclass(frozen=True)
class ChatSettings:
    """What a chat template is given besides the messages.

    Args:
        arguments: variables of the template by name, such as `enable_thinking`.
        now: the time that the template may print.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    now: datetime = field(default_factory=start_of_run)


class Rendering(Protocol):
    """What rendering needs to know of a model."""

    @property
    def tokenizer(self) -> Any:
        """The fast tokenizer, with its chat template."""

    @property
    def source(self) -> str:
        """The name of the model in messages."""

    @property
    def chat(self) -> ChatSettings:
        """The settings that the chat template is given."""


def read_date(text: str) -> datetime:
    """Reads the value of `model.chat_template_date`.

    Raises:
        ValueError: the text is no date.
    """
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"model.chat_template_date: {text!r} is no date; write it as 2026-11-28 or 2026-11-28T09:30:00"
        ) from None


def set_chat_template(tokenizer: Any, chat_template: str) -> None:
    """Gives a tokenizer the chat template that a config names: `auto`, `plain`, or the path of a Jinja file.

    Raises:
        FileNotFoundError: the path is no file.
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
    starts_with_bos = tokenizer("0")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + PLAIN_TEMPLATE


def check_arguments(tokenizer: Any, arguments: Mapping[str, Any], source: str) -> None:
    """Checks that the chat template uses every argument that it is given.

    Args:
        tokenizer: the fast tokenizer.
        arguments: variables of the template by name.
        source: name of the model in messages.

    Raises:
        ValueError: there is no template, or it does not use an argument.
    """
    if not arguments:
        return
    if tokenizer.chat_template is None:
        raise ValueError(
            f"model.chat_template_arguments: the tokenizer of {source} has no chat template to give them to"
        )
    known = sorted(
        _variables(tokenizer, ChatSettings(arguments=arguments)) - {*_GIVEN, *tokenizer.special_tokens_map}
    )
    for name in arguments:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(
                f"model.chat_template_arguments: the chat template of {source} does not use {name!r}; "
                f"{hint}it uses {', '.join(known) or 'none'}"
            )


def asks_for_time(tokenizer: Any, settings: ChatSettings) -> bool:
    """Says whether the text of a chat may depend on the time of the settings."""
    return tokenizer.chat_template is not None and _CLOCK in _variables(tokenizer, settings)


def draws_at_random(tokenizer: Any, settings: ChatSettings) -> bool:
    """Says whether the chat template uses the filter `random` or the function `lipsum` of Jinja."""
    tree = None if tokenizer.chat_template is None else _parsed(tokenizer, settings)
    if tree is None:
        return False
    filters = {node.name for node in tree.find_all(jinja2.nodes.Filter)}
    return "random" in filters or "lipsum" in {node.name for node in tree.find_all(jinja2.nodes.Name)}


def render(model: Rendering, name: str, messages: list[dict], control: ControlTokens) -> str:
    """Returns the text of messages, followed by the start of the assistant's turn.

    Args:
        model: a loaded model.
        name: name of the prompt in messages.
        messages: dicts with `role` and `content`.
        control: the control tokens of the model's tokenizer.

    Raises:
        ValueError: there is no chat template, it fails, or a message spells a control token.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError(f"{name} ({messages!r:.80}) is neither a string nor a list of messages with a role")
    if model.tokenizer.chat_template is None:
        raise ValueError(
            f"{name} is a list of messages, but the tokenizer of {model.source} has no chat template: "
            "give strings, a model tuned for chat, or set model.chat_template to plain or to a Jinja file"
        )
    if (token := find_control_token(control, messages)) is not None:
        # The template mixes text and control tokens in one string, where the text would become control.
        raise ValueError(f"{name}: a message spells the control token {token!r}: take it out")
    try:
        return apply_template(model.tokenizer, messages, model.chat)
    except Exception as error:  # whatever a template raises
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: the chat template refuses these messages: {reason}") from None


def apply_template(
    tokenizer: Any, messages: list[dict], settings: ChatSettings, *, add_generation_prompt: bool = True
) -> str:
    """Returns the text that a tokenizer's chat template makes of messages.

    Args:
        tokenizer: the fast tokenizer.
        messages: dicts with `role` and `content`.
        settings: what the template is given besides the messages.
        add_generation_prompt: whether the start of the assistant's turn follows.
    """
    given = {_CLOCK: settings.now.strftime, **settings.arguments}
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **given
    )


class _GenerationBlock(jinja2.ext.Extension):
    """Reads the block `{% generation %}`, which transformers has in its templates, as its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Returns the nodes of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
)


def _parsed(tokenizer: Any, settings: ChatSettings) -> Any:
    """Returns the syntax tree of the chat template, or `None` if it is broken, which rendering will say."""
    try:
        source = tokenizer.get_chat_template(None, settings.arguments.get("tools"))
        return _ENVIRONMENT.parse(source)
    except (ValueError, jinja2.TemplateSyntaxError):
        return None


def _variables(tokenizer: Any, settings: ChatSettings) -> set[str]:
    """Returns the names that the chat template looks up."""
    tree = _parsed(tokenizer, settings)
    return set() if tree is None else jinja2.meta.find_undeclared_variables(tree)
