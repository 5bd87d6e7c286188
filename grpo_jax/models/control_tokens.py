"""Finds the control tokens of a tokenizer, once, and the texts that spell one."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PREFIX = 3  # number of characters by which tokens are looked up in a text
# tokenizer -> (its state, its control tokens)
_FOUND: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ControlTokens:
    """What a tokenizer's special tokens are.

    Args:
        meaning: the tokens that mean something to the model, by id. A mere `unk` does not.
        spelled: the texts of all special tokens, by their first characters.
        num_before: number of tokens that the tokenizer puts before every text, such as BOS.
        num_behind: number of tokens that it puts behind every text, such as EOS.
    """

    meaning: Mapping[int, str]
    spelled: Mapping[str, Sequence[str]]
    num_before: int
    num_behind: int


def control_tokens(tokenizer: Any) -> ControlTokens:
    """Returns the control tokens of a fast tokenizer.

    The result is kept, because transformers re-creates its table of added tokens at every access. That takes
    milliseconds if there are thousands of them.
    """
    state = (tokenizer.__len__(), tokenizer.special_tokens_map)
    known = _FOUND.get(tokenizer)
    if known is None or known[0] != state:
        known = _FOUND[tokenizer] = (state, _find(tokenizer))
    return known[1]


def _find(tokenizer: Any) -> ControlTokens:
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    unknown = roles.pop("unk_token", None)
    spelled: dict[str, list[str]] = {}
    for token in special.values():
        spelled.setdefault(token[:_PREFIX], []).append(token)
    probe = tokenizer(["0"], return_special_tokens_mask=True, verbose=False)["special_tokens_mask"][0]
    inside = [i for i, added in enumerate(probe) if not added]
    return ControlTokens(
        meaning={i: token for i, token in special.items() if token != unknown or token in roles.values()},
        spelled=spelled,
        num_before=inside[0] if inside else 0,
        num_behind=len(probe) - 1 - inside[-1] if inside else 0,
    )


def find_control_token(control: ControlTokens, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a control token that the messages spell, or `None` if there is none.

    A role may be the name of a token, as templates write it. It may not hold one among other text.
    """
    for message in messages:
        for text in _texts([value for key, value in message.items() if key != "role"]):
            if (token := spelled_token(text, control)) is not None:
                return token
        role = message["role"]
        if isinstance(role, str) and (token := spelled_token(role, control)) not in (None, role):
            return token
    return None


def spelled_token(text: str, control: ControlTokens) -> str | None:
    """Returns a control token that a text spells, or `None` if there is none."""
    for prefix, tokens in control.spelled.items():
        if prefix in text:
            for token in tokens:
                if token in text:
                    return token
    return None


def _texts(value: Any) -> Iterator[str]:
    """Yields every string of a message, however deeply it is nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
