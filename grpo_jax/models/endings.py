"""What ends a completion: the eos tokens that a model names, or those that the user gives."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp

from grpo_jax.models.chat_templates import ChatSettings, apply_template
from grpo_jax.models.stops import Stops

_GIVEN = "sampling.eos_token_ids"


class Ending(Protocol):
    """The fields of a `Model` that say how its completions end."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def eos_origins(self) -> tuple[str, ...]: ...
    @property
    def stops(self) -> Stops | None: ...
    @property
    def chat(self) -> ChatSettings: ...


def find_eos(
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Any,
    *,
    vocab_size: int,
    source: str,
    required: bool = True,
) -> dict[int, str]:
    """Finds all tokens that a model or its tokenizer names as the end of a completion.

    A model tuned for chat often names its `<|im_end|>` in one place and `<|endoftext|>` in another. Whoever
    samples from it expects either to end the answer, so none of the places is preferred.

    Args:
        generation_config: contents of generation_config.json.
        config: contents of config.json. Defaults of its class do not count, as the model does not name them.
        tokenizer: tokenizer. Its `eos_token` counts, and so does an `eot_token` (end of turn), if it has one.
        vocab_size: number V of ids of the model.
        source: name of the model in messages.
        required: whether it is an error if there is no such token.

    Returns:
        id -> the places that name it, in the order above.

    Raises:
        ValueError: an entry is no id of the vocabulary, there is no entry, or none can be sampled.
    """
    named = {
        "generation_config.json": generation_config.get("eos_token_id"),
        "config.json": config.get("eos_token_id"),
        "text_config of config.json": (config.get("text_config") or {}).get("eos_token_id"),
        "tokenizer": [i for i in (tokenizer.eos_token_id, _turn_end(tokenizer)) if i is not None],
    }
    found: dict[int, list[str]] = {}
    for place, value in named.items():
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{source}: eos_token_id {token!r} in {place} is not an id of the vocabulary, 0 to "
                    f"{vocab_size - 1}; correct it there, or give {_GIVEN}"
                )
            if place not in found.setdefault(token, []):
                found[token].append(place)
    if not found and required:
        raise ValueError(
            f"{source}: no end-of-sequence token: neither generation_config.json, config.json nor the "
            f"tokenizer names one. Give {_GIVEN}, or texts as sampling.stop"
        )
    return _check_sampled({token: ", ".join(places) for token, places in found.items()}, tokenizer, source)


def choose_eos(
    tokens: Sequence[int | str], tokenizer: Any, *, vocab_size: int, source: str
) -> dict[int, str]:
    """Turns the tokens that a user gives into ids.

    Args:
        tokens: ids or texts of tokens. If it is empty, only stop strings end a completion.
        tokenizer: tokenizer of the model.
        vocab_size: number V of ids of the model.
        source: name of the model in messages.

    Returns:
        id -> where it comes from.

    Raises:
        ValueError: an entry is no id of the vocabulary or no single token, or no entry can be sampled.
    """
    ids = []
    for token in tokens:
        if isinstance(token, str):
            ids.append(_id_of(token, tokenizer, source))
        elif 0 <= token < vocab_size:
            ids.append(token)
        else:
            raise ValueError(
                f"{_GIVEN}: {token} is not an id of the vocabulary of {source}, 0 to {vocab_size - 1}"
            )
    return _check_sampled(dict.fromkeys(ids, _GIVEN), tokenizer, source)


def _id_of(text: str, tokenizer: Any, source: str) -> int:
    """Returns the id of the token with this text, as the vocabulary spells it or as it decodes."""
    found = tokenizer.get_vocab().get(text)
    if found is not None:
        return found
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) == 1 and tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == text.strip():
        return ids[0]
    raise ValueError(
        f"{_GIVEN}: {text!r} is no single token of {source}; give an id, or the text of one token as the "
        "tokenizer has it"
    )


def _turn_end(tokenizer: Any) -> int | None:
    token = tokenizer.special_tokens_map.get("eot_token", tokenizer.init_kwargs.get("eot_token"))
    token = token.get("content") if isinstance(token, dict) else token
    return None if token is None else tokenizer.get_vocab().get(str(token))


def _check_sampled(found: dict[int, str], tokenizer: Any, source: str) -> dict[int, str]:
    """Returns what was found, unless none of it can be sampled, see `limit_vocabulary`."""
    largest = max(tokenizer.get_vocab().values())
    if found and min(found) > largest:
        raise ValueError(
            f"{source}: eos_token_id {min(found)} is beyond the tokenizer, whose ids go up to {largest}: no "
            f"completion could end. Give {_GIVEN}"
        )
    return found


def tokenizer_to_save(model: Ending) -> Any:
    """Returns the tokenizer as it is, if its eos token is one of the model's.

    Otherwise it returns a copy that names the first control token among the model's. Naming an ordinary token
    would make it a control token and take it out of every text.
    """
    tokenizer = model.tokenizer
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    eos = next((special[i] for i in model.eos_ids if i in special), None)
    if tokenizer.eos_token_id in (None, *model.eos_ids) or eos is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = eos
    return tokenizer


def describe_endings(model: Ending) -> str:
    """Says in one line what ends a completion: each token's text, id and origin, and the stop strings."""
    tokens = [
        f"{_text_of(model.tokenizer, token)} (id {token}: {origin})"
        for token, origin in zip(model.eos_ids, model.eos_origins, strict=True)
    ]
    if model.stops is None:
        return "a completion ends with " + " or ".join(tokens)
    place = "right behind" if model.stops.included else "right before"
    texts = f"{place} the text " + " or ".join(map(repr, model.stops.strings))
    return "a completion ends " + (f"with {' or '.join(tokens)}, or {texts}" if tokens else texts)


def end_arguments(model: Ending) -> dict[str, Any]:
    """Returns what ends a completion as the arguments of `generate`."""
    stops = model.stops
    return {
        "eos_ids": jnp.asarray(model.eos_ids, jnp.int32),
        "stop_table": None if stops is None else stops.table,
    }


def stop_notes(model: Ending) -> list[str]:
    """Returns a line for each stop string that stops nothing or that a reward may look for."""
    if model.stops is None:
        return []
    special = _special_tokens_in(model.tokenizer, model.stops.strings)
    notes = [
        f"the stop string {string!r} stops nothing: no tokens of this model spell it"
        for string in model.stops.unspellable
        if string not in special
    ]
    notes += [
        f"the stop string {string!r} does not see the special token {_text_of(model.tokenizer, token)}, "
        "which the text of a completion leaves out. To end there, give sampling.eos_token_ids: "
        f"{[*model.eos_ids, token]}"
        for string, token in special.items()
        if token not in model.eos_ids
    ]
    # Before a small letter it may be LaTeX, such as \neq.
    notes += [
        f"the stop string {string!r} has a backslash and an n, which is no line break. In YAML that is "
        r'"\n" in double quotes, on the command line the list ["\n"] in single quotes'
        for string in model.stops.strings
        if re.search(r"\\n(?![a-z])", string)
    ]
    tags = [string for string in model.stops.strings if string.strip().startswith("</")]
    if tags and not model.stops.included:
        notes.append(
            f"the text that rewards read ends before the stop string {tags[0]!r}. If a reward looks for that "
            "closing tag, set sampling.include_stop: true"
        )
    return notes


def _special_tokens_in(tokenizer: Any, strings: Iterable[str]) -> dict[str, int]:
    """Returns the strings that spell a special token, each with the id of one."""
    ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {string: i for string in strings for content, i in ids.items() if content and content in string}


def _text_of(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def turn_end_note(model: Ending) -> str | None:
    """Returns a line for prompts that are chats if a turn's own end does not end a completion, else None.

    The turn's end is the first control token that the chat template puts behind an assistant's message.
    """
    tokenizer = model.tokenizer
    answer = "The answer is 42."
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = apply_template(tokenizer, messages, model.chat, add_generation_prompt=False)
    except Exception:  # whatever a template raises; encoding the prompts says what is wrong
        return None
    rest = text[text.rfind(answer) + len(answer) :] if answer in text else ""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]
    end = next((i for i in ids if i in special), None)
    if end is None or end in model.eos_ids:
        return None
    name = _text_of(tokenizer, end)
    return (
        f"the chat template ends a turn with {name} (id {end}), which does not end a completion; if it "
        f"should, add it: {_GIVEN}: {[*model.eos_ids, end]}"
    )
