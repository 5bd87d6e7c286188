"""What a user should see before the first step: the first prompt as tokens, and oddities of the prompts.

Nothing here is an error, because each of these forms may be intended. But a user who does not intend it
trains on something else than they think.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from grpo_jax.data.encoded_examples import tokens_of
from grpo_jax.models.chat_templates import (
    PLAIN_TEMPLATE,
    ChatSettings,
    Rendering,
    apply_template,
    draws_at_random,
)
from grpo_jax.models.control_tokens import control_tokens, spelled_token
from grpo_jax.trackers.console import printable
from grpo_jax.types import Example

_LOOKED_AT = 1000  # prompts, from the first on
_WIDTH = 56  # characters of a line of tokens
_LINES = 3  # shown of each end of a long prompt
_SEPARATOR = "·"
_THINKING = ("think", "thinking", "thought", "thoughts", "reasoning", "reason", "analysis", "scratchpad")
# Two times that differ in every part that a template may print.
_TIMES = (datetime(2001, 9, 5, 1, 2, 3), datetime(2033, 11, 27, 23, 58, 59))


def show_first_prompt(model: Rendering, examples: Sequence[Example]) -> list[str]:
    """Returns the first prompt as tokens, in lines of about 60 characters.

    A control token is one piece between two dots, but its spelling in a plain text is several pieces. A long
    prompt is shortened in the middle.

    Args:
        model: a loaded model.
        examples: the prompts, at least one.
    """
    example = examples[0]
    (ids,) = tokens_of(model, [example])
    place = f" ({example.place})" if example.place else ""
    lines = _fill(_pieces(model.tokenizer, ids))
    if len(lines) > 2 * _LINES + 1:
        hidden = sum(len(line) for line in lines[_LINES:-_LINES])
        lines = [*lines[:_LINES], [f"... {hidden} more tokens ..."], *lines[-_LINES:]]
    return [
        f"the first prompt{place} has {len(ids)} tokens:",
        *(f"  {_SEPARATOR.join(line)}" for line in lines),
    ]


def _pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """Yields the text of each token. A part of a character is spelled as in the vocabulary."""
    for token, raw in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if raw.startswith("▁") and not text.startswith(" "):
            text = " " + text  # SentencePiece takes it away at the start of a text
        yield printable(raw if "\ufffd" in text or not text else text)


def _fill(pieces: Iterable[str]) -> list[list[str]]:
    """Puts pieces into lines. A piece that is longer than a line is shortened."""
    lines: list[list[str]] = [[]]
    for piece in pieces:
        if len(piece) > _WIDTH:
            piece = f"{piece[: _WIDTH // 2 - 1]}…{piece[1 - _WIDTH // 2 :]}"
        if sum(map(len, lines[-1])) + len(lines[-1]) + len(piece) > _WIDTH:
            lines.append([])
        lines[-1].append(piece)
    return lines


def notes_about_prompts(
    model: Rendering,
    examples: Sequence[Example],
    think_formats: Sequence[Mapping[str, Any]] = (),
    *,
    template_is_given: bool = False,
) -> list[str]:
    """Returns a line for everything about the prompts that is odd.

    Args:
        model: a loaded model.
        examples: training examples, at least one.
        think_formats: arguments of each reward `think_format` of the run.
        template_is_given: whether the config names a chat template instead of taking the tokenizer's.
    """
    shown = list(islice(examples, _LOOKED_AT))
    chat = next((example.prompt for example in shown if not isinstance(example.prompt, str)), None)
    texts = [example for example in shown if isinstance(example.prompt, str)]
    notes: list[str] = []
    if chat is not None:
        notes += _about_template(model, chat)
        end = apply_template(model.tokenizer, chat, model.chat)
        notes += _about_thinking(end, think_formats, "the chat template")
    if texts:
        notes += _about_texts(model, texts, len(shown))
        notes += _about_thinking(texts[0].prompt, think_formats, "the prompt")
    given = {"chat_template": template_is_given, "chat_template_arguments": bool(model.chat.arguments)}
    unused = [f"model.{name}" for name, is_given in given.items() if is_given]
    if chat is None and unused:
        notes.append(
            f"{' and '.join(unused)} {'change' if len(unused) > 1 else 'changes'} nothing: the prompts are "
            "texts, not lists of messages, so the chat template is not used"
        )
    return notes


def _about_template(model: Rendering, messages: list[dict]) -> Iterator[str]:
    """Yields what is odd about the chat template, tried on one chat."""

    def rendered(now: datetime, **settings: bool) -> str:
        chat = ChatSettings(arguments=model.chat.arguments, now=now)
        return apply_template(model.tokenizer, messages, chat, **settings)

    try:
        dated = rendered(_TIMES[0]) != rendered(_TIMES[1])
    except Exception:  # a template that does not like one of the dates
        dated = True
    if dated:
        yield (
            f"the chat template prints the date: it is {model.chat.now.isoformat(sep=' ')} in all prompts of "
            "this run, also when the run is continued (model.chat_template_date sets another)"
        )
    if draws_at_random(model.tokenizer, model.chat):
        yield "the chat template uses random numbers: a run that is continued may have other prompts"
    yield from _left_out(model, messages)
    text = rendered(model.chat.now)
    if text == rendered(model.chat.now, add_generation_prompt=False):
        yield (
            "the chat template gives the same text with and without add_generation_prompt: the model answers "
            f"right behind {printable(text[-20:])!r}. If an assistant's turn has a beginning, give a "
            "template that writes it (model.chat_template: a Jinja file)"
        )


def _left_out(model: Rendering, messages: list[dict]) -> Iterator[str]:
    """Yields the messages of a chat that may say anything and leave the prompt as it is."""
    text = apply_template(model.tokenizer, messages, model.chat)
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            continue
        other = [*messages[:index], {**message, "content": f"{content} x"}, *messages[index + 1 :]]
        try:
            printed = apply_template(model.tokenizer, other, model.chat) != text
        except Exception:  # a template that looks at the content
            printed = True
        if not printed:
            start = content if len(content) <= 30 else f"{content[:29]}…"
            yield (
                f"the chat template leaves out the message of role {message.get('role')!r} "
                f"({printable(start)!r}), so the model never sees it: write it into the user's message, or "
                "give a template that prints it (model.chat_template: a Jinja file)"
            )


def _about_thinking(text: str, think_formats: Sequence[Mapping[str, Any]], what: str) -> Iterator[str]:
    """Yields what a tag at the end of a prompt means for the completion and for the rewards of its format."""
    found = re.search(r"<(/?)([^<>/\s|]+)>\s*\Z", text)
    closes, tag = (bool(found[1]), found[2]) if found else (False, None)
    first_tags = [(arguments.get("tags") or ("think",))[0] for arguments in think_formats]
    opens = tag is not None and not closes and (tag in first_tags or tag.lower() in _THINKING)
    if opens:
        yield f"{what} opens <{tag}> itself: completions begin inside it and have only </{tag}>"
    for arguments, first in zip(think_formats, first_tags, strict=True):
        opened = bool(arguments.get("opened"))
        if opens and tag == first and not opened:
            yield (
                f"think_format is 0 for a completion that only closes <{tag}>, since {what} opens it: give "
                "rewards: [{function: think_format, arguments: {opened: true}}]"
            )
        elif opened and not (opens and tag == first):
            yield (
                f"think_format has opened: true, but {what} does not end with <{first}>: it is 0 for a "
                f"completion that opens <{first}> itself; leave opened out"
            )
        elif closes and tag == first:
            yield (
                f"think_format is 0 for a completion that does not think, and {what} ends with </{tag}>: "
                "switch thinking on, or leave the reward out"
            )


def _about_texts(model: Rendering, examples: Sequence[Example], num_looked_at: int) -> Iterator[str]:
    """Yields what is odd about prompts that are plain texts."""
    control = control_tokens(model.tokenizer)
    if control.num_behind:
        yield (
            "the tokenizer puts its eos token behind every text: it is left out of the prompts, because a "
            "completion has to follow them"
        )
    marks = _marks_of_a_turn(model)
    rendered = [
        example
        for example in examples
        if spelled_token(example.prompt, control) is not None
        or (marks and all(mark in example.prompt for mark in marks))
    ]
    if rendered:
        first = rendered[0]
        token = spelled_token(first.prompt, control) or " and ".join(marks)
        place = f" ({first.place})" if first.place else ""
        yield (
            f"{len(rendered)} of {num_looked_at} prompts are texts that spell {token!r}{place}, as if a chat "
            "template had been applied to them. Texts are encoded as plain text, without control tokens: "
            "give lists of messages ({role, content}) instead"
        )
    if any(re.match(r"\s*\[\s*\{", e.prompt) and '"role"' in e.prompt for e in examples):
        yield (
            "prompts are texts that hold a list of messages as JSON, and they are encoded as plain text: "
            "write the list itself into the data, not its text"
        )


def _marks_of_a_turn(model: Rendering) -> tuple[str, ...]:
    """Returns what the chat template writes around a user's text, or () if that is too short to be a mark."""
    template = model.tokenizer.chat_template
    if template is None or (isinstance(template, str) and template.endswith(PLAIN_TEMPLATE)):
        return ()
    content = "QUESTION"
    try:
        text = apply_template(model.tokenizer, [{"role": "user", "content": content}], model.chat)
    except Exception:  # a template that wants more than a user's turn
        return ()
    before, found, behind = text.partition(content)
    lines = [before.strip().rpartition("\n")[2].strip(), behind.strip().partition("\n")[0].strip()]
    bos = model.tokenizer.bos_token or ""
    marks = [line.removeprefix(bos).strip() for line in lines]
    return tuple(marks) if found and all(len(mark) >= 3 for mark in marks) else ()
