"""The configuration of sampling: how tokens are drawn, and what ends a completion."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_jax.config.data import require


def check_drawing(section: str, *, max_new_tokens: int, top_k: int, top_p: float, min_p: float) -> None:
    """Checks what training and the generate command both say about how completions are drawn.

    Args:
        section: prefix of the names in the messages, such as `sampling.`.

    Raises:
        ValueError: names the value and its range.
    """
    require(max_new_tokens >= 1, f"{section}max_new_tokens: {max_new_tokens}; at least 1")
    require(top_k >= 0, f"{section}top_k: {top_k}; 0 (off) or more")
    require(0 < top_p <= 1, f"{section}top_p: {top_p}; in (0, 1], 1 is off")
    require(0 <= min_p < 1, f"{section}min_p: {min_p}; in [0, 1), 0 is off")


_MAX_STOP_BYTES = 1000  # the table of `stops` has about one row per byte, of V entries each


def check_endings(
    section: str, *, eos_token_ids: Any = None, stop: Any = None, include_stop: bool = False
) -> None:
    """Checks what training and the generate command both say about how completions end.

    Args:
        section: prefix of the names in the messages, such as `sampling.`.
        eos_token_ids: as in `SamplingConfig`, as are the next two.
        stop: stop strings.
        include_stop: whether texts keep them.

    Raises:
        ValueError: names the value and what is right.
    """
    name = f"{section}eos_token_ids"
    for token in as_list(eos_token_ids):
        # A bool is an int of Python, but no id.
        right = isinstance(token, int | str) and not isinstance(token, bool)
        require(right, f"{name}: {token!r} is no token; give ids or the texts of tokens, such as [2, </s>]")
        require(token != "", f"{name}: it has an empty text; give ids or the texts of tokens")
        require(isinstance(token, str) or token >= 0, f"{name}: {token}; an id is 0 or more")
    require(
        eos_token_ids is None or bool(as_list(eos_token_ids)) or bool(as_list(stop)),
        f"{name}: the list is empty, so no token would end a completion; leave it out for the model's own",
    )
    check_stop_strings(f"{section}stop", as_list(stop))
    require(
        not include_stop or bool(as_list(stop)),
        f"{section}include_stop: there is nothing to include; give {section}stop",
    )


def check_stop_strings(name: str, strings: Sequence[Any]) -> None:
    """Checks stop strings.

    Args:
        name: what the messages call them.
        strings: the stop strings; may be empty.

    Raises:
        ValueError: one is no text, is empty, or can never be in a text; or they are too long.
    """
    for string in strings:
        require(isinstance(string, str), f"{name}: {string!r} is no text; give strings, such as [</answer>]")
        require(string != "", f"{name}: an empty string would end every completion at once; leave it out")
        broken = any(character == "\ufffd" or "\ud800" <= character <= "\udfff" for character in string)
        require(not broken, f"{name}: {string!r} has a character that no text of a model has; leave it out")
    size = sum(len(string.encode()) for string in strings)
    require(size <= _MAX_STOP_BYTES, f"{name}: {size:,} bytes in all; at most {_MAX_STOP_BYTES:,}")


def as_list(value: Any) -> list:
    """Returns a list as it is, any other value alone in a list, and an empty list for None."""
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def endings(*, eos_token_ids: Any, stop: Any, include_stop: bool) -> dict[str, Any]:
    """Returns these settings as `load_model` and `set_endings` take them; a value alone is a tuple of one."""
    given = {"eos_token_ids": eos_token_ids, "stop": stop}
    tuples = {name: None if value is None else tuple(as_list(value)) for name, value in given.items()}
    return {**tuples, "include_stop": include_stop}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are drawn, in training and in sampled evaluation.

    Args:
        max_new_tokens: T, completion tokens at most.
        temperature: divides the logits; above 0 (evaluation adds a greedy pass of its own).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        min_p: drop tokens below this fraction of the most likely one; 0 keeps all.
        eos_token_ids: the tokens that end a completion, as ids or texts (`[2, "<|im_end|>"]`). None: all that
            the model's generation_config.json, its config.json and its tokenizer name.
        stop: texts that end a completion where it first contains one of them (`["\\nQuestion:"]`, or a single
            text). What they end counts as finished and is trained up to there. None: those of
            the model's generation_config.json, which seldom has any; []: none.
        include_stop: whether the text that rewards read keeps the stop text. By default it ends right before,
            as with `stop` in vLLM and the OpenAI API.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    eos_token_ids: list[int | str] | int | str | None = None
    stop: list[str] | str | None = None
    include_stop: bool = False

    @property
    def endings(self) -> dict[str, Any]:
        """What ends a completion, as `load_model` and `set_endings` take it."""
        return endings(eos_token_ids=self.eos_token_ids, stop=self.stop, include_stop=self.include_stop)

    def __post_init__(self):
        check_drawing(
            "sampling.",
            max_new_tokens=self.max_new_tokens,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )
        check_endings("sampling.", **self.endings)
        require(
            0 < self.temperature < math.inf,
            f"sampling.temperature: {self.temperature}; training needs a temperature above 0: greedy "
            "completions of one prompt are all equal and teach nothing",
        )
